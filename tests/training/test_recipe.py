"""timm's recipe in real runs, against what is worked out by hand."""

import math
import random
from dataclasses import replace

import pytest
import timm.scheduler
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.optim import optimizer as hooks

from tests.small import Silent, rows
from wd_probe import InputError, WdProbeWarning, layers, layerwise_rates
from wd_probe.training import train as module
from wd_probe.training.options import TrainOptions
from wd_probe.training.train import prepare, train

HAS_WSD = hasattr(timm.scheduler, "WSDLRScheduler")  # timm 1.0.24 does not
LR, RATE, DECAY = 2e-3, 0.05, 0.8
RUN = TrainOptions(
    command="rop", model="test_convnext", lr=LR, weight_decay=RATE, batch_size=16, device="cpu",
    steps=8, every=1, train_samples=64,
)  # fmt: skip
COSINE = {"sched": "cosine", "sched_on_updates": True, "warmup_epochs": 0.75, "warmup_lr": 1e-4,
          "min_lr": 1e-5}  # fmt: skip


def cosine(step, total=8, warmup=3, start=1e-4, least=1e-5):
    """η of a step, from 0, by hand."""
    if step < warmup:
        return start + step * (LR - start) / warmup
    return least + (LR - least) * (1 + math.cos(math.pi * step / total)) / 2


def opposing(theta, stepped, c):
    """Eq. 10 in float64, by the û that the step alone would have come to."""
    theta, stepped = theta.double(), stepped.double()
    u_hat = stepped + c * theta
    return int(((u_hat - c * theta) ** 2 > u_hat**2)[theta != 0].sum())


class Steps:
    """What global hooks see of every optimizer's steps: weights ahead of them and after."""

    def __init__(self, seen):
        self.seen, self.handles = seen, []

    def __enter__(self):
        self.handles = [
            hooks.register_optimizer_step_pre_hook(self.before),
            hooks.register_optimizer_step_post_hook(self.after),
        ]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def before(self, optimizer, *_):
        self.kept = [[p.detach().clone() for p in g["params"]] for g in optimizer.param_groups]

    def after(self, optimizer, *_):
        self.seen(optimizer.param_groups, self.kept)


def test_r_op_follows_a_schedule_with_warm_up_and_layer_decay(tmp_path):
    counted = []

    def count(groups, kept):
        eta = cosine(len(counted))
        counted.append(
            sum(
                opposing(was, p.detach(), eta * group["lr_scale"] * RATE)
                for group, before in zip(groups, kept, strict=True)
                for p, was in zip(group["params"], before, strict=True)
            )
        )

    with Steps(count):
        train(replace(RUN, layer_decay=DECAY, output=tmp_path / "run", **COSINE), Silent())
    table = rows(tmp_path / "run/steps.csv")
    assert [float(row["lr"]) for row in table] == pytest.approx([cosine(k) for k in range(8)])
    assert [int(row["opposing"]) for row in table] == counted
    assert min(counted) > 0


SELDOM = [pytest.param(one, marks=pytest.mark.slow) for one in ("wd", "rwd", "lpwd")]


@pytest.mark.parametrize("method", ["own", "pwd", "corrected", *SELDOM])
def test_what_is_left_is_the_product_over_the_live_c_of_each_layer(method, tmp_path):
    options = replace(RUN, method=method, layer_decay=DECAY, output=tmp_path / "run", **COSINE)
    model = prepare(options).model
    found = layers(model)
    rates = layerwise_rates(len(found), RATE, "max2") if method == "lpwd" else [RATE] * len(found)
    train(options, Silent())
    table = {row["name"]: row for row in rows(tmp_path / "run/tensors.csv")}
    assert set(table) == {name for name, _ in model.named_parameters()}
    for layer, rate in zip(found, rates, strict=True):
        scale = DECAY ** (len(found) - layer.index)
        left = 1.0
        for eta in map(cosine, range(8)):
            left *= 1 - eta * scale * rate * (eta / LR if method == "corrected" else 1)
        for name in layer.parameters:
            assert float(table[name]["remaining"]) == pytest.approx(left, abs=1e-9)


@pytest.mark.parametrize("method", ["pwd", "rwd"])
def test_the_other_moment_is_that_of_the_live_rate(method, monkeypatch):
    """pwd's weights have the next step's c off then, and rwd's the last one's back on."""
    run = prepare(replace(RUN, method=method, both_moments=True, steps=6, **COSINE))
    trainer, seen = run.trainer(), {}
    list(trainer.epoch(1, 1, 4))
    kept = {name: p.detach().clone() for name, p in run.model.named_parameters()}

    def look(*_):
        seen.update((name, p.detach().clone()) for name, p in run.model.named_parameters())

    monkeypatch.setattr(module.Training, "evaluate", look)
    module._other_moment(run, trainer)
    c = RATE * cosine(4 if method == "pwd" else 3, total=6)
    for name, was in kept.items():
        assert torch.allclose(seen[name], was * (1 - c) if method == "pwd" else was / (1 - c))


