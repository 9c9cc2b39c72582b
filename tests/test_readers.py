"""Files from strangers: a good result or one line that names the file, whatever they hold."""

import json
import os
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from wd_probe.cli import console as render

from tests.strangers import ESCAPE, QUICK, READ, SLOW, mistyped, outcome, spoiled
from wd_probe import InputError, WdProbeWarning
from wd_probe.report import sweep as report_sweeps
from wd_probe.report.page import report
from wd_probe.sweeps import cells as sweeps
from wd_probe.sweeps import grid as gridfile
from wd_probe.training.options import TrainOptions

# --- grids and sweeps -----------------------------------------------------------------------------

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
    for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)
MERGED = "a: &a {k: v}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n"
    for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)
GRIDS = {
    "g.yaml": [LAUGHS, MERGED, "lr: " + "[" * 9_000,
               "!!python/object/apply:os.system ['touch ran']",
               "seeds: 1000000000000", "seed: 0x" + "f" * 9_000, "seed: " + "9" * 5000,
               "? [a]\n: 1",
               "seeds: " + ":59" * 5_000, "lr: {a: [1]}", f"method: {json.dumps(ESCAPE[:9])}",
               json.dumps({ESCAPE[:9]: 1}), "lr: [[1]]", "- 1", "", "\0", "x" * 100_000],
    "g.toml": ["lr = " + "[" * 9_000, ".".join("a" * 4_000) + " = 1", "seeds = 1000000000000",
               "seed = 0x" + "f" * 9_000, "seed = " + "9" * 5000, 'method = "\\u001b[31m"',
               "lr = nan", "lr = 1979-05-27", "a = 1\na = 2", "\0"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(n, t) for n in GRIDS for t in GRIDS[n]])
def test_crafted_grids(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    found = outcome(lambda: gridfile.read_grid(tmp_path / name), name)
    if found is not None:
        assert outcome(lambda: gridfile.Plan.of(found), "--lr", "unknown method") is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["g.toml", "g.yaml"])
def test_spoiled_grids(tmp_path, name):
    values = {"method": ["wd", "lpwd"], "lr": [0.001, 0.01], "seeds": 2, "model": "test_convnext"}
    text = yaml.safe_dump(values)
    if name == "g.toml":
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    path = tmp_path / name

    @QUICK
    @given(spoiled(text.encode()))
    def check(found):
        path.write_bytes(found)
        read = outcome(lambda: gridfile.read_grid(path), name)
        if read is not None:
            outcome(lambda: gridfile.Plan.of(read).cells(False), "")

    check()


def test_spoiled_records_of_a_sweep(tmp_path):
    plan = gridfile.Plan.of({"method": "lpwd", "lr": [0.1, 0.01]})
    cells = plan.cells(False)
    gridfile.Claim(tmp_path, plan, cells).close()
    good = json.loads((tmp_path / "sweep.json").read_text())

    @QUICK
    @given(mistyped(good))
    def check(found):
        (tmp_path / "sweep.json").write_text(json.dumps(found))
        claim = outcome(lambda: gridfile.Claim(tmp_path, plan, cells), tmp_path.name)
        if claim is not None:
            claim.close()

    check()


def test_spoiled_cells_are_begun_anew_or_named(made, tmp_path):
    options = TrainOptions(command="rop", model="test_convnext", every=1, lr=1e-3)
    (cell,) = sweeps.grid(options, {})
    own = tmp_path / "cells" / cell.name
    own.mkdir(parents=True)
    config, summary = (
        json.loads((made / f"run/{n}.json").read_text()) for n in ("config", "summary")
    )
    (own / "config.json").write_text(json.dumps(config))
    (own / "summary.json").write_text(json.dumps(summary | {"run": "/etc"}))
    assert sweeps.finished(own)["run"] == str(own)

    @QUICK
    @given(mistyped(config), mistyped(summary))
    def check(config, summary):
        (own / "config.json").write_text(json.dumps(config))
        (own / "summary.json").write_text(json.dumps(summary))
        done = sweeps.finished(own)
        if done is not None:
            sweeps.rows([cell], [done])
            sweeps.settings([cell], [done])[0].values("rate", "mean")
        found = report_sweeps.read_sweep(tmp_path)
        assert all(text.isprintable() for _, text in found.without.values())
        report_sweeps.groups(found)

    check()


def test_a_cell_that_points_elsewhere_is_not_written_through(tmp_path):
    (cell,) = sweeps.grid(TrainOptions(model="no_such_model"), {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/summary.json").write_text("kept")
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / cell.name).symlink_to(tmp_path / "mine")
    assert sweeps.run_cell(cell, tmp_path / "cells")["status"] == "failed"
    assert (tmp_path / "mine/summary.json").read_text() == "kept"
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["summary.json"]


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
