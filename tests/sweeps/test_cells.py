import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.small import rows, start
from tests.strangers import QUICK, mistyped
from tests.sweeps.conftest import AXES, BASE, TINY, Told, quick_train, stamps, wait_for
from wd_probe import InputError, RunError
from wd_probe.report.sweep import groups, read_sweep
from wd_probe.sweeps.cells import failure, finished, run_cell, sweep
from wd_probe.sweeps.grid import grid
from wd_probe.sweeps.ledger import rows as told
from wd_probe.sweeps.results import settings
from wd_probe.training.options import TrainOptions

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests/data/first_layout/sweep"


@given(AXES)
def test_every_combination_stands_once_in_a_grid(axes):
    cells = grid(BASE, axes)
    wanted = {
        (m, lr, 0.0 if m == "baseline" else wd, seed, size)
        for m in axes["method"]
        for lr in axes["lr"]
        for wd in axes["weight_decay"]
        for seed in axes["seed"]
        for size in axes["batch_size"]
    }
    found = [
        (o.method, o.lr, o.weight_decay, o.seed, o.batch_size) for o in (c.options for c in cells)
    ]
    assert len(found) == len(set(found))
    assert set(found) == wanted
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(replace(BASE, **{k: asdict(c.options)[k] for k in axes}) == c.options for c in cells)


def test_the_same_options_have_the_same_name_wherever_they_are_kept():
    cell = grid(BASE, {"seed": [3]})[0]
    assert cell.name == "test_convnext-digits-adamw-wd-lr0.0001-wd0.01-s3-67d91629"
    for elsewhere in ({"device": "cpu"}, {"output": Path("a")}, {"data_dir": Path("b")}):
        assert grid(replace(BASE, **elsewhere), {"seed": [3]})[0].name == cell.name
    for other in ({"batch_size": 31}, {"momentum": 0.8}, {"val_split": 0.1}):
        assert grid(replace(BASE, **other), {"seed": [3]})[0].name != cell.name


@pytest.mark.usefixtures("quick")
def test_many_cells_run_with_consent(monkeypatch, tmp_path):
    monkeypatch.setattr("wd_probe.sweeps.grid.MANY", 2)
    cells = grid(BASE, {"seed": range(3)})
    with pytest.raises(InputError, match="the grid has 3 cells; --yes runs them all the same"):
        sweep(cells, tmp_path, Told())
    assert len(sweep(cells, tmp_path, Told(), consent=True)) == 3


def test_a_sweep_end_to_end(wdprobe, tmp_path):
    arguments = ["sweep", *TINY, "--opt", "sgd", "--method", "wd", "--lr", "1e-3,1e25",
                 "--weight-decay", "1e-28", "--every", "1", "--seeds", "2"]  # fmt: skip
    code, out, err = wdprobe(*arguments, "--json")
    assert code == 0, err
    assert "4 cells\n" in err
    assert "cell 4/4 · 0 running · 2 diverged · 0 s left" in err
    result = json.loads(out)
    folder = tmp_path / result["run"]
    assert folder.parent.name == "runs"
    assert result["counts"] == {"finished": 2, "diverged": 2}
    assert result["chosen_by"] == "test top-1"
    (row,) = result["best"]
    assert (row["lr"], row["seeds"], row["diverged"], row["tried"]) == (1e-3, 2, 0, 2)
    listed = rows(folder / "cells.csv")
    assert [r["cell"] for r in listed] == [p["cell"] for p in result["cells"]]
    assert {r["cell"] for r in listed} == {p.name for p in (folder / "cells").iterdir()}
    assert [r["status"] for r in listed] == ["finished", "finished", "diverged", "diverged"]
    summary = json.loads((folder / "cells" / listed[0]["cell"] / "summary.json").read_text())
    assert float(listed[0]["top1"]) == summary["top1"]
    assert float(listed[0]["R_op"]) == summary["rate"]["mean"]
    assert float(listed[0]["remaining"]) == summary["dynamics"]["remaining"]
    assert float(listed[0]["balance"]) == summary["dynamics"]["balance"]["mean"]
    assert listed[0]["state"] == summary["dynamics"]["state"] == "idle"
    assert float(listed[0]["best10"]) == summary["best10"]["mean"]
    assert listed[2]["top1"] == ""
    assert row["top1"]["mean"] == pytest.approx(sum(float(r["top1"]) for r in listed[:2]) / 2)
    assert not list(folder.glob("cells/*/incomplete"))
    events = EventAccumulator(str(folder / "cells" / listed[0]["cell"])).Reload()
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")

    before = stamps(folder / "cells")
    code, out, err = wdprobe(*arguments)
    assert code == 0
    assert "4 cells, 4 of them finished before" in err
    assert "Sweep · cells: 2 diverged, 2 finished" in out
    assert "test_convnext on digits · sgd" in out
    assert "Best η and λ by mean test top-1 of each run's ten best epochs" in out
    assert "without --val-split the best of many settings is flattered" in out
    assert stamps(folder / "cells") == before


