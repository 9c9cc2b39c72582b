import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_cli import rows
from wd_probe import InputError, RunError
from wd_probe.sweeps import cells as sweeps
from wd_probe.sweeps import grid as gridfile
from wd_probe.sweeps import results as best
from wd_probe.sweeps.ledger import Ledger
from wd_probe.training.options import TrainOptions

TINY = ["--model", "test_convnext", "--batch-size", "32", "--steps", "2"]
BASE = TrainOptions(model="test_convnext", batch_size=32, steps=2, method="wd")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Cells this small are faster so, the more where others use the machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Told:
    """A listener that remembers."""

    def __init__(self):
        self.kept, self.started, self.ended = None, [], []

    def begun(self, total, kept):
        self.kept = kept

    def cell_started(self, cell):
        self.started.append(cell.name)

    def cell_ended(self, cell, summary):
        self.ended.append((cell.name, summary["status"]))


def quick_train(options, listener):
    """What `train` does to a folder, without training."""
    (options.output / "config.json").write_text("{}")
    top1 = 1 / (1 + options.weight_decay + options.seed / 100)
    summary = {
        "status": "finished", "steps": 2, "seconds": 0.1, "top1": top1,
        "best10": {"mean": top1}, "chosen": None, "val_top1": None, "run": str(options.output),
    }  # fmt: skip
    (options.output / "summary.json").write_text(json.dumps(summary))
    return summary


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(sweeps, "train", quick_train)
    monkeypatch.setattr(sweeps, "prepare", lambda options: None)