def test_gradients_are_clipped_ahead_of_the_step(tmp_path):
    norms = []

    def norm(groups, _):
        grads = [p.grad.norm() for group in groups for p in group["params"]]
        norms.append(float(torch.stack(grads).norm()))

    for clip in (None, 0.01):
        with Steps(norm):
            train(replace(RUN, steps=2, clip_grad=clip, output=tmp_path / f"{clip}"), Silent())
    assert min(norms[:2]) > 0.02
    assert norms[2:] == pytest.approx([0.01, 0.01], rel=1e-3)


def test_batches_gathered_for_a_step_are_a_larger_batch(tmp_path):
    whole = replace(RUN, batch_size=32, steps=None, epochs=2, train_samples=96)
    gathered = replace(whole, batch_size=8, grad_accum_steps=4)
    for name, options in (("whole", whole), ("gathered", gathered)):
        train(replace(options, output=tmp_path / name), Silent())
    tables = [rows(tmp_path / name / "steps.csv") for name in ("whole", "gathered")]
    assert [len(table) for table in tables] == [6, 6]
    losses = [[float(row["loss"]) for row in table] for table in tables]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "gathered")]
    assert all(torch.allclose(ends[0][key], ends[1][key], atol=1e-4) for key in ends[0])


def test_what_is_left_of_an_epoch_makes_a_smaller_step(tmp_path):
    options = replace(RUN, grad_accum_steps=3, steps=None, epochs=1, every=1, lr=1e-12)
    grads = []
    with Steps(lambda groups, _: grads.append(groups[0]["params"][0].grad.clone())):
        summary = train(replace(options, output=tmp_path / "3"), Silent())
        train(replace(options, grad_accum_steps=1, output=tmp_path / "1"), Silent())
    assert len(rows(tmp_path / "3/steps.csv")) == 2
    assert summary["images_per_second"] * summary["seconds"] == pytest.approx(64)
    assert torch.allclose(grads[0], torch.stack(grads[2:5]).mean(0), atol=1e-6)
    assert torch.allclose(grads[1], grads[5], atol=1e-6)


def test_the_average_of_the_weights_is_kept_evaluated_and_written(tmp_path):
    kept = []

    def average(groups, _):
        weights = [p.detach().clone() for group in groups for p in group["params"]]
        kept[:] = (
            [a + 0.25 * (b - a) for a, b in zip(kept, weights, strict=True)] if kept else weights
        )

    options = replace(RUN, model_ema=True, model_ema_decay=0.75, output=tmp_path / "run")
    with Steps(average):
        summary = train(options, Silent())
    mean = load_file(tmp_path / "run/model_ema.safetensors")
    run = prepare(RUN)
    for (name, p), wanted in zip(run.model.named_parameters(), kept, strict=True):
        assert torch.allclose(mean[name], wanted, atol=1e-6)
        assert not torch.equal(mean[name], load_file(tmp_path / "run/model.safetensors")[name])
        p.data.copy_(mean[name])
    score = run.evaluate(run.data.test, run.trainer())
    assert (summary["top1"], summary["loss"]) == pytest.approx((score.top1, score.loss))
    assert summary["model_ema"] is True


def test_pictures_do_not_depend_on_what_the_process_has_imported_before(monkeypatch):
    def loaded(*data, **options):
        random.getrandbits(24)  # as rich draws its first style, where it is not imported yet
        return load_data(*data, **options)

    load_data, augmented = module.load_data, replace(RUN, aa="rand-m9-mstd0.5-inc1")
    first, _ = next(iter(prepare(augmented).data.train))
    monkeypatch.setattr(module, "load_data", loaded)
    second, _ = next(iter(prepare(augmented).data.train))
    assert torch.equal(first, second)


@pytest.mark.parametrize("chosen", [{"smoothing": 0.1}, {"mixup": 1.0}, {"cutmix": 1.0},
                                    {"mixup": 0.4, "cutmix": 1.0, "smoothing": 0.2}])  # fmt: skip
