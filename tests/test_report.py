import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from matplotlib.figure import Figure

from wd_probe import InputError, WdProbeWarning
from wd_probe.report import page, values
from wd_probe.report.page import report
from wd_probe.runs import figures
from wd_probe.sweeps import cells as sweeps
from wd_probe.training import scan as zeroshot
from wd_probe.training.options import TrainOptions
from wd_probe.training.train import train

CHROMIUM = shutil.which("chromium")
EVIL = "<script>alert('$x_{$')</script>"


class Silent:
    def __getattr__(self, _):
        return lambda *_: None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs, a scan of one, and a sweep of four cells."""
    root = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small steps gain nothing from more
    small = TrainOptions(model="test_convnext", batch_size=64, lr=1e-3, train_samples=256)
    for name, method, opt in (("one", "wd", "adamw"), ("two", "lpwd", "adam")):
        train(
            TrainOptions(
                command="rop", every=1, model="test_convnext", batch_size=64, lr=1e-3, epochs=2,
                train_samples=256, method=method, opt=opt, output=root / name,
            ),
            Silent(),
        )  # fmt: skip
    zeroshot.scan(
        zeroshot.ZeroshotOptions(
            run=root / "one", num_samples=64, steps=5, by="kind", by_steps=2, output=root / "scan"
        ),
        Silent(),
    )
    axes = {"method": ["wd", "rwd"], "weight_decay": [0.1, 1.0], "opt": ["adam"], "every": [1]}
    cells = sweeps.grid(small, axes | {"val_split": [0.1], "epochs": [1]})
    sweeps.sweep(cells, root / "sweep", Silent())
    torch.set_num_threads(threads)
    return root


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of one of them to be spoiled."""
    return lambda name, to="spoiled": Path(shutil.copytree(folders / name, tmp_path / to))


class Page(HTMLParser):
    """A page's text, figures, links and element names."""

    def __init__(self, file):
        super().__init__()
        self.elements, self.figures, self.data, self.outside, self.text = [], [], {}, [], ""
        self.open = []
        self.source = Path(file).read_text()
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append(tag)
        if tag not in ("meta", "link", "path", "br"):
            self.open.append(tag)
        if tag == "svg":
            assert attributes["role"] == "img"
            self.figures.append(attributes["aria-label"].split(":")[0])
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name, "#")
            if not target.startswith(("data:", "#")):
                self.outside.append(target)
        if "download" in attributes:
            text = unquote(attributes["href"].partition(",")[2])
            self.data[attributes["download"]] = list(csv.DictReader(io.StringIO(text)))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def written(paths, tmp_path, **options):
    return Page(report(paths, tmp_path / "page.html", **options)["page"])


def test_a_run(folders, tmp_path):
    shown = written([folders / "one"], tmp_path)
    assert shown.figures == [
        "Opposing penalties over the steps", "R_op by layer", "R_op had λ been another", "Training",
    ]  # fmt: skip
    summary = json.loads((folders / "one" / "summary.json").read_text())
    mean = 100 * summary["rate"]["mean"]
    assert f"pushes {mean:.3g} % of the weights away from zero" in shown.text
    assert f"Top-1 on the test images is {100 * summary['top1']:.1f} % after 2" in shown.text
    assert all(finding in shown.text for finding in summary["findings"])
    worst = max(summary["layers"], key=lambda layer: layer["rate"])
    assert f"{100 * worst['rate']:.3g} %" in shown.text
    assert "torch 2." in shown.text
    assert "test_convnext" in shown.text
    with (folders / "one" / "steps.csv").open(newline="") as file:
        steps = list(csv.DictReader(file))
    data = shown.data["rop_over_steps.csv"]
    assert [float(r["rate"]) for r in data] == pytest.approx([float(r["rate"]) for r in steps])
    assert {r["name"] for r in shown.data["rop_by_layer.csv"]} >= {"stem", "head"}
    # findings stand before the first figure, what was run behind the last
    first, last = shown.source.index("<svg"), shown.source.rindex("</svg")
    assert shown.source.index("pushes") < first < last < shown.source.index("What was run")


def test_a_run_that_never_opposes_has_no_empty_figures(folders, tmp_path):
    shown = written([folders / "two"], tmp_path)
    assert shown.figures == ["Training"]
    assert "No penalty opposes: lpwd" in shown.text
    assert "to the letter" in shown.text


