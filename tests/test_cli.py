import contextlib
import csv
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from wd_probe.training.options import TrainOptions
from wd_probe.training.train import prepare

FAST = ["--model", "test_convnext", "--batch-size", "32"]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rop_end_to_end(wdprobe, tmp_path):
    code, out, err = wdprobe("rop", *FAST, "--steps", 14, "--lr", 1e-3, "--output", "run", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert set(result) >= {
        "command", "model", "method", "optimizer", "steps", "penalized", "rate", "mass",
        "flip_rate", "layers", "top1", "run",
    }  # fmt: skip
    assert (result["command"], result["method"], result["optimizer"]) == ("rop", "wd", "adamw")
    assert result["steps"] == 14
    assert set(result["rate"]) == set(result["mass"]) == {"mean", "max", "last"}
    assert 0 < result["rate"]["mean"] <= result["rate"]["max"] < 1
    assert all(set(x) >= {"index", "name", "rate", "mass"} for x in result["layers"])
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith("events")) == [
        "config.json", "epochs.csv", "figures", "layers.csv", "model.safetensors", "profile.csv",
        "steps.csv", "summary.json", "tensors.csv",
    ]  # fmt: skip
    assert len(list((run / "figures").glob("*.png"))) == 3
    assert json.loads((run / "summary.json").read_text()) == result
    config = json.loads((run / "config.json").read_text())
    assert config["c"].startswith("lr*rate")
    assert {"torch", "timm", "wd-probe"} <= set(config["versions"])
    steps = rows(run / "steps.csv")
    assert [int(r["step"]) for r in steps] == list(range(1, 15))
    mean = sum(float(r["rate"]) for r in steps) / 14
    assert result["rate"]["mean"] == pytest.approx(mean)
    assert len(rows(run / "layers.csv")) == 14 * len(result["layers"])
    assert set(load_file(run / "model.safetensors"))


