"""What is prepared for a step holds as long as it may."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import reference
from tests.small import LR, batch
from wd_probe import OpposingPenaltyProbe, WdProbeWarning, WeightDecay, layers


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


def changes(draw, model, optimizer, decay):
    """What a loop may do between two steps, as functions by name."""
    first, second = optimizer.param_groups
    parameters = list(model.parameters())

    def attach(method):
        if decay:
            decay.pop().detach()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        decay.append(WeightDecay(model, optimizer, method, rate=0.3, groups=layers(model)))

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
        draw.choice((first, second))["weight_decay"] = draw.choice((0.0, 0.2, 0.5))

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
@pytest.mark.parametrize("keep", ["whole", "half", "nothing"])
def test_what_is_kept_from_step_to_step_follows_every_change(seed, keep):
    """A probe counts as one that prepares every step anew."""
    draw = random.Random(seed)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
    groups = [{"params": list(part.parameters())} for part in (model[:2], model[2:])]
    optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.3, foreach=False)
    decay = []
    probe = OpposingPenaltyProbe(model, optimizer, keep=keep)
    forgetful = OpposingPenaltyProbe(model, optimizer, keep=keep)
    between = changes(draw, model, optimizer, decay)
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
        assert np.array_equal(one.values, other.values)
    assert probe.total.penalized > 1000


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
