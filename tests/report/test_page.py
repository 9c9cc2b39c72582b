import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from tests.pages import Page, written
from tests.strangers import READ, SLOW, mistyped, outcome, spoiled
from wd_probe import InputError, WdProbeWarning
from wd_probe.report import page
from wd_probe.report.page import report

CHROMIUM = shutil.which("chromium")
OLD = Path(__file__).parents[1] / "data/first_layout"
EVIL = "<script>alert('$x_{$')</script>"


def test_a_folder_of_runs_is_what_it_holds(folders, tmp_path):
    result = report([folders, folders / "one"], tmp_path / "page.html")
    assert [Path(r["run"]).name for r in result["runs"]] == ["one", "scan", "sweep", "two"]
    assert {r["status"] for r in result["runs"]} == {"finished"}
    assert [r["kind"] for r in result["runs"]] == ["rop", "zeroshot", "sweep", "rop"]


def test_damaged_and_unfinished_runs_leave_the_rest(folders, copy, tmp_path):
    unfinished, torn = copy("one", "unfinished"), copy("one", "torn")
    columnless, gone = copy("one", "columnless"), tmp_path / "gone"
    (unfinished / "summary.json").unlink()
    (torn / "config.json").write_text('{"model": ')
    (columnless / "steps.csv").write_text("step,rate\n1,0.5\n")
    (columnless / "layers.csv").write_text("step,rate\n1,0.5\n")
    paths = [folders / "one", unfinished, torn, columnless, gone]
    with pytest.warns(WdProbeWarning, match=r"unfinished is unfinished \(and 3 more") as told:
        result = report(paths, tmp_path / "page.html")
    assert [warning.category for warning in told].count(WdProbeWarning) == 1
    assert [r["status"] for r in result["runs"]] == [
        "finished", "unfinished", "damaged", "damaged", "damaged",
    ]  # fmt: skip
    shown = Page(result["page"])
    for said in (
        "torn/config.json is damaged",
        "columnless/layers.csv is damaged",
        "gone does not exist",
    ):
        assert said in shown.text
    assert "The run has not come to its end, or was killed: 8 steps on file." in shown.text
    assert "pushes" in shown.text


def test_runs_of_the_first_layout(tmp_path):
    paths = [OLD / name for name in ("rop", "killed", "sweep")]
    with pytest.warns(WdProbeWarning, match="killed is unfinished"):
        shown = written(paths, tmp_path)
    assert shown.figures.count("Opposing penalties over the steps") == 2
    assert "killed: 15 steps on file" in shown.text
    assert "A sweep of 2 cells (1 finished, 1 unfinished)" in shown.text


def test_runs_too_many_to_be_shown_by_themselves_have_no_empty_sections(copy, tmp_path):
    runs = [copy("two", f"run{k}") for k in range(10)]
    for run in runs[8:]:
        (run / "config.json").write_text("{")
    with pytest.warns(WdProbeWarning, match="damaged"):
        shown = written(runs, tmp_path)
    assert "none has a section of its own" in shown.text
    assert "h2" not in shown.elements


def test_names_are_text_and_never_markup(copy, tmp_path):
    runs = [copy("one", "<img src=x onerror=alert(1)>"), copy("scan", "<b>scan & $a$")]
    for run in runs:
        for name in ("config.json", "summary.json"):
            text = (run / name).read_text()
            (run / name).write_text(
                text.replace('"test_convnext"', json.dumps(EVIL)).replace('"stem"', '"<i>$_$"')
            )
    shown = written(runs, tmp_path)
    assert EVIL in shown.text
    assert "<img src=x onerror=alert(1)>" in shown.text
    assert "<b>scan & $a$" in shown.text
    assert not {"script", "img", "i"} & set(shown.elements)
    assert len(shown.figures) == 6 + 3


