"""What decay did: the ledger of real steps, its laws, and the states that follow."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tests import reference
from tests.small import loss_of, small, train
from wd_probe import OpposingPenaltyProbe, Tally, WdProbeWarning, WeightDecay
from wd_probe.decay.undecayed import undecayed
from wd_probe.probe.dynamics import (
    decaying,
    equilibrium_angle,
    momentum,
    remaining,
    state,
    state_of_most,
    timescale,
)
from wd_probe.probe.records import pooled

C = 0.05 * 0.3
LEDGER = ("squared", "along", "moved", "growth", "taken", "updated")


def sgd(ps):
    return torch.optim.SGD(ps, lr=0.05, momentum=0.9)


#: By name: the rule of the loop, the optimizer, and the method attached to it.
RULES = {
    "own wd": ("wd", lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.3), None),
    "own l2": ("exact", lambda ps: torch.optim.Adam(ps, lr=0.05, weight_decay=0.3), None),
    "none": ("none", lambda ps: torch.optim.Adam(ps, lr=0.05), None),
    "wd": ("wd", sgd, "wd"),
    "rwd": ("rwd", sgd, "rwd"),
    "pwd": ("pwd", sgd, "pwd"),
    "corrected": ("wd", sgd, "corrected"),
    "cautious": ("cautious", sgd, "cautious"),
    "l2": ("exact", sgd, "l2"),
    "l1": ("exact", sgd, "l1"),
}


def attach(name, model):
    """An optimizer and a probe of it."""
    _, make, method = RULES[name]
    optimizer = make(model.parameters())
    if method is not None:
        WeightDecay(model, optimizer, method, rate=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WdProbeWarning)
        return optimizer, OpposingPenaltyProbe(model, optimizer)


def flat(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_the_ledger_of_real_steps(name, dtype):
    model = small(dtype)
    optimizer, probe = attach(name, model)
    rule = RULES[name][0]
    exact = rule == "exact"
    for step in range(5):
        loss_of(model, step).backward()
        # the penalties of l2 and l1 are in the gradient only as the optimizer steps
        before, found = flat(model), undecayed(optimizer) if exact else {}
        u_hat = {key: found[p] for key, p in model.named_parameters() if found}
        optimizer.step()
        after, record = flat(model), probe.records[-1]
        loops = {
            key: reference.ledger(before[key], after[key], rule, C, u_hat.get(key))
            for key in before
        }
        for key, loop in loops.items():
            found = record.tensors[key]
            bound = 1e-6 * max(loop["squared"], 1e-12)
            for field in LEDGER:
                assert getattr(found, field) == pytest.approx(loop[field], rel=1e-5, abs=bound)
        whole = {field: sum(loop[field] for loop in loops.values()) for field in LEDGER}
        x, y = (torch.cat([t.double().flatten() for t in s.values()]) for s in (before, after))
        total = record.total
        assert total.norm == pytest.approx(float(y.norm()), rel=1e-6)
        angle = math.acos(min(1.0, float(x @ y / x.norm() / y.norm())))
        assert total.angular_update == pytest.approx(angle, rel=1e-4)
        moved = math.sqrt(whole["updated"] / whole["squared"])
        assert total.relative_update == pytest.approx(moved, rel=1e-4)
        if rule == "none":
            assert math.isnan(total.balance)
            assert (total.remaining, total.timescale, total.taken) == (1, math.inf, 0)
        else:
            assert total.balance == pytest.approx(whole["growth"] / whole["taken"], rel=1e-3)
        optimizer.zero_grad()


@pytest.mark.parametrize("name", [name for name in RULES if name != "none"])
def test_growth_less_what_is_taken_is_the_change(name):
    """The identity of fact 20, over all steps; of pwd from the weights before its decay."""
    model = small(torch.float64)
    optimizer, probe = attach(name, model)
    start = sum(float(p.detach().square().sum()) for p in model.parameters())
    train(model, optimizer, 12)
    end = sum(float(p.detach().square().sum()) for p in model.parameters())
    total = probe.total.total
    assert total.taken > 0
    assert total.growth - total.taken == pytest.approx(end - start, rel=1e-6)


def test_what_remains_follows_the_live_learning_rate():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    every = [OpposingPenaltyProbe(model, optimizer, every=n) for n in (1, 3)]
    left = 1.0
    for step in range(8):
        loss_of(model, step).backward()
        left *= 1 - 0.5 * optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for probe in every:  # steps that are not measured decay the weights, too
            assert probe.total.total.remaining == pytest.approx(left, rel=1e-12)
    assert every[0].records[-1].total.timescale == pytest.approx(1 / (0.05 * 0.8**7))


def test_what_remains_layer_by_layer():
    model = small()
    optimizer = sgd(model.parameters())
    WeightDecay(model, optimizer, "lpwd", rate=0.3)
    probe = OpposingPenaltyProbe(model, optimizer)
    train(model, optimizer, 4)
    first, second = probe.total.layers
    assert first.remaining == pytest.approx((1 - 0.05 * 0.3) ** 4)
    assert second.remaining == pytest.approx((1 - 0.05 * 0.6) ** 4)
    assert second.timescale == pytest.approx(1 / 0.03)
    mean = (144 * first.remaining + 68 * second.remaining) / 212
    assert probe.total.total.remaining == pytest.approx(mean)


@pytest.mark.parametrize("name", ["own wd", "own l2", "rwd"])
def test_a_probe_goes_on_from_its_state_to_the_bit(name):
    model = small()
    optimizer, probe = attach(name, model)
    train(model, optimizer, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WdProbeWarning)
        other = OpposingPenaltyProbe(model, optimizer)
    other.load_state_dict(probe.state_dict())
    assert other.total == probe.total
    for step in range(7, 80):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert other.total == probe.total
    assert other.late == probe.late
    assert other.records[-1] == probe.records[-1]


def test_a_state_of_before_there_was_a_ledger():
    model = small()
    optimizer, probe = attach("own wd", model)
    train(model, optimizer, 2)
    state = probe.state_dict()
    old = {"steps": 2, "names": state["names"], "values": [row[:6] for row in state["values"]]}
    other = OpposingPenaltyProbe(model, optimizer)
    other.load_state_dict(old)
    assert other.total.total.opposing == probe.total.total.opposing
    assert other.total.total.total_penalty == probe.total.total.total_penalty
    train(model, optimizer, 1)
    assert other.total.total.remaining == pytest.approx(1 - C)


def test_voided_steps_take_nothing():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3, fused=True)
    probes = [OpposingPenaltyProbe(model, optimizer, every=n) for n in (1, 2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    for probe in probes:
        assert probe.total.total.remaining == pytest.approx((1 - C) ** 3)


def test_parameters_put_in_the_place_of_others_have_lost_nothing_yet():
    model = small()
    optimizer, probe = attach("own wd", model)
    train(model, optimizer, 3)
    model[0] = nn.Linear(8, 16)
    optimizer.state.clear()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, 1)
    found = probe.total.tensors
    assert found["0.weight"].remaining == pytest.approx(1 - C)
    assert found["2.weight"].remaining == pytest.approx((1 - C) ** 4)


# --- oracles without training (fact 25) -----------------------------------------------------------


class Walk(torch.optim.Optimizer):
    """Takes ηλθ off, and steps by η times momentum over directions of one length."""

    def __init__(self, params, lr, weight_decay, beta=0.0, length=1.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.beta, self.length = beta, length

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.mul_(self.beta).add_(p.grad, alpha=1 - self.beta)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(mean, alpha=group["lr"] * self.length)


def walked(c, beta, steps, length=1.0, start=1.0):
    generator = torch.Generator().manual_seed(0)
    weights = nn.ParameterList([nn.Parameter(torch.randn(20_000, generator=generator))])
    p = weights[0]
    with torch.no_grad():
        p.mul_(start / p.norm())
    lr = 0.1
    optimizer = Walk([p], lr, c / lr, beta, length)
    probe = OpposingPenaltyProbe(weights, optimizer)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=generator)
        p.grad /= p.grad.norm()
        optimizer.step()
    return p, probe


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_random_walk_comes_to_equilibrium(beta):
    """Balance 1, and the angle √(2c(1 − β)/(1 + β)) (fact 24)."""
    c = 0.02
    p, probe = walked(c, beta, 400)
    late = probe.records[-50:]
    growth, taken = (sum(getattr(r.total, name) for r in late) for name in ("growth", "taken"))
    assert growth / taken == pytest.approx(1, abs=0.05)
    angle = np.mean([r.total.angular_update for r in late])
    assert angle == pytest.approx(math.sqrt(2 * c * (1 - beta) / (1 + beta)), rel=0.05)
    if not beta:
        assert pytest.approx(2 * c * float(p.detach().square().sum()), rel=0.05) == 0.1**2
    assert state(probe.total.total, probe.late.total) == "balanced"


def test_without_a_step_weights_only_shrink():
    p, probe = walked(0.02, 0.0, 100, length=0.0)
    total = probe.total.total
    assert total.balance == pytest.approx(0, abs=1e-5)
    assert total.angular_update == pytest.approx(0, abs=1e-5)
    assert total.relative_update == pytest.approx(0, abs=1e-5)
    assert total.remaining == pytest.approx(0.98**100)
    assert float(p.detach().norm()) == pytest.approx(total.remaining, rel=1e-4)
    assert state(total, probe.late.total) == "shrinking"


def test_weights_that_grow_in_spite_of_decay():
    _, probe = walked(0.002, 0.0, 100, start=0.1)
    assert probe.total.total.remaining < 0.95
    assert state(probe.total.total, probe.late.total) == "growing"


def test_decay_that_has_taken_a_twentieth_at_most_is_idle():
    for steps, expected in ((100, "idle"), (110, "shrinking")):
        _, probe = walked(5e-4, 0.0, steps, length=0.0)
        assert state(probe.total.total, probe.late.total) == expected
    counts = Tally(1, 0, 0, 0, 0.0, 0.0)
    assert state(counts, counts) == "idle"


def test_the_state_is_that_of_the_last_quarter():
    """A walk that begins far out: it shrinks for long, and comes to balance."""
    _, probe = walked(0.02, 0.0, 60, start=5.0)
    assert state(probe.total.total, probe.late.total) == "shrinking"
    _, probe = walked(0.02, 0.0, 400, start=5.0)
    assert probe.total.total.balance < 0.5
    assert state(probe.total.total, probe.late.total) == "balanced"
    late = probe.records[-100:]
    growth, taken = (sum(getattr(r.total, name) for r in late) for name in ("growth", "taken"))
    assert probe.late.total.balance == pytest.approx(growth / taken, rel=0.05)


def test_the_state_of_a_whole_is_that_of_most_weights():
    assert state_of_most([("idle", 10), ("balanced", 30), ("idle", 15)]) == "balanced"
    assert state_of_most([("idle", 10), ("balanced", 10), ("idle", 1)]) == "idle"
    assert state_of_most([]) == "idle"


# --- what a verdict is told by ----------------------------------------------------------------


def test_decay_at_a_constant_share():
    assert timescale(1e-6) == pytest.approx(1e6)
    assert timescale(0.0) == math.inf
    assert remaining(0.01, 100) == pytest.approx(0.99**100)
    assert (remaining(2.0, 3), remaining(0.0, 9)) == (0.0, 1.0)


def test_only_tensors_that_decay_are_kept():
    model = small()
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": weights}, others], lr=0.05, weight_decay=0.3)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        train(model, optimizer, 3)
    kept = decaying(probe.total)
    for name, tally in probe.total.tensors.items():
        assert kept.tensors[name] == (tally if name.endswith("weight") else pooled([]))
    assert kept.total.growth < probe.total.total.growth
    assert decaying(kept) == kept


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_the_angle_of_equilibrium_is_that_of_a_random_walk(beta):
    """Random steps with momentum on weights whose size nothing sees (theory fact 25)."""
    c, step = 0.01, 0.1
    dice = np.random.default_rng(0)
    x, velocity = dice.normal(size=20_000), np.zeros(20_000)
    angles = []
    for k in range(1500):
        velocity = beta * velocity + dice.normal(size=x.size)
        y = x - step * velocity - c * x
        if k >= 1000:
            cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            angles.append(math.acos(cosine))
        x = y
    assert np.mean(angles) == pytest.approx(equilibrium_angle(c, beta), rel=0.03)


def test_momentum_is_known_of_plain_optimizers_alone():
    ps = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    assert momentum([torch.optim.AdamW(ps, betas=(0.8, 0.9))]) == 0.8
    assert momentum([torch.optim.SGD(ps, lr=0.1)]) == 0
    assert momentum([sgd(ps[:1]), torch.optim.Adam(ps[1:])]) == 0.9
    for unknown in (
        [torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True)],
        [torch.optim.SGD(ps, lr=0.1, momentum=1.5)],
        [torch.optim.NAdam(ps)],
        [sgd(ps[:1]), torch.optim.Adam(ps[1:], betas=(0.8, 0.9))],
        [],
    ):
        assert math.isnan(momentum(unknown))
