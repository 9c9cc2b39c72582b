import json

import pytest
import torch
from safetensors.torch import load_file

from tests.small import FAST, rows
from wd_probe.training.options import TrainOptions
from wd_probe.training.train import prepare


def test_more_options_of_the_optimizer(wdprobe, tmp_path):
    more = ["--opt-kwargs", "fused=True", "--opt-kwargs", "betas=(0.8, 0.9)"]
    assert wdprobe("train", *FAST, *more, "--steps", 1, "--output", "run")[0] == 0
    text = json.loads((tmp_path / "run/config.json").read_text())["opt_kwargs"]
    assert text == "fused=True betas=(0.8,0.9)"
    trained = prepare(TrainOptions(model="test_convnext", opt_kwargs=text))
    group = trained.optimizer.param_groups[0]
    assert (group["fused"], group["betas"]) == (True, (0.8, 0.9))


@pytest.mark.parametrize("opt", ["adahessian", "torch.optim.SparseAdam"])
def test_optimizers_that_need_other_gradients_say_so(wdprobe, opt):
    code, _, err = wdprobe("train", *FAST, "--opt", opt, "--weight-decay", 0, "--steps", 2)
    assert code == 2
    line = err.strip().splitlines()[-1]
    name = "Adahessian" if opt == "adahessian" else "SparseAdam"
    assert line.startswith(f"wdprobe: error: {name} cannot step here (")
    assert line.endswith(
        "it is given dense gradients without a graph, and no closure; choose another --opt"
    )


@pytest.mark.figures
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
    assert "mean of 2 epochs" in out
    assert "R_op" not in out
    assert not (tmp_path / "run" / "layers.csv").exists()
    assert "rate" not in rows(tmp_path / "run" / "steps.csv")[0]


@pytest.mark.slow
def test_not_every_epoch_need_be_evaluated(wdprobe, tmp_path):
    common = [*FAST, "--epochs", 5, "--train-samples", 96, "--val-split", 0.1]
    seldom = ["--val-interval", 2, "--output", "seldom"]
    code, out, err = wdprobe("train", *common, *seldom, "--json")
    assert code == 0, err
    assert wdprobe("train", *common, "--output", "always")[0] == 0
    some, every = (rows(tmp_path / run / "epochs.csv") for run in ("seldom", "always"))
    for epoch, (one, other) in enumerate(zip(some, every, strict=True), start=1):
        scores = {k: v for k, v in other.items() if k not in ("epoch", "step", "train_loss")}
        if epoch in (1, 3):
            other |= dict.fromkeys(scores, "")
        assert one == other
    summary = json.loads(out)
    assert summary["epochs"] == 5
    assert summary["best10"]["epochs"] == 3
    assert summary["top1"] == float(some[-1]["top1"])
    assert wdprobe("report", "seldom")[0] == 0
    assert "after 5 epochs" in (tmp_path / "seldom" / "report.html").read_text()


def test_a_compiled_model_trains_to_the_same_weights(wdprobe, tmp_path):
    for name, more in (("plain", []), ("compiled", ["--torchcompile"])):
        options = ["--method", "pwd", "--weight-decay", 50, "--steps", 3, "--seed", 2]
        assert wdprobe("train", *FAST, *options, *more, "--output", name)[0] == 0
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "compiled"))
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-4)
