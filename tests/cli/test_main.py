import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from tests.small import FAST


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.fixture
def damaged_files(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "other.pt")
    (tmp_path / "broken.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:200])
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))
    torch.save(Evil(), tmp_path / "evil2.pt")
    (tmp_path / "file").write_text("")


ROP = ["rop", *FAST, "--steps", "1"]


#: What was wrong: the arguments, what the one line says, the exit code.
BAD = {
    "model": ([*ROP, "--model", "convnext_tinny"], "unknown model 'convnext_tinny'; did you mean convnext_tiny", 2),  # noqa: E501
    "no pair": ([*ROP, "--opt-kwargs", "fused"], "--opt-kwargs wants key=value, got 'fused'", 2),
    "argument of its own": (
        [*ROP, "--opt-kwargs", "weight_decay=1"],
        "--opt-kwargs weight_decay=... is given by --weight-decay", 2,
    ),
    "no such argument": (
        [*ROP, "--opt-kwargs", "speed=9"], "adamw cannot be built here: TypeError: ", 2
    ),
    "opt": ([*ROP, "--opt", "adammw"], "unknown optimizer 'adammw'; did you mean", 2),
    "dataset": ([*ROP, "--dataset", "cifar10"], "unknown dataset 'cifar10'; did you mean digits, folder or torch/cifar10", 2),  # noqa: E501
    "torch dataset": ([*ROP, "--dataset", "torch/nothing"], "timm knows no dataset 'torch/nothing'", 2),  # noqa: E501
    "data dir": ([*ROP, "--dataset", "torch/cifar10", "--data-dir", "nowhere"], "data folder nowhere does not exist", 2),  # noqa: E501
    "no data": ([*ROP, "--dataset", "torch/cifar10", "--data-dir", "."], "cannot be read from . (Dataset not found", 2),  # noqa: E501
    "folder": ([*ROP, "--dataset", "folder"], "--dataset folder needs --data-dir", 2),
    "missing checkpoint": ([*ROP, "--checkpoint", "no.pt"], "checkpoint no.pt does not exist", 2),
    "other checkpoint": ([*ROP, "--checkpoint", "other.pt"], "is of another model: tensors", 2),
    "keys": ([*ROP, "--checkpoint", "other.pt"], "1 unexpected (a)", 2),
    "truncated": ([*ROP, "--checkpoint", "broken.pt"], "broken.pt is damaged or no checkpoint", 2),
    "truncated safetensors": ([*ROP, "--checkpoint", "broken.safetensors"], "is damaged or no checkpoint", 2),  # noqa: E501
    "code": ([*ROP, "--checkpoint", "evil.pt"], "holds more than weights and is refused", 2),
    "code, new format": ([*ROP, "--checkpoint", "evil2.pt"], "holds more than weights and is refused", 2),  # noqa: E501
    "c": ([*ROP, "--weight-decay", "2e4"], "a step would take off 2 times the weight", 2),
    "weight decay": ([*ROP, "--weight-decay", "-1"], "--weight-decay must be a finite number ≥ 0, got -1.0", 2),  # noqa: E501
    "lr": ([*ROP, "--lr", "nan"], "--lr must be a finite number > 0, got nan", 2),
    "batch size": ([*ROP, "--batch-size", "0"], "--batch-size must be at least 1, got 0", 2),
    "no decay": ([*ROP, "--weight-decay", "0"], "nothing would be penalized", 2),
    "convention": ([*ROP, "--convention", "rate"], "--convention rate and --scale need a --method", 2),  # noqa: E501
    "scale": ([*ROP, "--scale", "mean"], "--convention rate and --scale need a --method", 2),
    "lpwd": ([*ROP, "--method", "lpwd", "--weight-decay", "7", "--lr", "0.1"], "lpwd with rate 7 would take off 1.4 times layer 11 of 11 (head), which flips signs; the largest allowed rate here is 5", 2),  # noqa: E501
    "validation": (["train", *FAST, "--val-split", "1"], "--val-split must be a share below 1", 2),
    "samples": (["train", *FAST, "--train-samples", "5000"], "1,437 training images left beside the validation split; 5,000 are asked for", 2),  # noqa: E501
    "every": (["train", *FAST, "--every", "-1"], "--every must be at least 0, got -1", 2),
    "cuda": ([*ROP, "--device", "cuda"], "device cuda is asked for, and this machine has none", 2),
    "output": ([*ROP, "--output", "file/run"], "output folder file/run cannot be written to", 2),
    "size": (["rop", "--model", "inception_v3", "--steps", "1"], "cannot take 32×32 images", 2),
    "layers": (["layers", "convnext_tinny"], "did you mean convnext_tiny", 2),
    "rate": (["layers", "--weight-decay", "inf"], "--weight-decay must be a finite number", 2),
    "no runs": (["dashboard", "nowhere"], "nowhere is no folder; run `wdprobe rop` first", 2),
    "pretrained": ([*ROP, "--pretrained", "--checkpoint", "other.pt"], "exclude each other", 2),
}  # fmt: skip


