"""What is kept of the weights from step to step, whoever writes them in between."""

import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from tests import reference
from tests.small import LR, RATE, Oracle, adamw, batch, loss_of, small, train
from wd_probe import InputError, OpposingPenaltyProbe, WdProbeWarning, WeightDecay, layers
from wd_probe.probe.copies import Copies
from wd_probe.probe.sums import AT, Factors


@pytest.fixture(params=["whole", "signs"])
def keep(request):
    return request.param


def clip(model):
    """As WGAN does: past autograd."""
    for p in model.parameters():
        p.data.clamp_(-0.05, 0.05)


def clip_in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.05, 0.05)


def prune_by_mask(model):
    with torch.no_grad():
        model[0].weight[::2] *= 0


def prune_past_torch(model):
    """Through memory that torch does not know of."""
    model[0].weight.detach().numpy()[::2] = 0


class Averaged:
    """Swaps averaged weights in after every step, and out before the next."""

    def __init__(self):
        self.kept = None

    def __call__(self, model):
        if self.kept is None:
            self.kept = [p.detach().clone() for p in model.parameters()]
        for p, kept in zip(model.parameters(), self.kept, strict=True):
            kept.lerp_(p.detach(), 0.5)
            p.data.copy_(-kept)


class Swapped(Averaged):
    """The same by exchanging the tensors' memory."""

    def __call__(self, model):
        for p in model.parameters():
            p.data = -p.data.clone()


class Loaded:
    def __init__(self):
        self.state = None

    def __call__(self, model):
        if self.state is None:
            self.state = copy.deepcopy(model.state_dict())
        model.load_state_dict(self.state)


def merge(model):
    """As adapters do: a low rank is added, and taken off again later."""
    with torch.no_grad():
        model[0].weight += torch.ones(16, 1) @ torch.full((1, 8), 0.3)


def transpose(model):
    """Laid out otherwise in the same memory."""
    model[1].weight.data = model[1].weight.data.t()


WRITERS = {
    "clip": lambda: clip, "clip in place": lambda: clip_in_place, "mask": lambda: prune_by_mask,
    "past torch": lambda: prune_past_torch, "average": Averaged, "swap": Swapped, "load": Loaded,
    "merge": lambda: merge,
}  # fmt: skip


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("writer", WRITERS)
def test_nobody_elses_change_is_booked_as_the_optimizers(writer, every, keep):
    model = small()
    rate = 1e-4 if keep == "signs" else RATE
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=rate)
    probe = OpposingPenaltyProbe(model, optimizer, every=every, keep=keep)
    oracle = Oracle(model.named_parameters(), LR * rate)
    write = WRITERS[writer]()

    def after():
        oracle.after()
        write(model)

    train(model, optimizer, 8, oracle.before, after)
    oracle.steps = oracle.steps[::every]
    oracle.agrees_with(probe.records)


def test_a_tensor_laid_out_otherwise_in_the_same_memory(keep):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    WeightDecay(model, optimizer, "wd", rate=1e-3)
    probe = OpposingPenaltyProbe(model, optimizer, keep=keep)
    oracle = Oracle(model.named_parameters(), 5e-4)

    def after():
        oracle.after()
        transpose(model)

    train(model, optimizer, 5, oracle.before, after)
    oracle.agrees_with(probe.records)


def test_a_part_of_a_tensor_put_in_its_place(keep):
    """At the same address, with the same strides."""
    weights = nn.ParameterList([nn.Parameter(torch.randn(40, 8))])
    (p,) = weights
    optimizer = torch.optim.SGD(weights, lr=0.5)
    WeightDecay(weights, optimizer, "wd", rate=1e-3)
    probe = OpposingPenaltyProbe(weights, optimizer, keep=keep)
    for rows in (40, 40, 30, 30, 4):
        p.data = p.data[:rows]
        p.grad = torch.randn(rows, 8)
        optimizer.step()
    assert [r.penalized for r in probe.records] == [320, 320, 240, 240, 32]


def test_pruned_modules_and_their_masks(keep):
    """torch's pruning steps what is masked before it is used."""
    model = small()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-4)
    probe = OpposingPenaltyProbe(model, optimizer, keep=keep)
    oracle = Oracle(model.named_parameters(), LR * 1e-4)

    def before():
        with torch.no_grad():  # the masks are made anew in every forward pass
            model[0].weight_orig.mul_(model[0].weight_mask)
        oracle.before()

    train(model, optimizer, 6, before, oracle.after)
    assert sum(r.penalized for r in probe.records) < 6 * 212  # zeros are not
    oracle.agrees_with(probe.records)