def test_a_cell_is_the_run_that_train_makes(wdprobe, tmp_path):
    common = [*TINY, "--method", "lpwd", "--weight-decay", 0.5, "--every", 1, "--val-split", 0.2]
    assert wdprobe("train", *common, "--seed", 1, "--output", "alone")[0] == 0
    code, out, _ = wdprobe("sweep", *common, "--seeds", 2, "--output", "many", "--json")
    assert code == 0
    assert json.loads(out)["chosen_by"] == "validation top-1"
    (cell,) = (tmp_path / "many/cells").glob("*-s1-*")
    for name in ("steps.csv", "epochs.csv", "layers.csv", "model.safetensors"):
        assert (cell / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


KILLED = """
import json, os, signal, sys
from pathlib import Path
from tests.sweeps.conftest import BASE, Told, quick_train
from wd_probe.sweeps import cells, grid

count = 0

def dying_train(options, listener, lock):
    global count
    count += 1
    if count == 3 and moment == "begun":
        os.kill(os.getpid(), signal.SIGKILL)
    if count == 3 and moment == "summary torn":
        (options.output / "summary.json").write_text('{"status": "fini')
        os.kill(os.getpid(), signal.SIGKILL)
    summary = quick_train(options, listener, lock)
    if count == 3 and moment == "before the weights":
        os.kill(os.getpid(), signal.SIGKILL)
    (options.output / "model.safetensors").write_text("weights")
    return summary

cells.train, cells.prepare = dying_train, lambda options: None
for moment in sys.argv[1:]:
    child = os.fork()
    if not child:
        cells.sweep(grid.grid(BASE, {"seed": range(5)}), Path(moment), Told())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end=" ")
"""


def test_a_killed_sweep_goes_on_at_the_broken_cell(tmp_path, monkeypatch):
    moments = ("begun", "summary torn", "before the weights")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *moments],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "-9 -9 -9 "

    def whole_train(options, listener, lock):
        assert {p.name for p in options.output.iterdir()} == {"incomplete", ".lock"}
        (options.output / "model.safetensors").write_text("weights")
        return quick_train(options, listener, lock)

    monkeypatch.setattr("wd_probe.sweeps.cells.train", whole_train)
    monkeypatch.setattr("wd_probe.sweeps.cells.prepare", lambda options: None)
    cells = grid(BASE, {"seed": range(5)})
    for moment in moments:
        folder, told = tmp_path / moment, Told()
        done = [folder / "cells" / cell.name for cell in cells[:2]]
        before = [stamps(path) for path in done]
        summaries = sweep(cells, folder, told)
        assert told.kept == 2
        assert told.started == [cell.name for cell in cells[2:]]
        assert [stamps(path) for path in done] == before
        assert len(summaries) == 5
        assert [r["cell"] for r in rows(folder / "cells.csv")] == [c.name for c in cells]
        assert {r["status"] for r in rows(folder / "cells.csv")} == {"finished"}
        assert len(list(folder.glob("cells/*/model.safetensors"))) == 5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_real_sweep_is_stopped_in_mid_cell_and_goes_on(tmp_path, wdprobe, number):
    arguments = ["sweep", "--model", "test_convnext", "--batch-size", 32, "--steps", 10,
                 "--seeds", 2, "--output", "s"]  # fmt: skip
    process = start(tmp_path, *arguments)
    try:
        wait_for(lambda: list(tmp_path.glob("s/cells/*-s1-*/config.json")))
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert "interrupted: 1 of 2 cells are in s; the same command resumes the rest" in err
        assert [r["status"] for r in rows(tmp_path / "s/cells.csv")] in (
            ["finished", "interrupted"], ["finished", "waiting"],
        )  # fmt: skip
    (first,) = (tmp_path / "s/cells").glob("*-s0-*")
    before = stamps(first)
    code, out, err = wdprobe(*arguments, "--json")
    assert code == 0, err
    assert "2 cells, 1 of them finished before" in err
    assert json.loads(out)["counts"] == {"finished": 2}
    assert stamps(first) == before