def test_a_scan(folders, tmp_path):
    shown = written([folders / "scan"], tmp_path)
    assert shown.figures == ["Zero-shot decay", "One part decayed at a time", "Feature distortion"]
    assert "half-life" in shown.text
    assert [float(r["scale"]) for r in shown.data["zeroshot.csv"]] == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2, 0]
    )
    assert "head" in {row["name"] for row in shown.data["zeroshot_by_part.csv"]}


def test_several_runs(folders, tmp_path):
    shown = written([folders / name for name in ("one", "two", "scan")], tmp_path)
    assert shown.figures[:3] == [
        "R_op over the steps", "Training loss", "Top-1 on the test images",
    ]  # fmt: skip
    assert len(shown.figures) == 3 + 4 + 1 + 3
    assert {row["run"] for row in shown.data["rate_by_run.csv"]} == {"one", "two"}
    assert "Top-1 after the last epoch is highest in" in shown.text
    assert "Mean R_op goes from 0 % (two)" in shown.text


def test_scans_are_laid_over_each_other(folders, copy, tmp_path):
    shown = written([folders / "scan", copy("scan", "other")], tmp_path)
    assert shown.figures[0] == "Zero-shot decay"
    assert {row["run"] for row in shown.data["zeroshot_by_run.csv"]} == {"scan", "other"}
    assert "most robust to shrinking" in shown.text


def test_many_runs_are_only_compared(folders, copy, tmp_path):
    runs = [copy("two", f"run{k}") for k in range(9)]
    shown = written(runs, tmp_path)
    assert shown.figures == ["R_op over the steps", "Training loss", "Top-1 on the test images"]
    assert "none has a section of its own" in shown.text


def test_a_folder_of_runs_is_what_it_holds(folders, tmp_path):
    result = report([folders, folders / "one"], tmp_path / "page.html")
    assert [Path(r["run"]).name for r in result["runs"]] == ["one", "scan", "sweep", "two"]
    assert {r["status"] for r in result["runs"]} == {"finished"}
    assert [r["kind"] for r in result["runs"]] == ["rop", "zeroshot", "sweep", "rop"]


def test_a_sweep(folders, tmp_path):
    shown = written([folders / "sweep"], tmp_path)
    assert shown.figures == [
        "Top-1 of wd", "Top-1 of rwd", "Robustness to λ", "R_op beside top-1",
    ]  # fmt: skip
    assert "A sweep of 4 cells (4 finished) in 4 settings" in shown.text
    assert "chosen on the validation images" in shown.text
    assert "does best, with " in shown.text or " tie, with " in shown.text
    assert "what ten times the best λ does to top-1" in shown.text or "at λ/10" in shown.text
    rows = shown.data["settings.csv"]
    assert [(r["method"], r["weight_decay"]) for r in rows] == [
        ("wd", "0.1"), ("wd", "1"), ("rwd", "0.1"), ("rwd", "1"),
    ]  # fmt: skip
    for row in rows:
        (cell,) = (folders / "sweep/cells").glob(f"*-{row['method']}-*wd{row['weight_decay']}-*")
        summary = json.loads((cell / "summary.json").read_text())
        assert float(row["top1"]) == pytest.approx(summary["top1"])
        assert float(row["val_top1"]) == pytest.approx(summary["val_top1"])
        assert float(row["rop"]) == pytest.approx(summary["rate"]["mean"])


def made_up(root, cells):
    """A sweep whose summaries are given: (method, λ, seed, top-1, validation top-1)."""
    for number, (method, decay, seed, top1, validation) in enumerate(cells):
        cell = root / "cells" / f"{number}"
        cell.mkdir(parents=True)
        options = {"method": method, "weight_decay": decay, "seed": seed, "lr": 0.01, "opt": "adam"}
        (cell / "config.json").write_text(json.dumps({"scale": None, **options}))
        summary = {
            "status": "finished" if top1 is not None else "diverged", "top1": top1, "steps": 7,
            "val_top1": validation, "best10": {"mean": top1},
            "chosen": validation and {"val_top1": validation, "top1": top1},
        }  # fmt: skip
        (cell / "summary.json").write_text(json.dumps(summary))
    return root


