"""What is kept of the weights during a step."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.probe.test_step import TORCH
from tests.small import adamw, batch, small, train
from wd_probe import OpposingPenaltyProbe, WdProbeWarning, WeightDecay

KEPT = {
    **{name: TORCH[name] for name in ("adamw", "adamw-fused", "adamw-single", "tensor-lr")},
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.5),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.5, momentum=0.9, dampening=0.1),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.5, momentum=0.9, nesterov=True),
    "amsgrad": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.3, amsgrad=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.05, betas=(0.5, 0.9), eps=1e-3),
}


@pytest.mark.parametrize("keep", ["half", "nothing"])
@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_changes_no_count(keep, name):
    """Also where the state tells nothing, or the decay is of another kind: then θ is copied."""
    model = small()
    optimizer = KEPT[name](model.parameters())
    if not optimizer.defaults["weight_decay"]:
        WeightDecay(model, optimizer, "wd", rate=0.02, scale="max2")
    whole = OpposingPenaltyProbe(model, optimizer, profile=[0.01])
    other = OpposingPenaltyProbe(model, optimizer, profile=[0.01], keep=keep)
    train(model, optimizer, 12)
    assert whole.total.total.opposing > 5
    for expected, found in zip(whole.records, other.records, strict=True):
        for name in expected.names:
            one, two = expected.tensors[name], found.tensors[name]
            assert (one.penalized, one.opposing, one.flipped) == (
                two.penalized, two.opposing, two.flipped,
            )  # fmt: skip
            assert two.total_penalty == pytest.approx(one.total_penalty, rel=0.01)
    for expected, found in zip(whole.profiles, other.profiles, strict=True):
        assert found.opposing[0] == pytest.approx(expected.opposing[0], abs=1)


@pytest.mark.parametrize("method", ["rwd", "lpwd", "l2", "own"])
@pytest.mark.parametrize("keep", ["half", "nothing"])
def test_what_is_kept_under_every_method(keep, method):
    model = small()
    if method == "own":
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=0.1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        WeightDecay(model, optimizer, method, rate=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WdProbeWarning)
        whole = OpposingPenaltyProbe(model, optimizer, reading="literal")
        other = OpposingPenaltyProbe(model, optimizer, reading="literal", keep=keep)
    train(model, optimizer, 8)
    for expected, found in zip(whole.records, other.records, strict=True):
        assert found.total.opposing == expected.total.opposing
        assert found.total.total_penalty == pytest.approx(expected.total.total_penalty, rel=0.01)


def test_nothing_kept_takes_no_memory():
    model = small()
    optimizer = TORCH["adamw"](model.parameters())
    kept = {}
    for keep in ("whole", "half", "nothing"):
        probe = OpposingPenaltyProbe(model, optimizer, keep=keep)
        train(model, optimizer, 1)
        copies = probe._watched[0]._copies._kept.values()
        kept[keep] = sum(copy.numel() * copy.element_size() for copy in copies)
    assert kept == {"whole": 4 * 212, "half": 2 * 212, "nothing": 0}


@pytest.mark.filterwarnings("error")
def test_a_first_step_that_is_voided_tells_no_movement():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3, fused=True)
    probe = OpposingPenaltyProbe(model, optimizer, keep="nothing")
    scaler = torch.amp.GradScaler("cpu")
    for step in range(3):
        images, labels = batch(step)
        loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss if step else loss * torch.inf).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert [r.step for r in probe.records] == [2, 3]


def test_a_copy_that_fails_is_not_counted(monkeypatch):
    """Not against the copy of a step before it either."""
    torch.manual_seed(0)
    net = nn.Linear(8, 16)
    optimizer = adamw([net.weight])
    probe = OpposingPenaltyProbe(net, optimizer)

    def step(times):
        for seed in range(times):
            net(batch(seed)[0]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    step(1)
    optimizer.add_param_group({"params": [net.bias], "weight_decay": 0.0})

    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory for the copy")

    with monkeypatch.context() as patched:
        patched.setattr("wd_probe.probe.copies.torch.empty_like", full)
        with pytest.warns(WdProbeWarning, match="no memory for the copy"):
            step(3)
    assert [record.step for record in probe.records] == [1]
    step(1)
    assert [record.step for record in probe.records] == [1, 5]