def stamps(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- laws of grids --------------------------------------------------------------------------------

AXES = st.fixed_dictionaries(
    {
        "method": st.lists(st.sampled_from(["baseline", "wd", "rwd", "lpwd"]), min_size=1),
        "lr": st.lists(st.sampled_from([1e-4, 1e-3, 1e-2]), min_size=1, max_size=4),
        "weight_decay": st.lists(st.sampled_from([0.01, 0.1, 1.0]), min_size=1, max_size=4),
        "seed": st.lists(st.integers(0, 3), min_size=1, max_size=4),
        "batch_size": st.lists(st.integers(1, 3), min_size=1, max_size=2),
    }
)


@given(AXES)
def test_every_combination_stands_once_in_a_grid(axes):
    cells = sweeps.grid(BASE, axes)
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


@given(AXES)
def test_settings_gather_seeds_and_nothing_else(axes):
    cells = sweeps.grid(BASE, axes)
    gathered = sweeps.settings(cells, [{"status": "finished", "n": i} for i in range(len(cells))])
    assert sorted(c["n"] for s in gathered for c in s.cells) == list(range(len(cells)))
    for setting in gathered:
        of = [cells[c["n"]].options for c in setting.cells]
        assert len({replace(o, seed=0) for o in of}) == 1
        assert [o.seed for o in of] == sorted(set(axes["seed"]))
    assert len(gathered) * len(set(axes["seed"])) == len(cells)


def test_the_same_options_have_the_same_name_wherever_they_are_kept():
    cell = sweeps.grid(BASE, {"seed": [3]})[0]
    assert cell.name == "test_convnext-digits-adamw-wd-lr0.0001-wd0.01-s3-67d91629"
    for elsewhere in ({"device": "cpu"}, {"output": Path("a")}, {"data_dir": Path("b")}):
        assert sweeps.grid(replace(BASE, **elsewhere), {"seed": [3]})[0].name == cell.name
    for other in ({"batch_size": 31}, {"momentum": 0.8}, {"val_split": 0.1}):
        assert sweeps.grid(replace(BASE, **other), {"seed": [3]})[0].name != cell.name


def test_a_plan_is_the_same_from_text_numbers_and_order():
    plans = [
        gridfile.Plan.of({"method": "wd", "lr": lr, "seeds": 2})
        for lr in (["1e-3", "0.01"], [0.01, 0.001], (0.001, 0.01, 0.001))
    ]
    assert len({plan.key() for plan in plans}) == 1
    assert gridfile.Plan.of({"method": "wd", "lr": [0.01], "seeds": 2}).key() != plans[0].key()
    folders = [
        gridfile.Plan.of({"dataset": d, "data_dir": p}).key()
        for d in ("folder", "torch/cifar10")
        for p in ("a", "b")
    ]
    assert folders[0] != folders[1]
    assert folders[2] == folders[3]


# --- end to end -----------------------------------------------------------------------------------


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


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("columns", [80, 160])
def test_the_table_fits_the_screen(wdprobe, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("wd_probe.cli.console.out._width", columns)
    code, out, _ = wdprobe(
        "sweep", "--model", "convnext_tiny,swin_tiny_patch4_window7_224", "--opt", "adam,momentum",
        "--dataset", "digits,torch/fashion_mnist", "--method", "baseline,wd,lpwd",
        "--weight-decay", "0.01,0.001", "--seeds", "2",
    )  # fmt: skip
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    assert (
        sum("lpwd" in line and "0.001" in line and "99.41 ± 0.70 %" in line for line in lines) == 8
    )
    assert ("validation" in out) == (columns == 160)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["grid.toml", "grid.yaml"])
def test_a_grid_from_a_file_gives_way_to_the_command_line(wdprobe, tmp_path, name):
    text = {
        "grid.toml": 'method = ["wd", "rwd"]\nlr = [1e-3, 1]\nsteps = 2\nbatch-size = [8, 16]\n',
        "grid.yaml": "method: [wd, rwd]\nlr: [1e-3, 1]\nsteps: 2\nbatch_size: [8, 16]\n",
    }[name]
    (tmp_path / name).write_text(text)
    code, out, err = wdprobe("sweep", name, "--method", "pwd", "--seeds", 3, "--json")
    assert code == 0, err
    result = json.loads(out)
    found = {(c["method"], c["lr"], c["batch_size"], c["seed"]) for c in result["cells"]}
    assert found == {("pwd", lr, b, s) for lr in (1e-3, 1.0) for b in (8, 16) for s in (0, 1, 2)}
    assert {c["opt"] for c in result["cells"]} == {"adam"}
    assert [b["batch_size"] for b in result["best"]] == [8, 16]
    record = json.loads((tmp_path / result["run"] / "sweep.json").read_text())
    assert record["axes"]["lr"] == [0.001, 1.0]
    assert record["options"]["steps"] == 2


def test_more_options_of_the_optimizer_are_an_axis_too(quick, wdprobe, tmp_path, monkeypatch):
    monkeypatch.setattr("wd_probe.cli.console.out._width", 80)
    (tmp_path / "grid.toml").write_text(
        'method = "wd"\nopt_kwargs = ["", "fused=True betas=(0.8,0.9) eps=1e-6"]\n'
    )
    code, out, _ = wdprobe("sweep", "grid.toml", "--output", "s")
    assert code == 0
    assert "R_op" in out  # the last column
    found = {r["opt_kwargs"]: r["cell"] for r in rows(tmp_path / "s/cells.csv")}
    assert set(found) == {"", "fused=True betas=(0.8,0.9) eps=1e-6"}
    assert len(set(found.values())) == 2


# --- killed, failed, diverged ---------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
from pathlib import Path
from tests import test_sweeps as t
from wd_probe.sweeps import cells as sweeps

count = 0

def dying_train(options, listener):
    global count
    count += 1
    if count == 3 and moment == "begun":
        os.kill(os.getpid(), signal.SIGKILL)
    if count == 3 and moment == "summary torn":
        (options.output / "summary.json").write_text('{"status": "fini')
        os.kill(os.getpid(), signal.SIGKILL)
    summary = t.quick_train(options, listener)
    if count == 3 and moment == "before the weights":
        os.kill(os.getpid(), signal.SIGKILL)
    (options.output / "model.safetensors").write_text("weights")
    return summary

sweeps.train, sweeps.prepare = dying_train, lambda options: None
for moment in sys.argv[1:]:
    child = os.fork()
    if not child:
        sweeps.sweep(sweeps.grid(t.BASE, {"seed": range(5)}), Path(moment), t.Told())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end=" ")
