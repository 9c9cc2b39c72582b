"""Batch norm's statistics: what lags is told, what is taken anew is right, and nothing moves."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from tests.small import Silent, rows
from wd_probe import InputError, WdProbeWarning
from wd_probe.report.page import report
from wd_probe.training import train as module
from wd_probe.training.batch_norm import Lag, batch_norms, lag, updated
from wd_probe.training.loop import evaluate
from wd_probe.training.options import TrainOptions, ZeroshotOptions
from wd_probe.training.scan import scan
from wd_probe.training.train import prepare, train

RUN = TrainOptions(
    command="train", model="test_resnet", opt="adam", lr=1e-2, method="wd", weight_decay=0.0,
    batch_size=64, steps=40, device="cpu", val_split=0.1, train_samples=640,
)  # fmt: skip
SHRINKING = replace(RUN, weight_decay=5.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs once each: what its summary says, its folder."""
    done = {}

    def of(options):
        if options not in done:
            folder = tmp_path_factory.mktemp("run") / "run"
            done[options] = train(replace(options, output=folder), Silent()), folder
        return done[options]

    return of


def by_hand(model, images, size):
    """Batch norm's statistics by batch in float64, each layer's input as its batch alone has it."""
    layers = batch_norms(model)
    seen = {layer: [] for layer in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, x: seen[layer].append(x[0].double()))
        for layer in layers
    ]
    model.train()
    with torch.no_grad():
        for batch in images.split(size):
            model(batch)
    for hook in hooks:
        hook.remove()
    means = {k: torch.stack([x.mean((0, 2, 3)) for x in v]).mean(0) for k, v in seen.items()}
    spreads = {k: torch.stack([x.var((0, 2, 3)) for x in v]).mean(0) for k, v in seen.items()}
    return means, spreads


def test_statistics_taken_anew_are_the_means_over_the_batches():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    images, labels = torch.randn(48, 3, 32, 32), torch.zeros(48, dtype=torch.long)
    stood = {name: value.clone() for name, value in model.state_dict().items()}
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    with updated(model, batches, torch.no_grad):
        found = [(b.running_mean.clone(), b.running_var.clone()) for b in batch_norms(model)]
    assert all(torch.equal(value, stood[name]) for name, value in model.state_dict().items())
    assert all(layer.momentum == 0.1 for layer in batch_norms(model))
    means, spreads = by_hand(model, images, 16)
    for layer, (mean, variance) in zip(batch_norms(model), found, strict=True):
        assert torch.allclose(mean.double(), means[layer], atol=1e-5)
        assert torch.allclose(variance.double(), spreads[layer], rtol=1e-4)


def test_what_stood_is_put_back_where_evaluation_fails():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    batches = [(torch.randn(8, 3, 8, 8), torch.zeros(8))]
    taken = updated(model, batches, torch.no_grad)
    taken.__enter__()
    assert float(model[1].running_var[0]) != 1
    assert not taken.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert model[1].running_var.tolist() == [1] * 4
    assert int(model[1].num_batches_tracked) == 0