@pytest.mark.usefixtures("damaged_files")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line(wdprobe, tmp_path, case):
    if case == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments, message, expected = BAD[case]
    code, out, err = wdprobe(*arguments)
    assert message in err
    assert code == expected
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "evil").exists()


def test_output_fits_80_columns(wdprobe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["rop", *FAST, "--steps", "3", "--output", "r"], ["layers"]):
        code, out, _ = wdprobe(*arguments)
        assert code == 0
        assert max(map(len, out.splitlines())) <= 80


def test_help_loads_no_torch():
    code = (
        "import sys; sys.argv = ['wdprobe', '--help']\n"
        "from wd_probe.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'pydantic', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert "rop" in done.stdout
    code = "import sys, wd_probe; wd_probe.opposing; print('torch' in sys.modules)"
    twin = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert twin.stdout == "True\n"


def completed(words):
    """What a shell is told of the last of some words, and whether torch was loaded for it."""
    code = (
        "import sys; sys.argv = ['wdprobe']\n"
        "from wd_probe.cli.main import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    told = {"_WDPROBE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["wdprobe", *words])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, **told, "COMP_CWORD": str(len(words))},
    )  # fmt: skip
    *found, torch_loaded = done.stdout.split()
    assert torch_loaded == "False", done.stderr
    return found


def test_a_shell_completes_commands_options_and_values():
    assert {"rop", "train", "watch"} <= set(completed([""]))
    assert completed(["rop", "--met"]) == ["--method"]
    assert completed(["train", "--method", "lp"]) == ["lpwd"]


def test_version(wdprobe):
    assert wdprobe("--version")[1] == "wdprobe 0.1.0\n"


#: What is wrong, and needs no torch to be found out.
MISTAKES = {
    "--lr must be a finite number > 0, got -1.0": ["rop", "--lr", "-1"],
    "--steps must be at least 1, got 0": ["train", "--steps", "0"],
    "give MODEL or --model, not both": ["rop", "resnet18", "--model", "resnet18"],
    "leave out --model": ["rop", "--resume", "run", "resnet18"],
    "--opt-kwargs wants key=value, got 'fused'": ["train", "--opt-kwargs", "fused"],
    "--convention rate and --scale need a --method": ["rop", "--scale", "mean"],
    "taken holds a run already; choose another --output": ["rop", "--output", "taken"],
    "nowhere does not exist": ["rop", "--resume", "nowhere"],
    "--resume takes every option from run/config.json; leave out --lr": [
        "train", "--resume", "run", "--lr", "1",
    ],
    "--by-steps must be at least 1, got 0": ["zeroshot", "--by-steps", "0"],
    "--run brings its own model; give --model or --run": ["zeroshot", "--run", "a", "--model", "b"],
    "taken/2 holds a run already": [
        "zeroshot", "--run", "taken", "--run", "taken/2", "--output", "taken",
    ],
    "nothing is no run folder: it has no config.json": ["zeroshot", "--run", "nothing"],
    "image folder nothing does not exist": ["zeroshot", "--images", "nothing", "--pretrained"],
    "checkpoint nothing.pt does not exist": ["rop", "--checkpoint", "nothing.pt"],
    "data folder nothing does not exist": ["rop", "--dataset", "folder", "--data-dir", "nothing"],
    "--weight-decay must be a finite number ≥ 0, got inf": ["layers", "--weight-decay", "inf"],
    "give either --opt NAME or --all": ["audit"],
    "--epochs must be at least 1, got 0": ["reproduce", "table1", "--epochs", "0"],
    "--lr takes numbers with commas between, got 'fast'": ["reproduce", "table1", "--lr", "fast"],
    "unknown method 'lwpd'": ["sweep", "--method", "wd,lwpd"],
    "lr must be a number, got 'fast'": ["sweep", "--lr", "fast"],
    "grid nothing.toml cannot be read": ["sweep", "nothing.toml"],
    "the grid has 10,001 cells": ["sweep", "--seeds", "10001"],
    "s holds another grid: method is wd there and lpwd here": ["sweep", "--output", "s"],
}  # fmt: skip
IN_TURN = """
import contextlib, io, json, sys
from wd_probe.cli.main import main
for arguments in json.load(sys.stdin):
    sys.argv, told = ["wdprobe", *arguments], io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.suppress(SystemExit):
        main()
    print(json.dumps([told.getvalue(), "torch" in sys.modules]))
"""