"""


def test_a_killed_sweep_goes_on_at_the_broken_cell(tmp_path, monkeypatch):
    moments = ("begun", "summary torn", "before the weights")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *moments],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "-9 -9 -9 "

    def whole_train(options, listener):
        assert {p.name for p in options.output.iterdir()} == {"incomplete"}
        (options.output / "model.safetensors").write_text("weights")
        return quick_train(options, listener)

    monkeypatch.setattr(sweeps, "train", whole_train)
    monkeypatch.setattr(sweeps, "prepare", lambda options: None)
    cells = sweeps.grid(BASE, {"seed": range(5)})
    for moment in moments:
        folder, told = tmp_path / moment, Told()
        done = [folder / "cells" / cell.name for cell in cells[:2]]
        before = [stamps(path) for path in done]
        summaries = sweeps.sweep(cells, folder, told)
        assert told.kept == 2
        assert told.started == [cell.name for cell in cells[2:]]
        assert [stamps(path) for path in done] == before
        assert len(summaries) == 5
        assert [r["cell"] for r in rows(folder / "cells.csv")] == [c.name for c in cells]
        assert {r["status"] for r in rows(folder / "cells.csv")} == {"finished"}
        assert len(list(folder.glob("cells/*/model.safetensors"))) == 5


def start(tmp_path, *arguments, **env):
    def prepare():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under nohup and in CI

    return subprocess.Popen(
        [sys.executable, "-c", "from wd_probe.cli.main import main; main()", *map(str, arguments)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=prepare, env={**os.environ, **env},
    )  # fmt: skip


def wait_for(something, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := something():
            return found
        time.sleep(0.05)
    raise AssertionError("it never came")


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
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
        assert process.returncode == 1
        assert "interrupted: 1 of 2 cells are in s; the same command goes on with the rest" in err
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


def test_cells_that_fail_do_not_stop_the_others(wdprobe, tmp_path, monkeypatch):
    def train(options, listener):
        if options.seed == 1 and failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return quick_train(options, listener)

    monkeypatch.setattr(sweeps, "train", train)
    monkeypatch.setattr(sweeps, "prepare", lambda options: None)
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
        sweeps, "train", lambda o, told: quick_train(o, told) | {"write_failure": "No space left"}
    )
    monkeypatch.setattr(sweeps, "prepare", lambda options: None)
    cells = sweeps.grid(BASE, {"seed": [0]})
    (summary,) = sweeps.sweep(cells, tmp_path, Told())
    assert (summary["status"], summary["error"]) == (
        "failed", "files could not be written: No space left",
    )  # fmt: skip
    assert sweeps._finished(tmp_path, cells[0]) is None


def test_an_interrupted_cell_is_not_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sweeps, "train", lambda o, told: quick_train(o, told)
        | {"status": "interrupted" if o.seed == 2 else "finished"},
    )  # fmt: skip
    monkeypatch.setattr(sweeps, "prepare", lambda options: None)
    told = Told()
    with pytest.raises(RunError, match="interrupted: 2 of 4 cells are in"):
        sweeps.sweep(sweeps.grid(BASE, {"seed": range(4)}), tmp_path, told)
    assert len(told.started) == 3


def test_a_ledger_that_cannot_be_written_holds_nothing_up(tmp_path):
    with pytest.warns(UserWarning, match="is not written"):
        ledger = Ledger(tmp_path / "nowhere" / "cells.csv", [{"a": 1}])
    ledger.update(0, {"a": 2})  # says no more


def test_best_settings_put_those_that_diverged_last():
    cells = sweeps.grid(BASE, {"weight_decay": [0.1, 0.2, 0.3], "seed": [0, 1]})
    top1 = {0.1: (0.5, 0.6), 0.2: (0.9, None), 0.3: (0.6, 0.7)}
    summaries = [
        {
            "status": "diverged" if value is None else "finished",
            "best10": {"mean": value},
            "chosen": None if value is None else {"val_top1": 1 - value, "top1": value},
        }
        for cell in cells
        for value in [top1[cell.options.weight_decay][cell.options.seed]]
    ]
    (by_validation,) = best.best_settings(sweeps.settings(cells, summaries))
    assert by_validation.basis == "validation"
    assert by_validation.setting.weight_decay == 0.1
    assert by_validation.top1()[0] == pytest.approx(0.55)
    for summary in summaries:
        summary["chosen"] = None
    (by_test,) = best.best_settings(sweeps.settings(cells, summaries))
    assert (by_test.basis, by_test.setting.weight_decay) == ("test", 0.3)
    assert by_test.record()["top1"] == pytest.approx({"mean": 0.65, "std": 0.1 / 2**0.5})


# --- bad input ------------------------------------------------------------------------------------

FILES = {
    "key.toml": "weight_decya = 0.1\n",
    "kind.toml": 'lr = ["fast"]\n',
    "whole.yaml": "steps: 2.5\n",
    "flag.yaml": "amp: 1\n",
    "choice.yaml": "scale: max3\n",
    "text.yaml": "model: [3]\n",
    "broken.toml": "lr = [1\n",
    "broken.yaml": "lr: [1\n",
    "list.yaml": "- 1\n",
    "grid.json": "{}",
    "none.yaml": "lr: []\n",
}
#: What was wrong: the arguments, what the one line says.
BAD = {
    "empty list": (["--lr", ""], "the grid is empty: lr has no values"),
    "no seeds": (["--seeds", "0"], "the grid is empty: seed has no values"),
    "number": (["--lr", "1e-3,fast"], "lr must be a number, got 'fast'"),
    "method": (["--method", "wd,lwpd"], "unknown method 'lwpd'; choose from own, baseline"),
    "opt": (["--opt", "adam,adammw"], "unknown optimizer 'adammw'; did you mean"),
    "model": (["--model", "test_convnext,test_convnxt"], "unknown model 'test_convnxt'"),
    "dataset": (["--dataset", "digits,torch/cifar10", "--data-dir", "."], "dataset 'torch/cifar10' cannot be read from ."),  # noqa: E501
    "too strong": (["--method", "wd,lpwd", "--weight-decay", "1,7", "--lr", "0.1"], "lpwd with rate 7 would take off 1.4 times layer 11"),  # noqa: E501
    "many": (["--seeds", "10001"], "the grid has 10,001 cells; --yes runs them all the same"),
    "very many": (["--seeds", "1000000000", "--lr", "1,2"], "the grid has 2,000,000,000 cells"),
    "output": (["--output", "file/run"], "output folder file/run cannot be written to (Not a directory)"),  # noqa: E501
    "resources": (["--cpus-per-cell", "2"], "--cpus-per-cell and --gpus-per-cell need --ray"),
    "cpus": (["--ray", "--cpus-per-cell", "0"], "--cpus-per-cell must be at least 1, got 0"),
    "gpus": (["--ray", "--gpus-per-cell", "-1"], "--gpus-per-cell must be a finite number ≥ 0"),
    "no file": (["nothing.toml"], "grid nothing.toml cannot be read (No such file or directory)"),
    "suffix": (["grid.json"], "grid.json is no grid: its name must end in .toml, .yaml or .yml"),
    "key": (["key.toml"], "grid key.toml: unknown key 'weight_decya'; did you mean weight_decay"),
    "kind": (["kind.toml"], "grid kind.toml: lr must be a number, got 'fast'"),
    "whole": (["whole.yaml"], "grid whole.yaml: steps must be a whole number, got 2.5"),
    "flag": (["flag.yaml"], "grid flag.yaml: amp must be true or false, got 1"),
    "choice": (["choice.yaml"], "grid choice.yaml: scale must be one of eq9, max2, mean, got"),
    "text": (["text.yaml"], "grid text.yaml: model must be a text, got 3"),
    "toml": (["broken.toml"], "grid broken.toml is damaged: "),
    "yaml": (["broken.yaml"], "grid broken.yaml is damaged: while parsing a flow sequence"),
    "list": (["list.yaml"], "grid list.yaml must hold keys and values"),
    "empty in file": (["none.yaml"], "the grid is empty: lr has no values"),
    "address": (["--ray-address", "somewhere"], "unknown Ray address 'somewhere'; use HOST:PORT"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_before_the_first_cell(wdprobe, tmp_path, case):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "file").write_text("")
    arguments, message = BAD[case]
    code, out, err = wdprobe("sweep", *TINY, *arguments)
    assert message in err
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not list(tmp_path.glob("**/config.json"))


@pytest.mark.usefixtures("quick")
def test_another_grids_folder_is_refused(wdprobe, tmp_path):
    assert wdprobe("sweep", "--lr", "1e-3,1e-2", "--output", "s")[0] == 0
    before = stamps(tmp_path)
    code, out, err = wdprobe("sweep", "--lr", "1e-3", "--seeds", 2, "--output", "s")
    assert (code, out) == (2, "")
    assert (
        "error: s holds another grid: lr is 0.001, 0.01 there and 0.001 here; "
        "seed is 0 there and 0, 1 here; choose another --output" in err
    )
    assert stamps(tmp_path) == before
    assert wdprobe("sweep", "--lr", "1e-2,1e-3,1e-2", "--device", "cpu", "--output", "s")[0] == 0
    (tmp_path / "s/sweep.json").write_text("{")
    code, _, err = wdprobe("sweep", "--lr", "1e-3,1e-2", "--output", "s")
    assert code == 2
    assert "s/sweep.json is damaged" in err


@pytest.mark.usefixtures("quick")
def test_two_processes_do_not_write_to_one_folder(wdprobe, tmp_path):
    plan = gridfile.Plan.of({"method": "lpwd", "opt": "adam"})
    with gridfile.Claim(tmp_path / "s", plan, plan.cells(False)):
        code, _, err = wdprobe("sweep", "--output", "s")
        assert code == 2
        assert "another sweep is writing to s; let it end first" in err
    assert wdprobe("sweep", "--output", "s")[0] == 0


@pytest.mark.usefixtures("quick")
def test_many_cells_run_with_consent(monkeypatch, tmp_path):
    monkeypatch.setattr(sweeps, "MANY", 2)
    cells = sweeps.grid(BASE, {"seed": range(3)})
    with pytest.raises(InputError, match="the grid has 3 cells; --yes runs them all the same"):
        sweeps.sweep(cells, tmp_path, Told())
    assert len(sweeps.sweep(cells, tmp_path, Told(), consent=True)) == 3


# --- Ray ------------------------------------------------------------------------------------------


def test_without_ray(wdprobe, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = wdprobe("sweep", *TINY, "--ray")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "Ray is not installed; pip install 'wd-probe[ray]', or leave out --ray" in err


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_unreachable_address_is_told_soon(wdprobe, monkeypatch, scheme, answer):
    pytest.importorskip("ray")
    monkeypatch.setattr("wd_probe.sweeps.ray._SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        if answer is None:
            server.close()
            reason = "Connection refused"
        elif answer:

            def reply():
                with server.accept()[0] as peer:
                    peer.sendall(answer)

            threading.Thread(target=reply).start()
            reason = "what answers there is not Ray"
        else:
            reason = "timed out"
        begun = time.monotonic()
        code, out, err = wdprobe("sweep", *TINY, "--ray-address", address)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"no Ray cluster can be reached at {address} ({reason}); start one with" in err
    assert time.monotonic() - begun < 20


@pytest.mark.usefixtures("quick")
def test_nothing_of_ray_is_imported_unless_asked_for(wdprobe, monkeypatch):
    asked = []

    class Watch:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "ray":
                asked.append(name)

    monkeypatch.setattr(sys, "meta_path", [Watch(), *sys.meta_path])
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray")
    assert wdprobe("sweep")[0] == 0
    assert asked == []
    for folder in ("wd_probe", "cli"):
        for path in (Path(__file__).parent.parent / folder).rglob("*.py"):
            assert not re.search(r"^(import|from) ray\b", path.read_text(), re.MULTILINE), path


def workers(mark):
    """Ids of the processes that run a cell for the test with this mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().startswith(b"ray::_run") and (
                f"WD_PROBE_TEST={mark}".encode() in (process / "environ").read_bytes()
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found


RAY = ["sweep", "--model", "test_convnext", "--batch-size", 32, "--ray", "--output", "s"]


@pytest.mark.slow
def test_ray_runs_the_same_cells_and_outlives_a_killed_worker(tmp_path, wdprobe):
    pytest.importorskip("ray")
    mark, grid = uuid.uuid4().hex, ["--steps", 40, "--seeds", 4, "--every", 10]
    process = start(tmp_path, *RAY, *grid, "--json", WD_PROBE_TEST=mark)
    try:
        wait_for(lambda: list(tmp_path.glob("s/cells/*/config.json")) and workers(mark))
        os.kill(workers(mark)[0], signal.SIGKILL)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert json.loads(out)["counts"] == {"finished": 4}
    assert "cell 4/4 · 0 running · 0 s left" in err
    assert len(err.splitlines()) < 12
    configs = [json.loads(p.read_text()) for p in (tmp_path / "s/cells").glob("*/config.json")]
    assert [config["threads"] for config in configs] == [1] * 4
    assert sorted(r["status"] for r in rows(tmp_path / "s/cells.csv")) == ["finished"] * 4
    assert not workers(mark)
    before = stamps(tmp_path / "s/cells")
    code, _, err = wdprobe(*[a for a in RAY if a != "--ray"], *grid)
    assert code == 0
    assert "4 cells, 4 of them finished before" in err
    assert stamps(tmp_path / "s/cells") == before


@pytest.mark.slow
def test_ctrl_c_ends_what_runs_on_ray(tmp_path):
    pytest.importorskip("ray")
    mark = uuid.uuid4().hex
    process = start(tmp_path, *RAY, "--epochs", 1000, "--seeds", 3, WD_PROBE_TEST=mark)
    try:
        wait_for(lambda: list(tmp_path.glob("s/cells/*/steps.csv")) and workers(mark))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1, err
    assert "interrupted: 0 of 3 cells are in s; the same command goes on with the rest" in err
    wait_for(lambda: not workers(mark), 20)


@pytest.mark.slow
def test_a_cell_larger_than_any_machine_is_refused(tmp_path, wdprobe):
    pytest.importorskip("ray")
    process = start(tmp_path, *RAY, "--cpus-per-cell", 1000)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "a cell wants 1000 CPUs and 0 GPUs, and no machine has them: the most are" in err