def test_variances_of_weights_that_shrank_stand_too_high():
    """Weights a tenth smaller have a variance 0.81 times as large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 2))
    batches = [(torch.randn(32, 3, 8, 8), torch.zeros(32, dtype=torch.long)) for _ in range(4)]
    model[1].momentum = None
    model.train()
    with torch.no_grad():
        for images, _ in batches:
            model(images)
        model[0].weight.mul_(0.9)
        model[0].bias.mul_(0.9)
    scores = iter((0.25, 0.75))
    found = lag(model, batches, torch.no_grad, lambda asked: next(scores))
    assert found.variance == pytest.approx(1 / 0.81, rel=1e-4)
    assert (found.images, found.running, found.updated) == (128, 0.25, 0.75)
    assert lag(nn.Linear(2, 2), batches, torch.no_grad, lambda asked: 1.0) is None
    assert lag(model, [], torch.no_grad, lambda asked: 1.0) is None


def test_decay_that_outruns_the_statistics_is_told(run):
    """Weights halve every 14 steps, statistics remember ten: right in training, wrong evaluated."""
    summary, folder = run(SHRINKING)
    told = summary["batch_norm"]
    assert told["images"] == 512
    assert told["updated"] > told["running"] + 0.3
    assert told["variance"] > 1.1
    first = summary["findings"][0]
    assert first == (
        "Batch norm's running statistics lag behind the weights: by them "
        f"{100 * told['running']:.1f} % of 512 training images are right, by statistics taken "
        f"anew {100 * told['updated']:.1f} %. Decay shrinks the weights faster than they follow: "
        f"their variances are {told['variance']:.2f} times too large, layer upon layer. "
        "`--update-bn` evaluates by statistics taken anew."
    )
    assert json.loads((folder / "summary.json").read_text())["batch_norm"] == told


def test_scores_by_statistics_taken_anew_are_those_of_the_model_with_them(run):
    plain, plain_folder = run(SHRINKING)
    anew, folder = run(replace(SHRINKING, update_bn=True))
    assert anew["running_top1"] == plain["top1"]
    assert anew["running_val_top1"] == plain["val_top1"]
    assert anew["batch_norm"] == plain["batch_norm"]
    assert anew["top1"] > plain["top1"] + 0.3
    assert "--update-bn" not in " ".join(anew["findings"])
    assert anew["update_bn"] is True
    model = timm.create_model("test_resnet", num_classes=10)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    data = prepare(SHRINKING).data
    assert evaluate(model, data.test).top1 == anew["top1"]
    assert evaluate(model, data.validation).top1 == anew["val_top1"]
    model.load_state_dict(load_file(plain_folder / "model.safetensors"))
    assert evaluate(model, data.test).top1 == plain["top1"]
    torch.optim.swa_utils.update_bn(data.train, model)
    assert evaluate(model, data.test).top1 == pytest.approx(anew["top1"], abs=0.02)  # other batches


@pytest.mark.parametrize(
    "more",
    [{"model_ema": True, "model_ema_decay": 0.5}, {"aa": "rand-m9", "every": 3}],
    ids=str,
)
def test_training_goes_on_as_if_nobody_had_asked(more, tmp_path, monkeypatch):
    options = replace(SHRINKING, steps=12, train_samples=320, hflip=0.5, **more)
    for name, chosen in (("anew", {"update_bn": True}), ("plain", {}), ("never", {})):
        if name == "never":
            monkeypatch.setattr(module, "_ask_batch_norm", lambda *_: None)
        train(replace(options, output=tmp_path / name, **chosen), Silent())
    kinds = ("anew", "plain", "never")
    one, other, bare = ((tmp_path / kind / "steps.csv").read_bytes() for kind in kinds)
    assert one == other == bare
    one, other, bare = (load_file(tmp_path / kind / "model.safetensors") for kind in kinds)
    assert all(torch.equal(value, bare[name]) for name, value in other.items())
    statistics = {name for name, value in one.items() if not torch.equal(value, bare[name])}
    expected = () if "model_ema" in more else ("running_mean", "running_var", "num_batches_tracked")
    assert {name.rpartition(".")[2] for name in statistics} == {*expected}
    assert rows(tmp_path / "plain/epochs.csv") == rows(tmp_path / "never/epochs.csv")
    scores = [[row["top1"] for row in rows(tmp_path / k / "epochs.csv")] for k in ("anew", "plain")]
    assert scores[0] != scores[1]


def test_each_moment_has_its_own_statistics(tmp_path, monkeypatch):
    """The first layer's input is c smaller at pwd's other moment, on the same images."""
    seen, evaluate = [], module.evaluate

    def watched(model, *arguments):
        first = batch_norms(model)[0]
        seen.append((model.training, first.running_var.clone(), model.conv1[0].weight.clone()))
        return evaluate(model, *arguments)

    monkeypatch.setattr(module, "evaluate", watched)
    train(
        replace(SHRINKING, method="pwd", steps=4, val_split=0.0, both_moments=True, update_bn=True,
                output=tmp_path / "run"),
        Silent(),
    )  # fmt: skip
    (_, own, weight), (_, other, decayed), *_ = seen
    c = SHRINKING.lr * SHRINKING.weight_decay
    assert torch.allclose(decayed, (1 - c) * weight)
    assert torch.allclose(other, (1 - c) ** 2 * own, rtol=1e-4)


def test_without_decay_or_without_batch_norm_nothing_is_told(run):
    summary, _ = run(replace(RUN, steps=50, lr=1e-3))
    assert summary["batch_norm"]["updated"] - summary["batch_norm"]["running"] <= 0.03
    assert not any("Batch norm" in one for one in summary["findings"])
    summary, _ = run(replace(SHRINKING, model="test_vit", steps=4))
    assert "batch_norm" not in summary


def test_a_model_without_batch_norm_has_nothing_to_take_anew(tmp_path):
    with pytest.warns(WdProbeWarning, match="test_vit has no batch norm with running statistics"):
        train(
            replace(SHRINKING, model="test_vit", steps=2, update_bn=True, output=tmp_path / "run"),
            Silent(),
        )


@pytest.mark.parametrize("spared", [False, True])
def test_a_chain_of_norms_lags_as_the_theory_says(spared):
    """Weights that lose a share c a step: each variance m/(1 - (1 - m)(1 - c)^-2j) too large."""
    torch.manual_seed(0)
    c, m, depth = 2e-3, 0.1, 6
    blocks = [
        part
        for _ in range(depth)
        for part in (nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16, eps=1e-12, momentum=m))
    ]
    model, images = nn.Sequential(*blocks).double(), torch.randn(64, 16).double()
    model.train()
    with torch.no_grad():
        for _ in range(300):
            trained = model(images)
            for p in model.parameters():
                if p.ndim > 1 or not spared:
                    p.mul_(1 - c)
        trained = model(images)
        variances = [layer.running_var.clone() for layer in batch_norms(model)]
        model.eval()
        evaluated = model(images)
        with updated(model, [(images, images)], torch.no_grad):
            taken = [layer.running_var.clone() for layer in batch_norms(model)]
    lags = [1.0]
    for number, (stood, new) in enumerate(zip(variances, taken, strict=True)):
        j = 1 if spared or not number else 2
        lags.append(m / (1 - (1 - m) * (1 - c) ** (-2 * j)))
        assert (stood / new).median() == pytest.approx(lags[-1], rel=1e-3)
    share = (evaluated.std(0) / trained.std(0)).median()
    unbiased = (63 / 64) ** (depth / 2)  # as running variances are, and those of a batch are not
    assert float(share) == pytest.approx(unbiased * math.prod(lags) ** -0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("running", "updated", "variance", "decays", "told"),
    [
        (0.5, 0.52, 2.0, True, None),
        (0.9, 0.5, 2.0, True, None),
        (math.nan, 0.5, 2.0, True, None),
        (0.5, 0.9, 1.0, True, "The weights move faster than they follow."),
        (0.5, 0.9, 0.7, False, "The weights move faster than they follow."),
        (0.5, 0.9, 1.5, True, "Decay shrinks the weights faster than they follow"),
        (0.5, 0.9, 1.5, False, "The weights shrink faster than they follow"),
    ],
)
def test_a_lag_is_told_where_it_costs_something(running, updated, variance, decays, told):
    found = Lag(512, running, updated, variance).findings(decays=decays, updated=True)
    assert len(found) == (told is not None)
    assert all(told in one for one in found)


def test_a_resumed_run_is_asked_too(tmp_path):
    short = replace(SHRINKING, steps=20, update_bn=True)
    whole = train(replace(short, output=tmp_path / "whole"), Silent())

    class Stops(Silent):
        def stepped(self, step, record):
            if step.step == 13:
                raise KeyboardInterrupt

    parted = replace(short, output=tmp_path / "parted", recovery_interval=5)
    assert train(parted, Stops())["status"] == "interrupted"
    again = train(parted, Silent(), resume=True)
    for name in ("batch_norm", "top1", "running_top1", "findings"):
        assert again[name] == whole[name]


# --- and as weights shrink without training -------------------------------------------------------


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    def progress(self, *_):
        pass


def scanned(folder, tmp_path, **options):
    listener = Notes()
    known = {"steps": 4, "distortion": False, "device": "cpu"} | options
    found = scan(ZeroshotOptions(run=folder, output=tmp_path / "scan", **known), listener)
    return found, listener.notes


def test_a_scan_takes_statistics_anew_at_each_scale(run, tmp_path):
    _, folder = run(SHRINKING)
    found, notes = scanned(folder, tmp_path, update_bn=True)
    data = prepare(SHRINKING).data.test
    images = torch.cat([batch for batch, _ in data])
    labels = torch.cat([each for _, each in data])
    for point in found["curve"]:
        model = timm.create_model("test_resnet", num_classes=10)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(point["scale"])
            torch.optim.swa_utils.update_bn(images.split(256), model)
            right = (model.eval()(images).argmax(1) == labels).double().mean()
        assert point["top1"] == pytest.approx(float(right), abs=2 / len(labels))
    assert found["curve"][0]["top1"] > 0.8
    assert (found["batch_norms"], found["update_bn"], notes) == (15, True, [])
    page = Path(report([tmp_path / "scan"])["page"]).read_text()
    assert "Statistics of its 15 batch norms were taken anew at each scale." in page


def test_a_scan_by_running_statistics_says_so(run, tmp_path):
    _, folder = run(SHRINKING)
    found, notes = scanned(folder, tmp_path)
    assert notes[0] == (
        "15 batch norms of test_resnet keep the running statistics of the undecayed weights, which "
        "costs answers too; --update-bn takes them anew at each scale"
    )
    assert found["curve"][0]["top1"] < 0.5
    page = Path(report([tmp_path / "scan"])["page"]).read_text()
    assert "15 batch norms were those of the undecayed weights throughout" in page


def test_what_a_scan_cannot_take_anew(run, tmp_path):
    _, folder = run(SHRINKING)
    with pytest.raises(InputError, match="two images or more, and no batch has as many"):
        scanned(folder, tmp_path, update_bn=True, num_samples=1)
    scanned(folder, tmp_path / "257", update_bn=True, num_samples=257)  # the last is a single one
    with pytest.raises(InputError, match="--update-bn is for the model as a whole; leave out --by"):
        ZeroshotOptions(update_bn=True, by="layer")


def test_cells_say_both_scores(tmp_path):
    from wd_probe.sweeps.ledger import Ledger, figures

    summary = {"status": "finished", "top1": 0.9, "running_top1": 0.4, "running_val_top1": 0.5}
    Ledger(tmp_path / "cells.csv", [figures(summary)])
    with (tmp_path / "cells.csv").open() as file:
        row = next(csv.DictReader(file))
    assert (row["top1"], row["running_top1"], row["running_val_top1"]) == ("0.9", "0.4", "0.5")