def test_tensorboard_gets_few_tags_and_all_kinds(wdprobe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert wdprobe("rop", *FAST, "--steps", 4, "--output", "run")[0] == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = events.Tags()
    scalars = set(tags["scalars"])
    assert {"R_op/rate", "R_op/mass", "R_op/flip_rate", "train/loss", "test/top1"} <= scalars
    assert any(tag.startswith("R_op by stage/1 stem") for tag in scalars)
    assert len(scalars) < 20
    assert len(tags["images"]) == 3
    assert tags["tensors"] == ["summary/text_summary"]
    assert [e.step for e in events.Scalars("R_op/rate")] == [1, 2, 3, 4]
    assert (tmp_path / "run").glob("events.out.tfevents.*")


def test_a_seeded_cpu_run_repeats_exactly(wdprobe, tmp_path):
    for name in ("a", "b"):
        assert wdprobe("rop", *FAST, "--steps", 6, "--seed", 3, "--output", name)[0] == 0
    for file in ("steps.csv", "layers.csv", "tensors.csv", "profile.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "options",
    [
        ["--opt", "momentum", "--method", "wd", "--lr", "0.05"],
        ["--opt", "adam", "--method", "wd", "--convention", "rate", "--filter-bias-and-bn"],
        ["--filter-bias-and-bn", "--every", "2"],
        ["--amp", "--channels-last"],
        ["--amp", "--amp-dtype", "float16"],
        ["--model", "test_vit", "--opt", "lookahead_adamw"],
        ["--opt-kwargs", "fused=True", "--opt-kwargs", "betas=(0.8, 0.9)"],
    ],
)
def test_ways_to_run(wdprobe, options):
    code, out, err = wdprobe("rop", *FAST, "--steps", 5, "--json", *options)
    assert code == 0, err
    result = json.loads(out)
    assert result["rate"]["mean"] is not None
    assert result["measured_steps"] == (3 if "--every" in options else 5)


def test_more_options_of_the_optimizer(wdprobe, tmp_path):
    more = ["--opt-kwargs", "fused=True", "--opt-kwargs", "betas=(0.8, 0.9)"]
    assert wdprobe("train", *FAST, *more, "--steps", 1, "--output", "run")[0] == 0
    text = json.loads((tmp_path / "run/config.json").read_text())["opt_kwargs"]
    assert text == "fused=True betas=(0.8,0.9)"
    trained = prepare(TrainOptions(model="test_convnext", opt_kwargs=text))
    group = trained.optimizer.param_groups[0]
    assert (group["fused"], group["betas"]) == (True, (0.8, 0.9))


@pytest.mark.parametrize("method", ["l1", "l2", "rwd", "pwd", "lpwd"])
@pytest.mark.filterwarnings("ignore:.*measured against a copy:wd_probe.WdProbeWarning")
def test_every_method_can_be_measured(wdprobe, tmp_path, method):
    code, out, err = wdprobe(
        "rop", *FAST, "--opt", "adam", "--method", method, "--steps", 4, "--lr", 0.01, "--json",
        "--output", "run",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["method"] == method
    assert (result["rate"]["mean"] > 0) == (method in ("l1", "l2"))
    assert ("literal_rate" in result) == ("literal_rate" in rows(tmp_path / "run/steps.csv")[0])
    if method in ("pwd", "lpwd"):
        assert result["literal_rate"]["mean"] > 0
    assert result["scale"] == ("max2" if method == "lpwd" else None)


@pytest.mark.filterwarnings("ignore:.*measured against a copy:wd_probe.WdProbeWarning")
def test_the_optimizers_own_l2_is_measured_and_named(wdprobe):
    code, out, _ = wdprobe("rop", *FAST, "--opt", "momentum", "--steps", 3, "--json")
    assert code == 0
    assert json.loads(out)["method"] == "l2"


def test_train_keeps_checkpoint_curves_and_config(wdprobe, tmp_path):
    code, out, err = wdprobe(
        "train", *FAST, "--method", "pwd", "--scale", "mean", "--epochs", 3, "--lr", 1e-3,
        "--weight-decay", 5, "--val-split", 0.25, "--train-samples", 320, "--both-moments",
        "--every", 5, "--json", "--output", "run",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text()) == result
    config = json.loads((run / "config.json").read_text())
    assert (config["method"], config["scale"], config["command"]) == ("pwd", "mean", "train")
    assert (config["train_size"], config["validation_size"]) == (320, 359)
    epochs = rows(run / "epochs.csv")
    assert [int(e["step"]) for e in epochs] == [10, 20, 30]
    assert result["steps"] == 30
    assert result["measured_steps"] == 6
    top1 = [float(e["top1"]) for e in epochs]
    assert result["top1"] == top1[-1]
    assert result["best10"]["mean"] == pytest.approx(sum(top1) / 3)
    chosen = max(epochs, key=lambda e: float(e["val_top1"]))
    assert result["chosen"]["top1"] == float(chosen["top1"])
    assert all(e["other_top1"] and e["other_loss"] != e["loss"] for e in epochs)
    losses = [float(s["loss"]) for s in rows(run / "steps.csv")]
    assert float(epochs[0]["train_loss"]) == pytest.approx(sum(losses[:10]) / 10)
    assert (run / "figures" / "training.png").is_file()
    assert set(load_file(run / "model.safetensors"))
    assert result["images_per_second"] > 0


def test_train_for_a_person_and_without_measuring(wdprobe, tmp_path):
    code, out, _ = wdprobe("train", *FAST, "--epochs", 2, "--output", "run")
    assert code == 0
    assert (
        "Training · test_convnext on digits · 88 steps adam · lpwd (max2) · η 0.0001"
        in " ".join(out.split())
    )
    assert "mean of the best 2 epochs" in out
    assert "R_op" not in out
    assert not (tmp_path / "run" / "layers.csv").exists()
    assert "rate" not in rows(tmp_path / "run" / "steps.csv")[0]


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_weights(wdprobe, tmp_path):
    for name, more in (("plain", []), ("compiled", ["--torchcompile"])):
        options = ["--method", "pwd", "--weight-decay", 50, "--steps", 3, "--seed", 2]
        assert wdprobe("train", *FAST, *options, *more, "--output", name)[0] == 0
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "compiled"))
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-4)


def test_spared_tensors_are_not_penalized(wdprobe, tmp_path):
    full = json.loads(wdprobe("rop", *FAST, "--steps", 1, "--json")[1])
    code, out, _ = wdprobe(
        "rop", *FAST, "--steps", 1, "--json", "--filter-bias-and-bn", "--output", "run"
    )
    assert code == 0
    assert json.loads(out)["penalized"] < full["penalized"]
    spared = {r["name"] for r in rows(tmp_path / "run/tensors.csv") if r["penalized"] == "0"}
    assert "head.fc.bias" in spared
    assert "head.fc.weight" not in spared


def test_swin_at_32(wdprobe):
    code, out, err = wdprobe(
        "rop", "--model", "swin_tiny_patch4_window7_224", "--steps", 1, "--batch-size", 8, "--json"
    )
    assert code == 0, err
    assert len(json.loads(out)["layers"]) > 10


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
    "samples": (["train", *FAST, "--train-samples", "5000"], "1437 training images are left beside the validation split; 5000 are asked for", 2),  # noqa: E501
    "every": (["train", *FAST, "--every", "-1"], "--every must be at least 0, got -1", 2),
    "cuda": ([*ROP, "--device", "cuda"], "device cuda is asked for, and this machine has none", 2),
    "output": ([*ROP, "--output", "file/run"], "output folder file/run cannot be written to", 2),
    "size": (["rop", "--model", "inception_v3", "--steps", "1"], "cannot take 32×32 images", 2),
    "layers": (["layers", "--model", "convnext_tinny"], "did you mean convnext_tiny", 2),
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