def test_the_best_setting_is_chosen_on_validation_and_told_on_test(tmp_path):
    cells = [("wd", 0.1, 0, 0.80, 0.9), ("wd", 1.0, 0, 0.85, 0.7), ("lpwd", 0.1, 0, 0.70, 0.8)]
    shown = written([made_up(tmp_path / "sweep", cells)], tmp_path)
    assert (
        "wd does best, with 80.0 % top-1 at η 0.01, λ 0.1, 10.0 points above lpwd, by a"
        in shown.text
    )
    assert "ten times the best λ does to top-1: wd +5.0 points." in shown.text


def test_without_validation_the_page_says_that_the_test_images_chose(tmp_path):
    cells = [
        ("wd", 0.1, 0, 0.80, None), ("wd", 0.1, 1, 0.90, None), ("wd", 1.0, 0, 0.99, None),
        ("wd", 1.0, 1, None, None), ("lpwd", 0.1, 0, 0.7, None), ("lpwd", 0.1, 1, 0.7, None),
    ]  # fmt: skip
    shown = written([made_up(tmp_path / "sweep", cells)], tmp_path)
    assert "chosen on the test images themselves" in shown.text
    assert (
        "wd does best, with 85.0 ± 63.5 % top-1 at η 0.01, λ 0.1, 15.0 points above lpwd, within "
        "the 95 % interval of the difference (± 63.5)." in shown.text
    )
    assert "ten times the best λ does to top-1: wd −85.0 points." in shown.text
    assert "Cells without a usable model (1)" in shown.text
    assert "at step 7" in shown.text


def test_a_lead_is_judged_by_its_difference_seed_by_seed(tmp_path):
    """However far the seeds lie apart: 1 point at each of three, 0.9 to 1.1 or -4 to 6."""
    for gaps, told in (
        ((0.009, 0.010, 0.011), "1.0 points above lpwd."),
        ((-0.04, 0.01, 0.06), "1.0 points above lpwd, within the 95 % interval of the difference ("
                              "± 12.4)."),
    ):  # fmt: skip
        cells = [
            (method, 0.1, seed, 0.5 + 0.1 * seed + gap * (method == "wd"), 0.9)
            for seed, gap in enumerate(gaps)
            for method in ("wd", "lpwd")
        ]
        shown = written([made_up(tmp_path / told / "sweep", cells)], tmp_path)
        assert told in shown.text


def test_a_tie_is_told_as_a_tie(tmp_path):
    cells = [
        ("baseline", 0.0, 0, 0.8, 0.9), ("wd", 0.1, 0, 0.7998, 0.9), ("pwd", 0.1, 0, 0.7996, 0.9),
        ("lpwd", 0.1, 0, 0.78, 0.9),
    ]  # fmt: skip
    shown = written([made_up(tmp_path / "sweep", cells)], tmp_path)
    assert "baseline, wd and pwd tie, with 80.0 % top-1." in shown.text
    assert "does best" not in shown.text
    assert "0.0 points above" not in shown.text


@pytest.mark.filterwarnings("ignore:cells of s. 1 failed")
def test_a_sweep_and_its_page_choose_the_same_setting(wdprobe, tmp_path, monkeypatch):
    """Where the last epoch, the best one on validation and the test images each say another."""
    scores = {  # η: validation and test top-1 at the best epoch, and after the last
        0.02: ((0.90, 0.95), (0.60, 0.70)), 0.005: ((0.85, 0.93), (0.85, 0.93)),
        0.001: ((0.80, 0.99), (0.80, 0.99)),
    }  # fmt: skip

    def train(options, listener):
        best, last = scores[options.lr]
        config = {name: getattr(options, name) for name in ("model", "opt", "lr", "weight_decay")}
        config |= {"method": options.method, "seed": options.seed, "scale": None}
        (options.output / "config.json").write_text(json.dumps(config))
        if options.seed == 1 and options.lr == 0.02 and failing:
            raise ValueError("it breaks")
        summary = {
            "status": "finished", "steps": 7, "top1": last[1], "val_top1": last[0],
            "best10": {"mean": best[1]}, "chosen": {"val_top1": best[0], "top1": best[1]},
        }  # fmt: skip
        (options.output / "summary.json").write_text(json.dumps(summary))
        return summary

    monkeypatch.setattr("wd_probe.sweeps.cells.train", train)
    monkeypatch.setattr("wd_probe.sweeps.cells.prepare", lambda options: None)
    arguments = ["--lr", "1e-3,5e-3,2e-2", "--method", "wd", "--seeds", 2, "--output", "s"]
    for failing, lr, top1 in ((True, 0.005, "93.0"), (False, 0.02, "95.0")):
        code, out, _ = wdprobe("sweep", *arguments, "--json")
        assert code == failing
        (best,) = json.loads(out)["best"]
        assert (best["lr"], f"{100 * best['top1']['mean']:.1f}") == (lr, top1)
        _, out, _ = wdprobe("report", "s", "--json")
        shown = Page(Path(json.loads(out)["page"]))
        assert f"wd does best, with {top1} ± 0.0 % top-1 at η {lr:g}, λ 0.01" in shown.text