def test_losses_are_of_smoothed_and_mixed_labels(chosen):
    recipe = prepare(replace(RUN, **chosen)).recipe
    smoothing = chosen.get("smoothing", 0.0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    whole = F.one_hot(labels, 10) * (1 - smoothing) + smoothing / 10
    logits = torch.randn(8, 10)
    if recipe.mix is None:
        wanted = -(whole * logits.log_softmax(1)).sum(1).mean()
        assert float(recipe.loss(logits, labels)) == pytest.approx(float(wanted), rel=1e-5)
        return
    mixed, targets = recipe.mix(images.clone(), labels, 1)
    share = (targets - whole.flip(0))[0, 0] / (whole - whole.flip(0))[0, 0]
    assert 0 < share < 1
    assert torch.allclose(targets, share * whole + (1 - share) * whole.flip(0), atol=1e-5)
    own = (mixed == images).float().mean()
    if "mixup" not in chosen:
        assert own == pytest.approx(float(share), abs=1e-5)
    elif "cutmix" not in chosen:
        assert torch.allclose(mixed, share * images + (1 - share) * images.flip(0), atol=1e-5)
    wanted = -(targets * logits.log_softmax(1)).sum(1).mean()
    assert float(recipe.loss(logits, targets)) == pytest.approx(float(wanted), rel=1e-5)


def test_pictures_are_mixed_in_the_first_epochs_alone():
    mix = prepare(replace(RUN, mixup=1.0, smoothing=0.1, mixup_off_epoch=2)).recipe.mix
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    for epoch in (1, 2, 3, 4):
        mixed, targets = mix(images.clone(), labels, epoch)
        assert torch.equal(mixed, images) == (epoch > 2)
        assert int((targets > 0.9).sum()) == (8 if epoch > 2 else 0)


@pytest.mark.parametrize("more", [{}, {"val_split": 0.5}, {"val_interval": 2}])
def test_a_plateau_lowers_the_rates_where_top1_stands(more, tmp_path):
    options = replace(
        RUN, steps=None, epochs=7, batch_size=32, train_samples=32, layer_decay=DECAY, lr=4e-2,
        sched="plateau", patience_epochs=0, decay_rate=0.5, min_lr=1.5e-2, warmup_epochs=1,
        warmup_lr=1e-3, **more,
    )  # fmt: skip
    train(replace(options, output=tmp_path / "run"), Silent())
    lr, best, waited, wanted = 4e-2, -1.0, 0, [1e-3]
    for epoch, row in enumerate(rows(tmp_path / "run/epochs.csv"), 1):
        score = row["val_top1" if "val_split" in more else "top1"]
        if epoch > 1 and score:
            better = float(score) > best * (1 + 1e-4)
            best, waited = (float(score), 0) if better else (best, waited + 1)
            if waited > 0:
                lr, waited = max(lr / 2, 1.5e-2), 0
        wanted.append(lr)
    found = [float(row["lr"]) for row in rows(tmp_path / "run/steps.csv")]
    assert found == pytest.approx(wanted[:-1])
    assert found[-1] < 4e-2 or more
    left = math.prod(1 - eta * RATE for eta in found)
    table = {row["name"]: float(row["remaining"]) for row in rows(tmp_path / "run/tensors.csv")}
    assert table["head.fc.weight"] == pytest.approx(left)


def test_a_schedule_by_epochs_that_never_moves_is_told(tmp_path):
    with pytest.warns(WdProbeWarning, match="the run has only one; --sched-on-updates moves it"):
        prepare(replace(RUN, steps=3, sched="cosine"))


@pytest.mark.parametrize(
    ("chosen", "rates"),
    [
        ({"sched": "step", "decay_epochs": 1, "decay_rate": 0.5}, [1, 0.5, 0.25]),
        ({"sched": "multistep", "decay_milestones": "2"}, [1, 0.1, 0.1]),
        ({"sched": "multistep", "decay_milestones": "1,2"}, [1, 0.01, 0.01]),  # as timm counts
        ({"sched": "constant", "warmup_epochs": 1, "warmup_lr": LR / 4}, [0.25, 1, 1]),
        ({"sched": "poly", "decay_rate": 1}, [1, 2 / 3, 1 / 3]),
        *([({"sched": "wsd", "decay_epochs": 2}, [1, 1, 1 - 0.5**0.5])] if HAS_WSD else ()),
    ],
)  # fmt: skip
def test_schedules_by_epochs(chosen, rates):
    run = prepare(replace(RUN, steps=None, epochs=3, **chosen))
    trainer = run.trainer()
    found = [
        [step.lr for step in trainer.epoch(epoch, 1 + 4 * (epoch - 1), 12)] for epoch in (1, 2, 3)
    ]
    assert found == [pytest.approx([LR * rate] * 4) for rate in rates]


def test_what_timm_refuses_is_one_line():
    refused = ": wsd schedule requires 0 < decay_epochs" if HAS_WSD else " is not in this version"
    with pytest.raises(InputError, match=f"--sched wsd{refused}"):
        prepare(replace(RUN, sched="wsd", decay_epochs=9, steps=None, epochs=4))
    run = prepare(replace(RUN, mixup=1.0, batch_size=64, train_samples=63))
    with pytest.raises(InputError, match="pairs of images; a process has 63 in a batch"):
        list(run.trainer().epoch(1, 1, 1))
