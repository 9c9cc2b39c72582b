"""Weights that decay at a rate which is not called weight_decay, or has no name."""

import math
import types
import warnings

import pytest
import torch
from torch import nn

from tests import reference
from tests.small import loss_of, small, train
from wd_probe import InputError, OpposingPenaltyProbe, WdProbeWarning, WeightDecay, audit
from wd_probe.decay.rules import decay_effect, effect_at_work

LR = 0.05


class Decaying(torch.optim.Optimizer):
    """Steps by the sign of the gradient, and takes c off ``when``."""

    def __init__(self, params, lr=LR, when="wd", **options):
        self.when = when
        super().__init__(params, {"lr": lr, **options})

    def c(self, group):
        return group["lr"] * group["wd"]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    c, u = self.c(group), group["lr"] * p.grad.sign()
                    if self.when == "wd":
                        p.mul_(1 - c).sub_(u)
                    elif self.when == "rwd":
                        p.sub_(u).mul_(1 - c)
                    elif self.when == "proximal":
                        p.sub_(u).div_(1 + c)
                    elif self.when == "l2":
                        p.sub_(group["lr"] * (p.grad + group["wd"] * p).sign())


class ByMuon(torch.optim.Optimizer):
    """As Moonlight's: matrices are made orthogonal, λ is group["wd"]."""

    def __init__(self, params, lr=LR, wd=0.3, momentum=0.95):
        super().__init__(params, {"lr": lr, "wd": wd, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                u = buffer / (buffer.norm() + 1e-7)
                for _ in range(5):
                    if u.ndim == 2:
                        u = 1.5 * u - 0.5 * u @ u.T @ u
                p.data.mul_(1 - group["lr"] * group["wd"])
                p.data.add_(u, alpha=-group["lr"])


class FromTheGroup(Decaying):
    def __init__(self, params, **options):
        super().__init__(params, wd=0.3, **options)


class WithoutEta(Decaying):
    def __init__(self, params, **options):
        super().__init__(params, decay=0.015, **options)

    def c(self, group):
        return group["decay"]


class FromTheOptimizer(Decaying):
    def __init__(self, params, **options):
        self.shrinkage = 0.3
        super().__init__(params, **options)

    def c(self, group):
        return group["lr"] * self.shrinkage


class FromItsSettings(Decaying):
    def __init__(self, params, **options):
        self.settings = types.SimpleNamespace(k=0.3, fast=True)
        super().__init__(params, **options)

    def c(self, group):
        return group["lr"] * self.settings.k


class FromItsClass(Decaying):
    RHO = 0.3

    def c(self, group):
        return group["lr"] * self.RHO


class FromTheCode(Decaying):
    def c(self, group):
        return group["lr"] * 0.3


class FromTheCodeWithoutEta(Decaying):
    def c(self, group):
        return 0.015


class BesideAWeightDecay(Decaying):
    def __init__(self, params, **options):
        super().__init__(params, wd=torch.tensor(0.3), weight_decay=0.0, scale=2.0, **options)


NAMED = {
    "muon": (ByMuon, "wd", 1),
    "group": (FromTheGroup, "wd", 1),
    "without η": (WithoutEta, "decay", 0),
    "optimizer": (FromTheOptimizer, "shrinkage", 1),
    "settings": (FromItsSettings, "k", 1),
    "class": (FromItsClass, "RHO", 1),
    "beside weight_decay": (BesideAWeightDecay, "wd", 1),
}
UNNAMED = {"code": (FromTheCode, "", 1), "code without η": (FromTheCodeWithoutEta, "", 0)}
PLACES = NAMED | UNNAMED


def at_work(optimizer, like=None):
    (group,) = optimizer.param_groups
    return effect_at_work(optimizer, group, group["params"][0] if like is None else like)


@pytest.mark.parametrize("ndim", [1, 2, 4])
@pytest.mark.parametrize("lr", [LR, 1e-7])
@pytest.mark.parametrize("place", PLACES)
def test_the_option_that_holds_the_rate_is_found(place, lr, ndim):
    make, name, power = PLACES[place]
    w = nn.Parameter(torch.randn((4, 3, 2, 2)[:ndim]))
    optimizer = make([w], lr=lr)
    found = at_work(optimizer)
    assert (found.name, found.power) == (name, power)
    assert found.rule in ("wd", "scaled")
    c = 0.015 if power == 0 else lr * 0.3
    assert float(found.factor(optimizer.param_groups[0])) == pytest.approx(c, rel=1e-5)
    rate = found.rate(optimizer.param_groups[0])
    assert math.isnan(rate) if not name else rate == pytest.approx(0.015 if power == 0 else 0.3)


@pytest.mark.parametrize("when", ["rwd", "proximal"])
@pytest.mark.parametrize("place", [one for one in PLACES if one not in ("muon", "code without η")])
def test_decay_after_the_step_is_told_from_decay_beside_it(place, when):
    make, name, _ = PLACES[place]
    optimizer = make([nn.Parameter(torch.randn(4, 3))], when=when)
    found = at_work(optimizer)
    assert (found.rule, found.name) == (when, name)
    assert float(found.factor(optimizer.param_groups[0])) == pytest.approx(0.015, rel=1e-5)


def test_l2_under_another_name():
    found = at_work(FromTheGroup([nn.Parameter(torch.randn(4, 3))], when="l2"))
    assert (found.rule, found.name) == ("l2", "wd")


def test_a_lone_decay_effect_knows_other_names_too():
    optimizer = FromTheGroup([w := nn.Parameter(torch.randn(4, 3))])
    assert decay_effect(optimizer, optimizer.param_groups[0], w).name == "wd"


class Noisy(Decaying):
    """Weights move without a gradient, and not towards zero."""

    def c(self, group):
        for p in group["params"]:
            p.add_(torch.randn_like(p), alpha=0.1)
        return 0.0


class Retracting(Decaying):
    """Keeps every tensor to a norm."""

    def c(self, group):
        for p in group["params"]:
            p.mul_(0.5 / p.norm())
        return 0.0


FREE = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=LR, momentum=0.9),
    "adam": torch.optim.Adam,
    "tiny": lambda ps: torch.optim.Adam(ps, lr=1e-12),
    "rprop": torch.optim.Rprop,
    "switched off": lambda ps: FromTheGroup(ps, when="none"),
    "noisy": Noisy,
    "retracting": Retracting,
    "fromage": lambda ps: pytest.importorskip("pytorch_optimizer").Fromage(ps, lr=0.1),
    "a small fromage": lambda ps: pytest.importorskip("pytorch_optimizer").Fromage(ps, lr=1e-3),
    "nero": lambda ps: pytest.importorskip("pytorch_optimizer").Nero(ps, lr=0.1),
}


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("name", FREE)
def test_what_does_not_decay_is_free(name, ndim):
    w = nn.Parameter(torch.randn((4, 3)[:ndim]))
    optimizer = FREE[name]([w])
    assert at_work(optimizer).rule == "none"
    WeightDecay(nn.ParameterList([w]), optimizer, "wd", rate=0.1)