def test_hub_not_reachable(wdprobe, monkeypatch):
    import huggingface_hub
    import timm

    def refused(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection to the hub")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", refused)
    code, _, err = wdprobe("rop", "--model", "convnext_tiny", "--pretrained", "--steps", 1)
    assert code == 1
    assert "convnext_tiny could not be fetched from the hub (no connection to the hub)" in err
    assert "use --checkpoint with a local file" in err


def test_no_pretrained_weights(wdprobe):
    code, _, err = wdprobe("rop", "--model", "convnext_tiny.nonsense", "--pretrained")
    assert code == 2
    assert "nonsense" in err


def test_own_checkpoint_is_read_back(wdprobe, tmp_path):
    assert wdprobe("rop", *FAST, "--steps", 2, "--output", "a")[0] == 0
    weights = tmp_path / "a/model.safetensors"
    code, _, err = wdprobe(
        "rop", *FAST, "--steps", 1, "--lr", 1e-12, "--checkpoint", weights, "--output", "b"
    )
    assert code == 0, err
    a, b = load_file(weights), load_file(tmp_path / "b/model.safetensors")
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)
    code, _, err = wdprobe("rop", *FAST, "--steps", 1, "--output", "a")
    assert code == 2
    assert "a holds a run already; choose another --output" in err
    (tmp_path / "a/config.json").unlink()
    table = (tmp_path / "a/steps.csv").read_bytes()
    code, _, err = wdprobe("rop", *FAST, "--steps", 1, "--output", "a")
    assert code == 2
    assert "a holds a run's steps.csv already; choose another --output" in err
    assert (tmp_path / "a/steps.csv").read_bytes() == table
    code, _, err = wdprobe("zeroshot", "--model", "test_convnext", "--output", "a")
    assert code == 2
    assert "a holds a run's steps.csv already; choose another --output" in err
    assert "training" not in err


def test_a_loss_that_is_no_number_ends_the_run(wdprobe, tmp_path):
    code, out, err = wdprobe(
        "rop",
        *FAST,
        "--opt",
        "sgd",
        "--method",
        "wd",
        "--lr",
        "1e25",
        "--weight-decay",
        "1e-28",
        "--output",
        "run",
        "--json",
    )
    assert code == 1
    result = json.loads(out)
    assert result["status"] == "diverged"
    assert f"the loss is no longer finite at step {result['steps']}" in err
    assert result["steps"] == len(rows(tmp_path / "run/steps.csv"))


def start(tmp_path, *arguments):
    def prepare():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under nohup and in CI

    return subprocess.Popen(
        [sys.executable, "-c", "from wd_probe.cli.main import main; main()", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_ctrl_c_keeps_and_summarizes_what_was_measured(tmp_path, number):
    process = start(tmp_path, "rop", *FAST, "--epochs", "1000", "--output", "run", "--json")
    table = tmp_path / "run/steps.csv"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (table.exists() and table.stat().st_size > 500):
        time.sleep(0.2)
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    result = json.loads(out)
    assert result["status"] == "interrupted"
    assert f"interrupted after step {result['steps']}; what was measured is kept until " in err
    assert "`wdprobe rop --resume run` goes on from its start: it was not saved yet" in err
    assert len(rows(table)) == result["steps"] > 0
    assert result["rate"]["mean"] is not None


@contextlib.contextmanager
def room(most):
    """No file may grow beyond so many bytes."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.filterwarnings("default::wd_probe.WdProbeWarning")
@pytest.mark.parametrize(
    ("most", "more"),
    [(20_000, []), (500_000, []), (500_000, ["--recovery-interval", "1"])],
    ids=["tables", "weights", "recovery"],
)
def test_a_full_disk_is_told_once_and_measuring_goes_on(wdprobe, tmp_path, most, more):
    """torch and safetensors have errors of their own for it."""
    steps = 30 if most == 20_000 else 3
    with room(most):
        code, out, err = wdprobe(
            "rop", *FAST, "--steps", steps, "--output", "run", "--json", *more
        )  # fmt: skip
    assert code == 1
    assert err.count("nothing more is written to run (") == 1
    assert "File too large" in err
    result = json.loads(out)
    assert result["status"] == "finished"
    assert result["measured_steps"] == result["steps"] == steps
    assert not list((tmp_path / "run").glob("*.partial"))


def test_layers_command(wdprobe):
    code, out, _ = wdprobe("layers", "--model", "convnext_tiny", "--json")
    result = json.loads(out)
    assert code == 0
    assert (len(result["layers"]), result["definition"]) == (20, "timm")
    assert result["layers"][-1]["rate"] == pytest.approx(0.02)
    assert sum(layer["weights"] for layer in result["layers"]) == result["weights"] == 28589128
    code, out, _ = wdprobe("layers", "--model", "test_vit", "--filter-bias-and-bn")
    assert code == 0
    assert "n = " in out


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
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert "rop" in done.stdout
    code = "import sys, wd_probe; wd_probe.opposing; print('torch' in sys.modules)"
    twin = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert twin.stdout == "True\n"


def test_version(wdprobe):
    assert wdprobe("--version")[1] == "wdprobe 0.1.0\n"