def test_mistakes_that_need_no_torch_are_told_without_it(tmp_path):
    for folder in ("taken", "taken/2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").touch()
    (tmp_path / "s").mkdir()
    (tmp_path / "s/sweep.json").write_text('{"axes": {"opt": ["adam"], "method": ["wd"]}}')
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN], cwd=tmp_path, capture_output=True, text=True, check=True,
        input=json.dumps([*MISTAKES.values()]),
    )  # fmt: skip
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for (message, arguments), (line, loaded) in zip(MISTAKES.items(), told, strict=True):
        assert message in line, arguments
        assert line.count("\n") == 1
        assert not loaded, arguments


LONG = "x" * 5000
#: Every place where a text of the user's is taken, with more than anyone wants to see again.
LONG_TEXTS = [
    *(["rop", *FAST, flag, LONG] for flag in ("--model", "--dataset", "--opt", "--opt-kwargs",
      "--checkpoint", "--output", "--resume")),
    ["rop", *FAST, "--dataset", "torch/" + LONG],
    ["rop", *FAST, "--dataset", "torch/cifar10", "--data-dir", LONG],
    ["rop", *FAST, "--dataset", "folder", "--data-dir", LONG],
    ["rop", *FAST, "--opt-kwargs", f"{LONG}=1"],
    ["rop", *FAST, "--opt-kwargs", f"lr={LONG}"],
    ["train", "--resume", "run", "--model", LONG],
    *(["zeroshot", flag, LONG] for flag in ("--model", "--run", "--checkpoint", "--images")),
    *(["sweep", flag, f"a,{LONG}"] for flag in ("--method", "--lr", "--model", "--opt")),
    ["sweep", LONG],
    ["sweep", f"{LONG}.toml"],
    ["sweep", "--ray-address", LONG],
    ["sweep", "--output", LONG],
    *(["reproduce", "fig1", flag, LONG] for flag in ("--method", "--lr", "--model", "--dataset",
      "--opt", "--output")),
    ["audit", "--opt", LONG],
    ["audit", "--opt", f"torch.{LONG}"],
    ["audit", "--opt", f"{LONG}.SGD"],
    ["audit", "--opt", "adam", "--model", LONG],
    ["audit", "--opt", "adam", "--opt-kwargs", f"{LONG}=1"],
    ["layers", "--model", LONG],
    ["report", LONG],
    ["report", ".", "--output", LONG],
    ["compare", LONG, "."],
    ["dashboard", LONG],
]  # fmt: skip


@pytest.mark.parametrize("arguments", LONG_TEXTS, ids=lambda of: "-".join(of).replace(LONG, "X"))
def test_what_is_told_of_a_long_text_is_short(wdprobe, arguments):
    code, out, err = wdprobe(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert len(err) < 400