# --- the audit, the refusal -----------------------------------------------------------------------


@pytest.mark.parametrize("place", NAMED)
def test_the_audit_names_what_decays(place):
    make, name, power = NAMED[place]
    model = small()
    report = audit(make(model.parameters()), model)
    assert report.rule == ("scaled" if power == 0 else "wd")
    assert report.factor == pytest.approx(0.015, rel=1e-3)
    rate = 0.015 if power == 0 else 0.3
    assert [t.weight_decay for t in report.tensors] == pytest.approx([rate] * 4)
    title = make.__name__
    (line,) = (one for one in report.warnings if one.startswith(f"{title} decays"))
    assert line == (
        f"{title} decays by its option {name}={rate:g}, not by weight_decay, in 4 tensors (e.g. "
        "0.weight)"
    )
    (line,) = (one for one in report.warnings if one.startswith("norms and biases decay"))
    assert line.endswith(f"give them a group with {name}=0")


@pytest.mark.parametrize("place", UNNAMED)
def test_the_audit_says_that_a_rate_is_unknown(place):
    make, _, _ = UNNAMED[place]
    model = small()
    report = audit(make(model.parameters()), model)
    assert report.rule == "scaled"
    assert report.factor == pytest.approx(0.015, rel=1e-3)
    assert all(math.isnan(t.weight_decay) and math.isnan(t.expected) for t in report.tensors)
    assert any(
        one.startswith(f"{make.__name__} decays, rate unknown, in 4 tensors (e.g. 0.weight): none")
        for one in report.warnings
    )


@pytest.mark.parametrize("place", PLACES)
def test_a_second_decay_is_refused(place):
    make, name, power = PLACES[place]
    model = small()
    optimizer = make(model.parameters())
    rate = "0.015" if power == 0 else "0.3"
    said = rf"\({name}={rate} in parameter group 0\); build it with {name}=0" if name else (
        r"\(rate unknown in parameter group 0\); none of its options ends that"
    )  # fmt: skip
    with pytest.raises(InputError, match="the optimizer decays by itself " + said):
        WeightDecay(model, optimizer, "wd", rate=0.1)


def test_a_second_decay_is_accepted_where_the_first_is_switched_off():
    model = small()
    WeightDecay(model, ByMuon(model.parameters(), wd=0.0), "wd", rate=0.1)