@pytest.mark.parametrize("rates", ["0.05,0.1", pytest.param("0.1,0.05", marks=pytest.mark.slow)])
def test_a_killed_sweep_of_the_first_layout_is_resumed(wdprobe, tmp_path, rates):
    shutil.copytree(OLD, tmp_path / "s")
    record = json.loads((OLD / "sweep.json").read_text())
    kept, half, *_ = (tmp_path / "s/cells" / name for name in record["cells"])
    before = stamps(kept)
    code, out, err = wdprobe(
        "sweep", "--model", "test_efficientnet", "--opt", "momentum", "--momentum", 0, "--method",
        "wd", "--lr", rates, "--weight-decay", 0.1, "--seeds", 2, "--batch-size", 128, "--epochs",
        1, "--every", 1, "--output", "s", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "4 cells, 1 of them finished before" in err
    assert stamps(kept) == before
    assert json.loads((half / "config.json").read_text())["resumed_at"] == [5]
    before, after = (
        (path / "cells" / half.name / "steps.csv").read_text().splitlines()
        for path in (OLD, tmp_path / "s")
    )
    assert after[:6] == before[:6]  # as it was saved
    assert len(after) == 12
    listed = rows(tmp_path / "s/cells.csv")
    assert [row["cell"] for row in listed] == record["cells"]
    assert [row["cell"] for row in json.loads(out)["cells"]] == record["cells"]
    assert {row["status"] for row in listed} == {"finished"}
    assert {path.name for path in (tmp_path / "s").rglob(".lock")} == set()


def test_rows_stand_in_the_order_of_the_grid_while_cells_end_in_another(quick, tmp_path):
    cells, seen = grid(BASE, {"seed": range(4)}), []

    def backwards(missing, folder, listener):
        for cell in reversed(missing):
            yield cell, run_cell(cell, folder)
            seen.append([(r["cell"], r["status"]) for r in rows(tmp_path / "cells.csv")])

    sweep(cells, tmp_path, Told(), runner=backwards)
    for ended, listed in enumerate(seen, start=1):
        wanted = ["waiting"] * (4 - ended) + ["finished"] * ended
        assert listed == [(c.name, w) for c, w in zip(cells, wanted, strict=True)]


def test_cells_that_fail_do_not_stop_the_others(wdprobe, tmp_path, monkeypatch):
    def train(options, listener, lock):
        if options.seed == 1 and failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return quick_train(options, listener, lock)

    monkeypatch.setattr("wd_probe.sweeps.cells.train", train)
    monkeypatch.setattr("wd_probe.sweeps.cells.prepare", lambda options: None)
    failing = True
    code, out, err = wdprobe("sweep", "--seeds", 3, "--output", "s")
    assert code == 1
    assert "cells: 1 failed, 2 finished" in out
    assert "1 of 3 cells failed; the same command tries again:" in err
    assert err.splitlines()[-1].endswith(": CUDA out of memory. Tried to allocate 2 GiB")
    row = rows(tmp_path / "s/cells.csv")[1]
    assert (row["status"], row["error"]) == (
        "failed", "CUDA out of memory. Tried to allocate 2 GiB",
    )  # fmt: skip
    failing = False
    code, out, err = wdprobe("sweep", "--seeds", 3, "--output", "s")
    assert code == 0
    assert "3 cells, 2 of them finished before" in err


def test_a_cell_whose_files_cannot_be_written_has_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "wd_probe.sweeps.cells.train",
        lambda o, told, lock: quick_train(o, told, lock) | {"write_failure": "No space left"},
    )
    monkeypatch.setattr("wd_probe.sweeps.cells.prepare", lambda options: None)
    cells = grid(BASE, {"seed": [0]})
    (summary,) = sweep(cells, tmp_path, Told())
    assert (summary["status"], summary["error"]) == (
        "failed", "files could not be written: No space left",
    )  # fmt: skip
    assert finished(tmp_path / "cells" / cells[0].name) is None


