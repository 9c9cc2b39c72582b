"""Files from strangers: a good result or one line that names the file, whatever they hold."""

import json
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wd_probe.cli import console as render

from tests.strangers import READ, SLOW, mistyped, outcome, spoiled
from wd_probe import InputError, WdProbeWarning
from wd_probe.report.page import report


def test_a_page_is_not_written_through_a_link(copy, tmp_path):
    folder = copy("run")
    (tmp_path / "mine").write_text("kept")
    for name in ("report.html", "report.html.partial", f"report.html.{os.getpid()}.partial"):
        (folder / name).symlink_to(tmp_path / "mine")
    report([folder])
    assert (tmp_path / "mine").read_text() == "kept"
    assert "<title>" in (folder / "report.html").read_text()


# --- pages and terminals --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Glyph", "ignore:.*identical low and high")
@pytest.mark.parametrize("name", ["run", "scan"])
def test_pages_of_spoiled_runs(made, copy, tmp_path, name):
    folder = copy(name)
    good = {n: (folder / n).read_text() for kind, n in READ if kind == name}
    values = {n: json.loads(good[n]) for n in good if "json" in n}

    @SLOW
    @given(st.data())
    def check(drawn):
        for n in good:
            (folder / n).write_text(good[n])
        n = drawn.draw(st.sampled_from(sorted(good)))
        if n in values:
            (folder / n).write_text(json.dumps(drawn.draw(mistyped(values[n]))))
        else:
            (folder / n).write_bytes(drawn.draw(spoiled(good[n].encode())))
        with pytest.MonkeyPatch.context() as patch:
            told = []
            patch.setattr("warnings.warn", lambda message, *_, **__: told.append(str(message)))
            outcome(lambda: report([folder], tmp_path / "page.html"), name)
        assert all(line.isprintable() for line in told)

    check()


def test_tables_that_make_no_grid_take_no_memory(copy, tmp_path):
    folder = copy("run")
    config = json.loads((folder / "config.json").read_text())
    config["layers"] = [{"index": k, "name": f"{k}"} for k in range(1, 20_001)]
    (folder / "config.json").write_text(json.dumps(config))
    rows = "".join(f"{k},{k},0.1\n" for k in range(1, 20_001))
    (folder / "layers.csv").write_text("step,index,rate\n" + rows)
    with pytest.raises(InputError, match="20000 values make no grid of 20000 × 20000"):
        report([folder], tmp_path / "page.html")


def test_names_are_text_on_a_terminal_too(capsys, tmp_path, monkeypatch):
    console = render._Console(force_terminal=True, width=200, highlight=False)
    console.print("a\x1b]0;title\x07b\x9b31m[bold]c[/] \u202e", markup=True)
    shown = capsys.readouterr().out
    assert "a\\x1b]0;titleb\\x9b31m" in shown
    assert "\x1b[1mc" in shown
    assert "\\u202e" in shown
    monkeypatch.setattr(render, "err", render._Console(stderr=True, width=200))
    monkeypatch.setattr("warnings.showwarning", None)
    render.show_warnings()
    sys.modules["warnings"].showwarning(WdProbeWarning("x\x1b[2J\n[red]y"), WdProbeWarning, "", 0)
    assert capsys.readouterr().err == "wdprobe: warning: x\\x1b[2J\\n[red]y\n"


def test_a_folder_with_a_strange_name(wdprobe, tmp_path):
    folder = tmp_path / os.fsdecode(b"a\x1b[2J\n\xff[red]")
    folder.mkdir()
    (folder / "config.json").write_text("[]")
    for arguments in (["report", folder], ["zeroshot", "--run", folder]):
        code, out, err = wdprobe(*arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert "\\x1b[2J\\n\\udcff[red]/config.json is damaged" in err