# --- the probe ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_the_probe_counts_what_it_takes_off(place):
    """While η changes."""
    make, _, power = PLACES[place]
    model = small()
    optimizer = make(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    opposing = 0
    for step, lr in enumerate((LR, LR, 0.3, 1e-3)):
        optimizer.param_groups[0]["lr"] = lr
        loss_of(model, step).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        c = 0.015 if power == 0 else lr * 0.3
        record = probe.records[-1]
        for name, p in model.named_parameters():
            expected = reference.tally(before[name], p.detach(), c)
            found = record.tensors[name]
            assert (found.penalized, found.opposing) == (p.numel(), expected["opposing"])
            assert found.total_penalty == pytest.approx(c * expected["total_size"], rel=1e-4)
            opposing += found.opposing
    assert opposing > 5


@pytest.mark.parametrize("place", ["group", "optimizer", "settings"])
def test_a_rate_that_changes_is_read_as_it_stands(place):
    make, name, _ = NAMED[place]
    model = small()
    optimizer = make(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    holder = {
        "group": optimizer.param_groups[0],
        "optimizer": vars(optimizer),
        "settings": vars(vars(optimizer).get("settings", optimizer)),
    }[place]
    sizes = []
    for rate in (0.3, 0.6, 0.0):
        holder[name] = rate
        before = sum(float(p.detach().abs().sum()) for p in model.parameters())
        train(model, optimizer, 1)
        sizes.append(probe.records[-1].total.total_penalty / (LR * before))
    assert sizes == pytest.approx([0.3, 0.6, 0.0], rel=1e-4)


def test_l2_under_another_name_is_measured_against_a_step_without_it():
    """The same counts as under its usual name."""

    class Usual(FromTheGroup):
        def __init__(self, params):
            Decaying.__init__(self, params, when="l2", weight_decay=0.3, wd=0.0)

        def step(self, closure=None):
            for group in self.param_groups:
                group["wd"] = group["weight_decay"]
            super().step(closure)
            for group in self.param_groups:
                group["wd"] = 0.0

    counts = []
    for make in (lambda ps: FromTheGroup(ps, when="l2"), Usual):
        model = small()
        optimizer = make(model.parameters())
        with pytest.warns(WdProbeWarning, match=r"its (wd|weight_decay) is L2 regularization"):
            probe = OpposingPenaltyProbe(model, optimizer)
        train(model, optimizer, 4)
        counts.append([record.total for record in probe.records])
    assert counts[0] == counts[1]
    assert counts[0][0].total_penalty > 0


def test_exact_measuring_gives_the_same_counts():
    counts = []
    for exact in (None, True):
        model = small(torch.float64)
        optimizer = FromTheOptimizer(model.parameters())
        probe = OpposingPenaltyProbe(model, optimizer, exact=exact)
        train(model, optimizer, 4)
        counts.append([(r.total.penalized, r.total.opposing) for r in probe.records])
    assert counts[0] == counts[1]


def test_what_cannot_be_measured_is_told():
    class Half(Decaying):
        """Takes another share off every second weight."""

        def c(self, group):
            for p in group["params"]:
                p.view(-1)[::2].mul_(0.99)
            return 0.001

    model = small()
    with pytest.warns(WdProbeWarning, match=r"Half, parameter group 0: it decays, rate unknown"):
        probe = OpposingPenaltyProbe(model, Half(model.parameters()), exact=True)
    assert audit(Half(model.parameters())).rule == "other"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, probe.optimizers[0], 2)
    assert not any(record.penalized for record in probe.records)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam])
def test_a_warm_up_from_a_tiny_learning_rate_is_measured(make):
    """All of it, and as a run that begins at the later one."""
    records = []
    for first in (1e-8, LR):
        model = small()
        optimizer = make(model.parameters(), lr=first, weight_decay=0.3)
        with pytest.warns(WdProbeWarning, match="its weight_decay is L2"):
            probe = OpposingPenaltyProbe(model, optimizer)
        train(model, optimizer, 1)
        optimizer.param_groups[0]["lr"] = LR
        train(model, optimizer, 3)
        records.append(probe.records)
    warmed, _ = records
    assert [record.penalized > 0 for record in warmed] == [True] * 4
    assert warmed[-1].total.total_penalty > 1e3 * warmed[0].total.total_penalty


def test_a_rule_is_looked_at_again_at_a_learning_rate_of_another_order():
    class Late(Decaying):
        """Decays at large learning rates alone."""

        def c(self, group):
            return group["lr"] * group["weight_decay"] * (group["lr"] > 0.02)

    model = small()
    optimizer = Late(model.parameters(), lr=1e-3, weight_decay=0.3)
    with pytest.warns(WdProbeWarning, match="its weight_decay changes nothing"):
        probe = OpposingPenaltyProbe(model, optimizer)
    train(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.1
    train(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 1e-3
    train(model, optimizer, 1)
    assert [record.penalized for record in probe.records] == [0, 212, 0]
