import subprocess
import sys

from wd_probe.tables import ByWidth, html, plain_table, text


def table(name):
    found = plain_table("Title")
    found.add_column("name")
    found.add_row(name)
    return found


def test_text_is_plain_and_as_wide_as_the_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    told = ByWidth(lambda width: [f"[bold]{width}[/]", table("a name"), "b\x1b[2Jc"])
    assert text(told) == "1000\nTitle\nname\na name\nb\\x1b[2Jc"
    monkeypatch.setenv("COLUMNS", "60")
    assert text(told).startswith("60\n")


def test_html_escapes_names():
    shown = html(table("<script>&"))
    assert "&lt;script&gt;&amp;" in shown
    assert "<script>" not in shown
    assert shown.startswith("<pre ")
    assert '<span style="font-weight: bold">name     </span>' in shown


def test_loading_them_draws_no_random_number():
    code = (
        "import random; state = random.getstate(); import wd_probe.tables, sys\n"
        "print('rich.style' in sys.modules, random.getstate() == state)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"