def test_an_interrupted_cell_is_not_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "wd_probe.sweeps.cells.train", lambda o, told, lock: quick_train(o, told, lock)
        | {"status": "interrupted" if o.seed == 2 else "finished"},
    )  # fmt: skip
    monkeypatch.setattr("wd_probe.sweeps.cells.prepare", lambda options: None)
    told = Told()
    with pytest.raises(RunError, match="interrupted: 2 of 4 cells are in"):
        sweep(grid(BASE, {"seed": range(4)}), tmp_path, told)
    assert len(told.started) == 3


# --- one process a cell ---------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from tests.sweeps.conftest import BASE
from wd_probe.sweeps import cells, grid

class Waiting(cells._Quiet):
    def stepped(self, *_):
        print("stepped", flush=True)
        sys.stdin.readline()

cells._Quiet = Waiting
(cell,) = grid.grid(BASE, {"seed": [0]})
print(cells.run_cell(cell, Path(sys.argv[1]))["status"], flush=True)
"""


@pytest.mark.slow
def test_a_cell_of_another_process_is_left_alone(tmp_path):
    (cell,) = grid(BASE, {"seed": [0]})
    own = tmp_path / cell.name
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "stepped\n"
        before = stamps(own)
        refused = run_cell(cell, tmp_path)
        assert refused["status"] == "failed"
        assert refused["error"] == (
            f"another process is writing to {own}; let it end first "
            f"(process {process.pid} on {platform.node()})"
        )
        assert failure(cell, tmp_path, "its worker died", 1.0)["error"] == "its worker died"
        assert stamps(own) == before
        assert process.communicate("\n\n", timeout=60)[0] == "stepped\nfinished\n"
    finally:
        process.kill()
    before = stamps(own)
    for summary in (run_cell(cell, tmp_path), failure(cell, tmp_path, "its worker died", 1.0)):
        assert summary["status"] == "finished"
    assert stamps(own) == before
    assert not (own / "incomplete").exists()


# --- files of strangers ---------------------------------------------------------------------------


def test_spoiled_cells_are_begun_anew_or_named(made, tmp_path):
    options = TrainOptions(command="rop", model="test_convnext", every=1, lr=1e-3)
    (cell,) = grid(options, {})
    own = tmp_path / "cells" / cell.name
    own.mkdir(parents=True)
    config, summary = (
        json.loads((made / f"run/{n}.json").read_text()) for n in ("config", "summary")
    )
    (own / "config.json").write_text(json.dumps(config))
    (own / "summary.json").write_text(json.dumps(summary | {"run": "/etc"}))
    assert finished(own)["run"] == str(own)

    @QUICK
    @given(mistyped(config), mistyped(summary))
    def check(config, summary):
        (own / "config.json").write_text(json.dumps(config))
        (own / "summary.json").write_text(json.dumps(summary))
        done = finished(own)
        if done is not None:
            told([cell], [done])
            settings([cell], [done])[0].values("rate", "mean")
        found = read_sweep(tmp_path)
        assert all(text.isprintable() for _, text in found.without.values())
        groups(found)

    check()


def test_a_cell_that_points_elsewhere_is_not_written_through(tmp_path):
    (cell,) = grid(TrainOptions(model="no_such_model"), {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/summary.json").write_text("kept")
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / cell.name).symlink_to(tmp_path / "mine")
    assert run_cell(cell, tmp_path / "cells")["status"] == "failed"
    assert (tmp_path / "mine/summary.json").read_text() == "kept"
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["summary.json"]


@pytest.mark.usefixtures("quick")
def test_recipes_are_told_apart(tmp_path):
    cells = grid(BASE, {"sched": ["none", "cosine"], "smoothing": [0.0, 0.1]})
    assert len({cell.name for cell in cells}) == 4
    assert cells[0].name == grid(BASE, {"seed": [0]})[0].name, "no recipe changes no name"
    sweep(cells, tmp_path, Told())
    listed = [(row["sched"], row["smoothing"]) for row in rows(tmp_path / "cells.csv")]
    assert listed == [("none", "0.0"), ("none", "0.1"), ("cosine", "0.0"), ("cosine", "0.1")]
