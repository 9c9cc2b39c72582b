import copy

import pytest
import torch
from torch import nn

from tests.test_probe import small, train
from wd_probe import InputError, WeightDecay


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wd_on_adam_is_torchs_adamw(dtype):
    model = small(dtype)
    twin = copy.deepcopy(model)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    with WeightDecay(model, adam, "wd", rate=0.3):
        train(model, adam, 20)
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.3), 20)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_wd_on_sgd_with_momentum_is_eq_1():
    """θ' = θ − ηU(θ) − ηλθ, written out."""
    model = small(torch.float64)
    twin = copy.deepcopy(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with WeightDecay(model, sgd, "wd", rate=0.3):
        train(model, sgd, 10)

    class Loop:
        def __init__(self):
            self.momentum = [torch.zeros_like(p) for p in twin.parameters()]

        @torch.no_grad()
        def step(self):
            for p, m in zip(twin.parameters(), self.momentum, strict=True):
                theta = p.clone()
                m.mul_(0.9).add_(p.grad)
                p.copy_(theta - 0.1 * m - 0.1 * 0.3 * theta)

        def zero_grad(self):
            for p in twin.parameters():
                p.grad = None

    train(twin, Loop(), 10)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["wd", "baseline"])
def test_rate_zero_and_baseline_change_nothing(method):
    model = small()
    twin = copy.deepcopy(model)
    sgd, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    with WeightDecay(model, sgd, method, rate=0.0 if method == "wd" else 0.5):
        train(model, sgd, 5)
    train(twin, plain, 5)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_chosen_parameters_alone_decay_and_those_without_gradient_do_not():
    model = nn.ModuleDict({k: nn.Linear(2, 2) for k in "ab"})
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(model)
    with WeightDecay(model, sgd, "wd", rate=0.5, parameters=["a.weight", "b.weight"]):
        for p in model["a"].parameters():
            p.grad = torch.zeros_like(p)
        sgd.step()
    assert torch.equal(model["a"].weight, before["a"].weight * 0.5)
    assert torch.equal(model["a"].bias, before["a"].bias)
    assert torch.equal(model["b"].weight, before["b"].weight)


def test_bad_input():
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="unknown method 'decay'; choose from baseline, wd"):
        WeightDecay(model, sgd, "decay", rate=0.1)
    with pytest.raises(InputError, match=r"rate must be a finite number ≥ 0, got -1"):
        WeightDecay(model, sgd, "wd", rate=-1)
    with pytest.raises(InputError, match="unknown convention 'eta'"):
        WeightDecay(model, sgd, "wd", rate=0.1, convention="eta")
    with pytest.raises(InputError, match="the model has no parameter named 'head'"):
        WeightDecay(model, sgd, "wd", rate=0.1, parameters=["head"])
    adamw = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    with pytest.raises(InputError, match=r"decays by itself \(weight_decay=0\.02 .*weight_decay=0"):
        WeightDecay(model, adamw, "wd", rate=0.1)
    with WeightDecay(model, sgd, "wd", rate=0.1), pytest.raises(InputError, match="already"):
        WeightDecay(model, sgd, "wd", rate=0.1)