@pytest.mark.parametrize("method", ["pwd", "lpwd"])
def test_decay_ahead_of_the_step_is_none_of_the_steps(method, keep):
    """What stands after the forward pass's decay is what the step begins with (fact 20)."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    WeightDecay(model, optimizer, method, rate=2e-3)
    probe = OpposingPenaltyProbe(model, optimizer, keep=keep)
    flips = []
    kept = {}

    def before():
        kept.update({name: p.detach().clone() for name, p in model.named_parameters()})

    def after():
        named = model.named_parameters()
        flips.append(sum(int((kept[name] * p.detach() < 0).sum()) for name, p in named))

    train(model, optimizer, 6, before, after)
    assert [r.total.flipped for r in probe.records] == flips
    assert sum(flips) > 0


def test_a_step_that_raises_leaves_nothing_stale(keep):
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-4)
    probe = OpposingPenaltyProbe(model, optimizer, keep=keep)
    train(model, optimizer, 2)

    def broken(*_):
        raise RuntimeError("broken")

    handle = optimizer.register_step_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        train(model, optimizer, 1)
    handle.remove()
    with torch.no_grad():
        for p in model.parameters():
            p.neg_()
    oracle = Oracle(model.named_parameters(), LR * 1e-4)
    train(model, optimizer, 4, oracle.before, oracle.after)
    oracle.agrees_with(probe.records[2:])


def test_weights_that_join_and_leave_steps(keep):
    """Layers frozen for a while, as others are trained."""
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-4)
    probe = OpposingPenaltyProbe(model, optimizer, keep=keep)
    oracle = Oracle(model.named_parameters(), LR * 1e-4)
    for step in range(8):
        loss_of(model, step).backward()
        if step % 3 == 1:
            model[0].weight.grad = model[0].bias.grad = None
        oracle.before()
        optimizer.step()
        oracle.after()
        if step % 3 == 1:
            for name in ("0.weight", "0.bias"):
                oracle.steps[-1][name].update(penalized=0, opposing=0, flipped=0)
        optimizer.zero_grad()
        with torch.no_grad():
            model[0].weight.neg_()
    oracle.agrees_with(probe.records)


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        weights = [torch.randn(10)]
        copies = Copies()
        for _ in range(3):
            copies.take(weights, signs=False)
            assert torch.equal(copies[weights[0]], weights[0])
            copies.count(Factors(np.zeros(1, int), [0.0], [False]))
            weights[0][3] += 1


# --- what is kept holds as long as it may ---------------------------------------------------------


def test_weights_reshaped_in_place():
    """A plan of what lies where ends with the layout, not with the address alone."""
    torch.manual_seed(0)
    a, b, c = (nn.Parameter(torch.randn(12, 20) / 50) for _ in range(3))
    model = nn.ParameterDict({"a": a, "b": b, "c": c})
    groups = [{"params": [a]}, {"params": [b, c], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.3, foreach=False)
    probe = OpposingPenaltyProbe(model, optimizer)
    expected = []
    for step in range(8):
        if step == 2:
            a.data = a.data.view(-1)
            optimizer.state.clear()
        if step == 5:
            a.data = a.data.view(20, 12).t()
            optimizer.state.clear()
        for p in (a, b, c):
            p.grad = torch.randn(p.shape)
        b.grad = None if step in (3, 6) else b.grad
        before = a.detach().clone()
        optimizer.step()
        expected.append(reference.tally(before, a.detach(), 0.02 * 0.3)["opposing"])
    assert [r.total.opposing for r in probe.records] == expected
    assert sum(expected) > 100


def changes(draw, model, optimizer, decay, rate):
    """What a loop may do between two steps, as functions by name."""
    first, second = optimizer.param_groups
    parameters = list(model.parameters())

    def attach(method):
        if decay:
            decay.pop().detach()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        decay.append(WeightDecay(model, optimizer, method, rate=rate, groups=layers(model)))

    def convert(dtype):
        model.to(dtype)
        optimizer.state.clear()

    def swap():
        a, b = model[0].weight, model[2].weight
        a.data, b.data = b.data, a.data

    def elsewhere():
        p = draw.choice(parameters)
        p.data = p.data.clone()

    def freeze():
        p = draw.choice(parameters)
        p.requires_grad_(not p.requires_grad)

    def own():
        if decay:
            decay.pop().detach()
        draw.choice((first, second))["weight_decay"] = draw.choice((0.0, rate, 2 * rate))

    return {
        "nothing": lambda: None,
        "rate": lambda: draw.choice((first, second)).update(lr=draw.choice((0.01, 0.05))),
        "decay": own,
        "attach": lambda: attach(draw.choice(("wd", "lpwd", "rwd"))),
        "dtype": lambda: convert(draw.choice((torch.bfloat16, torch.float32))),
        "swap": swap,
        "elsewhere": elsewhere,
        "freeze": freeze,
        "regroup": lambda: (
            second["params"].insert(0, first["params"].pop())
            if len(first["params"]) > 1
            else first["params"].append(second["params"].pop())
        ),
    }


@pytest.mark.filterwarnings("ignore:AdamW has weight_decay=0", "ignore:bfloat16 rounds decay")
@pytest.mark.parametrize("seed", range(6))
def test_what_is_kept_from_step_to_step_follows_every_change(seed, keep):
    """A probe counts as one that prepares every step anew."""
    draw = random.Random(seed)
    rate = 0.3 if keep == "whole" else 0.01
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
    groups = [{"params": list(part.parameters())} for part in (model[:2], model[2:])]
    optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=rate, foreach=False)
    decay = []
    probe = OpposingPenaltyProbe(model, optimizer, keep=keep)
    forgetful = OpposingPenaltyProbe(model, optimizer, keep=keep)
    between = changes(draw, model, optimizer, decay, rate)
    for step in range(30):
        between[draw.choice(list(between))]()
        forgetful._watched[0].close()
        forgetful._held.clear()
        images, labels = batch(step, next(model.parameters()).dtype)
        loss = F.cross_entropy(model(images).float(), labels)
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(probe.records) > 10
    for one, other in zip(probe.records, forgetful.records, strict=True):
        assert np.array_equal(one.values, other.values, equal_nan=True)
    assert probe.total.penalized > (1000 if keep == "whole" else 100)


@pytest.mark.parametrize("way", ["foreach", "for-loop", "fused", "wd", "rwd", "pwd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relative", [0.2, 0.7, 1.5])
def test_decay_that_is_rounded_away_penalizes_nothing(way, dtype, relative):
    """Fact 27: (1 - c)θ is θ again where c is small beside half a unit in the last place."""
    c = relative * torch.finfo(dtype).eps / 2
    attached = way in ("wd", "rwd", "pwd")
    torch.manual_seed(0)
    model = nn.Linear(40, 50).to(dtype)
    rate = c / LR
    kind = {"fused": way == "fused", "foreach": way == "foreach"}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, weight_decay=0.0 if attached else rate, eps=1e-3, **kind
    )
    if attached:
        WeightDecay(model, optimizer, way, rate=rate)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", WdProbeWarning)
        probe = OpposingPenaltyProbe(model, optimizer)
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.randn(8, 40, dtype=dtype)).square().mean().backward()
        optimizer.step()
    if way == "rwd":
        before = [p.detach() for p in model.parameters()]
    moved = [p * (1 - c) != p for p in before]
    penalized = int(sum(m.sum() for m in moved)) if way != "fused" else 2050
    (record,) = probe.records
    assert record.penalized == pytest.approx(penalized, abs=30 if way in ("rwd", "pwd") else 0)
    assert (record.total.flipped > 0) == (record.penalized > 0)
    texts = [str(one.message) for one in told if "rounds decay" in str(one.message)]
    assert len(texts) == (way != "fused" and relative < 1)
    if relative < 0.5 and way != "fused":
        assert record.penalized == 0
        assert math.isnan(record.rate)
        assert f"on all from {rate / relative:.2g}" in texts[0]


# --- what signs are not enough for ----------------------------------------------------------------


def test_signs_tell_of_no_sizes():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-4)
    probe = OpposingPenaltyProbe(model, optimizer, keep="signs")
    train(model, optimizer, 3)
    total = probe.total.total
    assert total.rate == total.flip_rate > 0
    sized = ("mass", "balance", "norm", "angular_update", "relative_update", "growth", "taken")
    assert all(np.isnan(getattr(total, name)) for name in sized)
    assert total.remaining == pytest.approx((1 - LR * 1e-4) ** 3)
    assert probe.records == probe.records


def test_signs_are_refused_where_they_would_count_wrongly():
    model = small()
    with pytest.raises(
        InputError,
        match=r"keep='signs' counts what crosses zero, and so is right for c up to 0\.002 alone; "
        r"c = ηλ is 0\.015 here: take keep='whole'",
    ):
        OpposingPenaltyProbe(model, adamw(model.parameters()), keep="signs")
    with pytest.raises(InputError, match="keep='signs' tells nothing of other rates"):
        OpposingPenaltyProbe(model, adamw(model.parameters()), keep="signs", profile=[0.1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=RATE)
    probe = OpposingPenaltyProbe(model, optimizer, keep="signs")
    optimizer.param_groups[0]["lr"] = LR
    with pytest.warns(WdProbeWarning, match=r"c is 0\.015, so R_op is not measured there"):
        train(model, optimizer, 1)
    assert probe.records[0].penalized == 0


def test_rules_that_need_the_weights_keep_them():
    """L2 is measured against a second step, whatever is to be kept."""
    totals = []
    for kept in ("whole", "signs"):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WdProbeWarning)
            probe = OpposingPenaltyProbe(model, optimizer, keep=kept)
            train(model, optimizer, 4)
        totals.append(probe.total)
    assert totals[0] == totals[1]
    assert totals[0].total.mass > 0


def test_what_signs_take_too_many_of_is_half_of_c():
    """Theory fact 30: the share of the opposing that end within (c/2)|x| beyond zero."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(400_000, generator=generator)
    stepped = theta * (torch.rand(400_000, generator=generator) * 2 - 1)  # the share flips evenly
    c = 2e-3
    counts = []
    for signs in (False, True):
        weights = [theta.clone()]
        copies = Copies()
        copies.take(weights, signs=signs)
        weights[0].copy_(stepped)
        counts.append(
            copies.count(Factors(np.zeros(1, int), [c], [False]))[0, AT["opposing"]].item()
        )
    assert counts[1] / counts[0] - 1 == pytest.approx(c / 2, rel=0.3)