def as_markup(value):
    """What a template shows, with markup in the place of every text."""
    if isinstance(value, str):
        return value if isinstance(value, Markup) else EVIL
    if isinstance(value, dict):
        return {key: as_markup(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(as_markup, value))
    if isinstance(value, page._Part):
        return dataclasses.replace(value, title=EVIL)
    return value


def test_every_template_escapes(folders, tmp_path, monkeypatch):
    rendered, shown = page._rendered, {}

    def spoiling(name, values):
        shown[name] = rendered(name, as_markup(values))
        return rendered(name, values)

    monkeypatch.setattr(page, "_rendered", spoiling)
    written([folders / name for name in ("one", "scan", "sweep")], tmp_path)
    templates = {path.stem for path in Path(page.__file__).parent.glob("templates/*")}
    assert shown.keys() == templates - {"parts"}  # which all others are made of
    for text in shown.values():
        assert "alert" in text
        assert "<script" not in text


def test_the_page_needs_nothing_else(folders, tmp_path):
    shown = written([folders / "one", folders / "sweep"], tmp_path)
    assert shown.outside == []
    assert "default-src 'none'" in shown.source
    assert not {"script", "iframe", "object", "base", "form"} & set(shown.elements)
    assert not re.search(r"url\((?!#)|@import", shown.source)
    assert len(shown.source) < 1_000_000


def test_a_page_is_the_same_twice(folders, tmp_path):
    once, again = (written([folders / "two"], tmp_path).source for _ in range(2))
    assert once == again


def test_the_command(wdprobe, folders, copy, tmp_path):
    run = copy("one")
    code, out, _ = wdprobe("report", run)
    assert (code, out) == (0, f"Report: {run / 'report.html'}\n")
    assert (run / "report.html").is_file()
    code, out, _ = wdprobe("report", run, folders / "two", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["command"] == "report"
    assert re.fullmatch(r"runs/report-2-runs-[\d-]+\.html", result["page"])
    assert [r["kind"] for r in result["runs"]] == ["rop", "rop"]
    assert (tmp_path / result["page"]).is_file()


def test_a_page_loads_neither_torch_nor_timm(tmp_path):
    code = (
        "import sys\n"
        "from wd_probe.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print({'torch', 'timm', 'jinja2'} & set(sys.modules))"
    )
    runs = [OLD / "rop", OLD / "sweep", "--output", tmp_path / "page.html"]
    done = subprocess.run(
        [sys.executable, "-c", code, "report", *runs], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "{'jinja2'}"


@pytest.mark.parametrize("several", [False, True])
def test_nothing_to_report_is_one_line(wdprobe, tmp_path, several):
    (tmp_path / "empty").mkdir()
    code, out, err = wdprobe("report", "empty", *(["missing"] if several else []))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "empty is no run folder" in err
    assert ("(and 1 more)" in err) == several


def test_a_page_that_cannot_be_written(folders, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="taken is a folder; --output names a file"):
        report([folders / "two"], tmp_path / "taken")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"page.html cannot be written \(.*choose another"):
        report([folders / "two"], tmp_path / "file" / "page.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


def test_a_page_is_not_written_through_a_link(copy, tmp_path):
    folder = copy("one")
    (tmp_path / "mine").write_text("kept")
    for name in ("report.html", "report.html.partial", f"report.html.{os.getpid()}.partial"):
        (folder / name).symlink_to(tmp_path / "mine")
    report([folder])
    assert (tmp_path / "mine").read_text() == "kept"
    assert "<title>" in (folder / "report.html").read_text()


@pytest.mark.filterwarnings("ignore:Glyph", "ignore:.*identical low and high")
@pytest.mark.parametrize("kind", ["run", "scan"])
def test_pages_of_spoiled_runs(copy, tmp_path, kind):
    folder = copy("one" if kind == "run" else kind)
    good = {n: (folder / n).read_text() for of, n in READ if of == kind}
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
            outcome(lambda: report([folder], tmp_path / "page.html"), "spoiled")
        assert all(line.isprintable() for line in told)

    check()


def test_tables_that_make_no_grid_take_no_memory(copy, tmp_path):
    folder = copy("one")
    config = json.loads((folder / "config.json").read_text())
    config["layers"] = [{"index": k, "name": f"{k}"} for k in range(1, 20_001)]
    (folder / "config.json").write_text(json.dumps(config))
    rows = "".join(f"{k},{k},0.1\n" for k in range(1, 20_001))
    (folder / "layers.csv").write_text("step,index,rate\n" + rows)
    with pytest.raises(InputError, match="20000 values make no grid of 20000 × 20000"):
        report([folder], tmp_path / "page.html")


# --- in a browser ---------------------------------------------------------------------------------

#: Its clock, dictionaries and updates.
OF_THE_BROWSER = re.compile(r"https?://([\w-]+\.)*(google|gvt1|googleapis)\.com/")
MEASURE = """<script>
const boxes = [...document.querySelectorAll("figure svg")].map(s => s.getBoundingClientRect());
const wide = document.documentElement.scrollWidth <= window.innerWidth;
document.title = `${boxes.filter(b => b.width > 200 && b.height > 80).length} drawn, fits ${wide}`;
</script></body>"""


def browse(file, tmp_path, *options, width=1200):
    """What a headless Chromium prints, what it complains of, and the addresses it asks for."""
    log = tmp_path / "net.json"
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
            f"--log-net-log={log}", f"--window-size={width},2000", *options, f"file://{file}",
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    asked = re.findall(r'"url":"(https?://[^"]+)"', log.read_text())
    return done.stdout, complaints, [url for url in asked if not OF_THE_BROWSER.match(url)]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_in_a_browser_every_figure_is_drawn_and_nothing_is_fetched(folders, tmp_path):
    shown = written([folders / "one", folders / "scan", folders / "sweep"], tmp_path)
    file = tmp_path / "page.html"
    picture = tmp_path / "picture.png"
    _, complaints, asked = browse(file, tmp_path, f"--screenshot={picture}")
    assert (complaints, asked) == ([], [])
    assert picture.stat().st_size > 50_000
    policy = re.search(r"<meta http-equiv.*?>", shown.source, re.DOTALL)[0]
    spied = shown.source.replace(policy, "").replace("</body>", MEASURE)
    (tmp_path / "spied.html").write_text(spied)
    for width in (1200, 500):
        dom, _, _ = browse(tmp_path / "spied.html", tmp_path, "--dump-dom", width=width)
        assert f"<title>{len(shown.figures)} drawn, fits true</title>" in dom


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_the_browser_would_have_told(tmp_path):
    (tmp_path / "bad.html").write_text(
        '<img src="http://127.0.0.1:9/x.png"><script>console.error("no")</script>'
    )
    _, complaints, asked = browse(tmp_path / "bad.html", tmp_path, "--dump-dom")
    assert complaints
    assert any("127.0.0.1:9" in address for address in asked)
