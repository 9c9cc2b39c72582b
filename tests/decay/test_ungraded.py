"""Optimizers that decay weights which have no gradient."""

import pytest
import torch
from torch import nn

from tests.small import Oracle, loss_of, small, train
from wd_probe import OpposingPenaltyProbe, WeightDecay, audit
from wd_probe.decay.rules import effect_at_work


def filling(make):
    """Takes a missing gradient for zeros, as Muons do that keep several processes in step."""

    class Filling(make):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
            return super().step(closure)

    return Filling


LR, RATE = 0.5, 0.3


class ShrinkingFirst(torch.optim.SGD):
    """Shrinks all weights, and steps those that have a gradient; the rate is ``wd``."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr=lr)
        self.param_groups[0]["wd"] = weight_decay

    def step(self, closure=None):
        (group,) = self.param_groups
        for p in group["params"]:
            p.data.mul_(1 - group["lr"] * group["wd"])
        return super().step(closure)


MAKES = {
    "filled adamw": filling(torch.optim.AdamW),
    "filled sgd": filling(torch.optim.SGD),
    "shrinking first": ShrinkingFirst,
}


def three_layers():
    """One that trains, one that is frozen, one that the loss does not reach."""
    model = small()
    model[2].requires_grad_(False)
    model[0].spare = nn.Linear(3, 3)
    return model


def own(name, model):
    return MAKES[name](model.parameters(), lr=LR, weight_decay=RATE)


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("exact", [None, True])
@pytest.mark.filterwarnings("ignore:Filling:wd_probe.WdProbeWarning")
@pytest.mark.filterwarnings("ignore:ShrinkingFirst:wd_probe.WdProbeWarning")
def test_they_are_counted(name, exact):
    model = three_layers()
    optimizer = own(name, model)
    probe = OpposingPenaltyProbe(model, optimizer, exact=exact)
    oracle = Oracle(model.named_parameters(), LR * RATE)
    train(model, optimizer, 4, oracle.before, oracle.after)
    for record in probe.records:
        found = {key: t.penalized for key, t in record.tensors.items()}
        assert found == {key: p.count_nonzero() for key, p in model.named_parameters()}
        still = [t for key, t in record.tensors.items() if key[0] == "2" or "spare" in key]
        assert [t.opposing for t in still] == [0] * 4
    oracle.agrees_with(probe.records)


@pytest.mark.parametrize("name", MAKES)
def test_the_audit_says_so(name):
    model = three_layers()
    (told,) = [line for line in audit(own(name, model), model).warnings if "no gradient" in line]
    assert "decays weights that have no gradient too, in 4 tensors (e.g. 0.weight)" in told


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.ASGD])
def test_others_leave_them_alone(make):
    model = three_layers()
    optimizer = make(model.parameters(), lr=LR, weight_decay=RATE)
    (group,) = optimizer.param_groups
    assert not any(effect_at_work(optimizer, group, p).ungraded for p in model.parameters())


def test_an_attached_method_leaves_them_alone():
    model = three_layers()
    optimizer = MAKES["filled adamw"](model.parameters(), lr=LR, weight_decay=0)
    WeightDecay(model, optimizer, "wd", rate=RATE)
    probe = OpposingPenaltyProbe(model, optimizer)
    kept = model[0].spare.weight.clone()
    loss_of(model, 0).backward()
    optimizer.step()
    assert torch.equal(model[0].spare.weight, kept)
    assert probe.records[0].tensors["0.spare.weight"].penalized == 0
