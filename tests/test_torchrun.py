"""`wdprobe` under `torchrun`, against itself in one process."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from wd_probe.cli import main as cli

from wd_probe import InputError, ranks
from wd_probe.training.loop import Score, evaluate

WDPROBE = shutil.which("wdprobe", path=os.path.dirname(sys.executable))
ROP = ["rop", "--model", "test_convnext", "--lr", "1e-3", "--device", "cpu", "--epochs", "1"]


def command(processes, *arguments):
    start = [WDPROBE]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start = [*torchrun, "--nproc-per-node", str(processes), "--no-python", "--", WDPROBE]
    return [*start, *map(str, arguments)]


def wdprobe(processes, *arguments):
    return subprocess.run(
        command(processes, *arguments),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def measured(processes, *arguments):
    done = wdprobe(processes, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # one process alone has spoken


def steps(folder):
    with (folder / "steps.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, measured(1, *ROP, "--output", folder)


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one(one, tmp_path):
    folder, alone = one
    both = measured(2, *ROP, "--output", tmp_path / "run")
    assert {k: type(v) for k, v in both.items()} == {k: type(v) for k, v in alone.items()}
    assert (both["steps"], both["penalized"]) == (alone["steps"], alone["penalized"])
    assert both["top1"] == pytest.approx(alone["top1"], abs=1 / 360)
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    first, again = steps(folder), steps(tmp_path / "run")
    assert [row["step"] for row in again] == [row["step"] for row in first]
    # later the sums of two halves, rounded otherwise, may have led elsewhere by a weight or two
    assert [row["opposing"] for row in again[:5]] == [row["opposing"] for row in first[:5]]
    assert int(first[0]["opposing"]) > 0
    written = {path.name.split(".")[0] for path in (tmp_path / "run").iterdir()}
    assert written == {path.name.split(".")[0] for path in folder.iterdir()}


@pytest.mark.slow
def test_a_scan_is_split_over_the_processes(one, tmp_path):
    given = ["zeroshot", "--run", one[0], "--steps", "5", "--by", "layer", "--by-steps", "4"]
    alone = measured(1, *given, "--output", tmp_path / "alone")
    three = measured(3, *given, "--output", tmp_path / "three")
    for whole, split in zip(alone["curve"], three["curve"], strict=True):
        assert split["top1"] == pytest.approx(whole["top1"], abs=1e-12)
        assert split["agreement"] == pytest.approx(whole["agreement"], abs=1e-12)
        assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    lives = [{part["name"]: part["half_life"] for part in run["parts"]} for run in (alone, three)]
    assert lives[1] == pytest.approx(lives[0], nan_ok=True, abs=0.01)
    bent = [[layer["distortion"] for layer in run["distortion"]] for run in (alone, three)]
    assert bent[1] == pytest.approx(bent[0], rel=1e-3)
    assert three["images"] == alone["images"] == 360


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_which_then_goes_on(tmp_path):
    """What was measured is kept; resumed on as many processes it ends as if none had died."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    given = [*ROP, "--epochs", "20", "--recovery-interval", "5"]
    measured(2, *given, "--output", whole)
    process = subprocess.Popen(
        command(2, *given, "--output", broken),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (broken / "recovery.pt").exists():
        time.sleep(0.05)
    found = subprocess.run(
        ["pgrep", "-f", f"bin/wdprobe.*{broken}"], capture_output=True, text=True
    )
    others = {int(pid) for pid in found.stdout.split()} - {process.pid}
    ranks_of = {_environment(pid).get("RANK"): pid for pid in others}
    os.kill(ranks_of["1"], signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    told = " ".join(told.split())
    assert f"`wdprobe rop --resume {broken}` goes on from its last save; under torchrun too" in told
    summary = json.loads((broken / "summary.json").read_text())
    assert summary["status"] in ("failed", "interrupted")
    assert len(steps(broken)) == summary["steps"] > 0
    alone = shutil.copytree(broken, tmp_path / "alone")
    assert wdprobe(2, "rop", "--resume", broken).returncode == 0
    for name in ("steps.csv", "layers.csv", "model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert measured(1, "rop", "--resume", alone)["status"] == "finished"
    assert len(steps(alone)) == 440


def _environment(pid):
    with open(f"/proc/{pid}/environ") as file:
        return dict(entry.partition("=")[::2] for entry in file.read().split("\0"))


def test_other_commands_are_for_one_process(monkeypatch, capsys):
    for name, value in (("TORCHELASTIC_RUN_ID", "1"), ("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["wdprobe", "sweep", "--model", "test_convnext"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "wdprobe: rank 1: error: torchrun is for rop, train, watch, zeroshot; start `wdprobe "
        "sweep` without it, with --ray for many machines\n"
    )


def test_batches_that_do_not_divide(monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 3)
    ranks.check_divides(63)
    with pytest.raises(InputError, match=r"64 images does not divide over 3 processes.*try 63$"):
        ranks.check_divides(64)
    with pytest.raises(InputError, match=r"2 images is too small for 3 processes$"):
        ranks.check_divides(2)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_image_is_in_one_share(monkeypatch, processes):
    monkeypatch.setattr(ranks, "size", lambda: processes)
    for count in (0, 1, 4, 7, 360):
        seen = []
        for rank in range(processes):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            seen += range(*ranks.share(10, 10 + count))
        assert seen == list(range(10, 10 + count))


def test_a_score_of_no_images():
    model = nn.Linear(2, 2)
    assert str(evaluate(model, [])) == str(Score(float("nan"), float("nan")))
    labels = torch.tensor([0, 1, 1])
    whole = evaluate(model, [(torch.eye(3, 2), labels)])
    parted = evaluate(model, [(torch.eye(3, 2)[:1], labels[:1]), (torch.eye(3, 2)[1:], labels[1:])])
    assert parted.top1 == whole.top1
    assert parted.loss == pytest.approx(whole.loss)