def test_options_that_are_no_axis_of_the_maps_make_groups(tmp_path):
    root = made_up(tmp_path / "sweep", [("wd", 0.1, 0, 0.8, 0.9), ("wd", 0.1, 0, 0.5, 0.6)])
    config = json.loads((root / "cells/1/config.json").read_text())
    (root / "cells/1/config.json").write_text(json.dumps(config | {"batch_size": 7}))
    shown = written([root], tmp_path)
    assert "adam · batch_size 7: wd does best, with 50.0 %" in shown.text
    assert "adam · batch_size 64: wd does best, with 80.0 %" in shown.text


def test_lost_cells_are_listed_and_told_once(copy, tmp_path):
    sweep = copy("sweep")
    cells = sorted((sweep / "cells").iterdir())
    (cells[0] / "summary.json").write_text("{")
    (cells[1] / "summary.json").unlink()
    (cells[2] / "summary.json").write_text('{"status": "failed", "error": "out of memory"}')
    with pytest.warns(WdProbeWarning, match="1 unfinished, 1 failed, 1 damaged") as told:
        shown = written([sweep], tmp_path)
    assert len(told) == 1
    assert "Cells without a usable model (3)" in shown.text
    assert "out of memory" in shown.text
    assert all(cell.name in shown.text for cell in cells[:3])


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
    assert len(told) == 1
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
    assert "The run has not come to its end, or was killed: 8 steps are on file." in shown.text
    assert "pushes" in shown.text


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
    assert len(shown.figures) == 4 + 3


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


def test_a_long_table_is_thinned_by_whole_steps():
    columns = {"step": [float(k // 3) for k in range(90_000)], "index": [0.0, 1.0, 2.0] * 30_000}
    url, every = values.csv_url(columns)
    rows = unquote(url).split(",", 1)[1].splitlines()
    assert every == 5
    link = page._templates.get_template("parts.html").module.download("long", columns)
    assert f'<a href="{url}" download="long.csv">long.csv (one in 5)</a>' in link
    assert rows[1:7] == ["0,0", "0,1", "0,2", "5,0", "5,1", "5,2"]


def test_a_long_line_is_embedded_as_a_picture():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([k % 7 for k in range(6_000)])
    axes.plot([1, 2])
    text = values.svg(figure, "long")
    assert text.count("<image") == 1
    assert len(text) < 100_000


def test_drawn_colours_are_the_pages():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], color=figures.PALETTE["series-2"])
    axes.set_title("fill: #d1495b <&>")
    text = values.svg(figure, 'a "label" <b>')
    assert "stroke: var(--series-2)" in text
    assert "#000000" not in text
    assert 'aria-label="a &quot;label&quot; &lt;b&gt;"' in text
    assert "&lt;&amp;&gt;" in text


def test_maps_mark_the_best_and_what_came_to_nothing():
    nan = float("nan")
    drawn = figures.lr_decay_map(
        {(0.1, 1.0): 0.5, (0.1, 2.0): nan, (0.2, 1.0): 0.75}, "map", best=(0.2, 1.0)
    )
    axes = drawn.axes[0]
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {
        ((0, 0), "75.0"), ((0, 1), "50.0"), ((1, 1), "×"),
    }  # fmt: skip
    assert axes.collections[0].get_offsets().tolist() == [[0, 0]]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0.2", "0.1"]


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
