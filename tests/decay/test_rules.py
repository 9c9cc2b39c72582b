"""Rules of optimizers written here, whose rule is known, and of real ones."""

import copy
import math
import random
import warnings

import numpy as np
import pytest
import timm.optim
import torch
from torch import nn

from tests.small import small, train
from wd_probe import OpposingPenaltyProbe, WdProbeWarning, WeightDecay
from wd_probe.decay.rules import decay_effect, decay_share
from wd_probe.hooks import hooked


class Bent(torch.optim.Optimizer):
    """SGD whose decay is whatever ``take`` says."""

    def __init__(self, params, take, lr=0.1, weight_decay=0.01, **options):
        self.take = take
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "top": lr, **options})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    u_hat = p - group["lr"] * p.grad
                    c = group["lr"] * group["weight_decay"]
                    p.copy_(u_hat - self.take(c, p, u_hat, state, group))


def weights(*shape):
    return nn.Parameter(torch.randn(shape or (4, 4)))


def effect(optimizer, like=None, **options):
    (group,) = optimizer.param_groups
    return decay_effect(optimizer, group, group["params"][0] if like is None else like, **options)


CLOSED = {
    "none": (lambda c, p, u, s, g: 0 * p, ("none", 0, 1)),
    "wd": (lambda c, p, u, s, g: c * p, ("wd", 1, 1)),
    "rwd": (lambda c, p, u, s, g: c * u, ("rwd", 1, 1)),
    "proximal": (lambda c, p, u, s, g: u - u / (1 + c), ("proximal", 1, 1)),
    "seven": (lambda c, p, u, s, g: 7 * c * p, ("scaled", 7, 1)),
    "corrected": (lambda c, p, u, s, g: c * g["lr"] / g["top"] * p, ("scaled", 1, 2)),
    "fixed": (lambda c, p, u, s, g: g["weight_decay"] * p, ("scaled", 10, 0)),
    "late corrected": (lambda c, p, u, s, g: c * g["lr"] / g["top"] * u, ("rwd", 1, 2)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed_rules(name):
    take, expected = CLOSED[name]
    found = effect(Bent([weights()], take))
    assert (found.rule, pytest.approx(found.multiplier), found.power) == expected
    assert found.lr_seen == 0.1


OTHER = {
    "only where the gradient pulls": lambda c, p, u, s, g: c * p * ((p - u) * p > 0),
    "one side of a threshold": lambda c, p, u, s, g: c * p * (1 if p.norm() > 1 else 2),
    "by the gradient's direction": lambda c, p, u, s, g: (
        c * p * (1 if abs(float(((p - u) * p).sum())) > 1e-9 else 0.1)
    ),
    "by the shape": lambda c, p, u, s, g: c * p * max(1, p.shape[0] / p.shape[1]) ** 0.5,
    "every sixth step half": lambda c, p, u, s, g: c * p * (1 if s["step"] % 6 else 0.5),
    "not linear in λ": lambda c, p, u, s, g: c**2 * p,
    "to the sign": lambda c, p, u, s, g: c * p.sign(),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_no_closed_rule_fits_is_other(name):
    found = effect(Bent([weights()], OTHER[name]))
    assert found.rule == "other"
    assert math.isnan(found.multiplier)
    assert found.why.startswith(("a step takes off", "what is taken off"))


def test_the_live_factor():
    w = weights()
    for take, c in (
        (CLOSED["seven"][0], 7),
        (CLOSED["corrected"][0], 0.5),
        (CLOSED["fixed"][0], 20),
    ):
        optimizer = Bent([w], take)
        found = effect(optimizer)
        group = {"lr": 0.05, "weight_decay": 0.02}
        assert found.factor(group) == pytest.approx(c * 0.05 * 0.02, rel=1e-6)
        on_device = found.factor({"lr": torch.tensor(0.05), "weight_decay": 0.02})
        assert isinstance(on_device, torch.Tensor)
        assert float(on_device) == pytest.approx(c * 0.05 * 0.02, rel=1e-5)
    assert effect(Bent([w], CLOSED["wd"][0])).factor({"lr": 0.3, "weight_decay": 0.1}) == 0.3 * 0.1


TORCH = {
    "plain sgd": (lambda ps: torch.optim.SGD(ps, lr=0.1, weight_decay=0.1), "wd"),
    "momentum": (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1), "l2"),
    "maximize": (lambda ps: torch.optim.Adam(ps, maximize=True, weight_decay=0.1), "l2"),
    "adagrad": (lambda ps: torch.optim.Adagrad(ps, weight_decay=0.1), "l2"),
    "adamw": (lambda ps: torch.optim.AdamW(ps), "wd"),
    "tensor lr": (lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.1)), "wd"),
    "lr 0 in a warm-up": (lambda ps: torch.optim.AdamW(ps, lr=0.0), "wd"),
    "fused": (lambda ps: torch.optim.AdamW(ps, fused=True), "wd"),
    "one by one": (lambda ps: torch.optim.AdamW(ps, foreach=False, amsgrad=True), "wd"),
    "adam by flag": (lambda ps: torch.optim.Adam(ps, decoupled_weight_decay=True), "wd"),
    "no decay": (lambda ps: torch.optim.Rprop(ps), "none"),
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own(name, dtype):
    make, rule = TORCH[name]
    w = nn.Parameter(torch.randn(3, 5).to(dtype))
    optimizer = make([w])
    assert effect(optimizer).rule == rule
    if name not in ("tensor lr", "lr 0 in a warm-up"):
        w.grad = torch.ones_like(w)
        optimizer.step()
        assert effect(optimizer).rule == rule  # a used one as well


TIMM = {
    "adahessian": ("wd", 1, 1),  # steps only a gradient that has a graph
    "kron": ("wd", 1, 1),  # draws random numbers
    "laprop": ("rwd", 1, 1),
    "lapropc": ("rwd", 1, 2),
    "adan": ("proximal", 1, 1),
    "adamc": ("scaled", 1, 2),
    "madgradw": ("scaled", 0.9, 1),
    "adamp": ("other", None, 1),
    "sgdp": ("other", None, 1),
    "lamb": ("other", None, 1),
    "lambcw": ("other", None, 1),  # decoupled, if its trust ratio is clipped
    "lars": ("other", None, 1),
    "lookahead_adamw": ("other", None, 1),
}


@pytest.mark.parametrize("name", TIMM)
def test_timms(name):
    w = weights(4, 3, 2, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*opt_einsum.*")
        optimizer = timm.optim.create_optimizer_v2([w], name, lr=0.1, weight_decay=0.01)
    found = effect(optimizer)
    rule, multiplier, power = TIMM[name]
    assert (found.rule, found.power) == (rule, power)
    if multiplier is not None:
        assert found.multiplier == pytest.approx(multiplier)


TINY = {
    "adam": (torch.optim.Adam, "l2"),
    "rmsprop": (torch.optim.RMSprop, "l2"),
    "nadam": (torch.optim.NAdam, "l2"),
    "radam": (torch.optim.RAdam, "l2"),
    "adagrad": (torch.optim.Adagrad, "l2"),
    "momentum": (lambda ps, **k: torch.optim.SGD(ps, momentum=0.9, **k), "l2"),
    "adamw": (torch.optim.AdamW, "wd"),
    "fused": (lambda ps, **k: torch.optim.Adam(ps, fused=True, **k), "l2"),
    "a tensor": (lambda ps, lr, **k: torch.optim.Adam(ps, lr=torch.tensor(lr), **k), "l2"),
    "laprop": (timm.optim.LaProp, "rwd"),
}


@pytest.mark.parametrize("lr", [1e-6, 1e-8, 1e-30, 1e4])
@pytest.mark.parametrize("name", TINY)
def test_rules_are_those_of_a_learning_rate_that_shows_them(name, lr):
    make, rule = TINY[name]
    optimizer = make([weights()], lr=lr, weight_decay=0.01)
    found = effect(optimizer)
    assert found.rule == rule
    if rule != "l2":
        assert found.factor(optimizer.param_groups[0]) == pytest.approx(lr * 0.01)


def test_steps_too_small_to_tell_do_not_change_nothing():
    """Whose size the optimizer chooses itself, below what is seen at any learning rate."""

    class Creeping(Bent):
        def step(self, closure=None):
            (group,) = self.param_groups
            (p,) = group["params"]
            with torch.no_grad():
                p.sub_(1e-14 * (p.grad + group["weight_decay"] * p).sign() * p.grad.abs())

    found = effect(Creeping([weights()], CLOSED["none"][0]))
    assert (found.rule, found.why) == ("other", "its steps are too small to tell")
    package = pytest.importorskip("pytorch_optimizer")
    found = effect(package.DAdaptSGD([weights()], lr=0.1, weight_decay=0.01))
    assert found.rule == "l2"


def test_why_nothing_is_known():
    w = weights()
    adopt = timm.optim.create_optimizer_v2([w], "adoptw", lr=0.1, weight_decay=0.01)
    assert effect(adopt).why == "a step takes off 0 to 1 times ηλθ"
    assert effect(adopt, first_step=2).rule == "wd"
    wrapped = timm.optim.create_optimizer_v2([w], "lookahead_adamw", lr=0.1, weight_decay=0.01)
    assert effect(wrapped).why == "it cannot be stepped alone (it wraps another optimizer)"

    class Broken(torch.optim.AdamW):
        def step(self, closure=None):
            raise RuntimeError("out of order\nhere")

    assert effect(Broken([w])).why == "it cannot be stepped alone (out of order)"
    own_pace = torch.optim.AdamW([w])
    own_pace.param_groups[0]["lr"] = None
    assert effect(own_pace).why == "it chooses its own learning rate"


class Paired(torch.optim.SGD):
    """Steps two and two weights, each by what the other weighs, as optimizers of adapters do."""

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        for pair in zip(group["params"][::2], group["params"][1::2], strict=False):
            sizes = [p.norm() for p in pair]
            for p, size in zip(pair, reversed(sizes), strict=True):
                p.sub_(group["lr"] * (size * p.grad + group["weight_decay"] * p))


def test_weights_that_are_not_stepped_alone():
    """Their rule is not known, so a second step tells; methods keep Eq. 1."""
    found = effect(Paired([weights(), weights()], lr=0.1, weight_decay=0.1))
    assert (found.rule, found.why) == ("other", "its steps leave a lone tensor where it is")
    model, twin = small(torch.float64), small(torch.float64)
    own = Paired(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.warns(WdProbeWarning, match="its decay rule is not known, so R_op is measured"):
        probe = OpposingPenaltyProbe(model, own)
    plain = Paired(twin.parameters(), lr=0.1, weight_decay=0)
    WeightDecay(twin, plain, "wd", rate=0.1)
    closed = OpposingPenaltyProbe(twin, plain)
    train(model, own, 4)
    train(twin, plain, 4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for exact, record in zip(probe.records, closed.records, strict=True):
        assert (exact.penalized, exact.total.opposing) == (212, record.total.opposing)


@pytest.mark.parametrize("when", ["always", "without decay"])
def test_trial_steps_that_give_nan(when):
    class Spoiled(Bent):
        def step(self, closure=None):
            super().step()
            (group,) = self.param_groups
            if when == "always" or not group["weight_decay"]:
                group["params"][0].data.fill_(math.nan)

    found = effect(Spoiled([weights()], CLOSED["wd"][0]))
    assert (found.rule, found.why) == ("other", "its trial steps give numbers that are not finite")


def test_rules_whatever_torch_makes_by_default():
    """On a device without numbers, or of another precision."""
    adamw = torch.optim.AdamW([weights()], lr=0.1, weight_decay=0.01)
    for default in ("meta", "cpu"):
        with torch.device(default):
            assert effect(adamw).rule == "wd"
    for default in (torch.float64, torch.bfloat16):
        was = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            assert effect(adamw).rule == "wd"
        finally:
            torch.set_default_dtype(was)


def test_l2_added_to_the_gradient_in_place():
    class InPlace(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1, "weight_decay": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad.add_(p, alpha=group["weight_decay"]).sign(), alpha=group["lr"])

    assert effect(InPlace([weights()])).rule == "l2"


def test_random_steps_are_the_same_with_and_without_decay():
    class Noisy(Bent):
        def step(self, closure=None):
            (group,) = self.param_groups
            (p,) = group["params"]
            if p.grad is not None:
                p.grad.add_(random.random() + np.random.random() + torch.rand(()))
            super().step(closure)

    assert effect(Noisy([weights()], CLOSED["wd"][0])).rule == "wd"


class Counting(torch.optim.AdamW):
    """Keeps its own counter, its own random numbers and the weights themselves on itself."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.count, self.rng = 0, random.Random(0)
        self.kept = [p for group in self.param_groups for p in group["params"]]
        self.log = []

    def step(self, closure=None):
        self.count += 1
        self.log.append(self.rng.random() + float(torch.rand(())))
        self.log.append(random.random() + np.random.random())
        with torch.no_grad():
            for p in self.kept:
                p.add_(0.0 if p.is_meta else 0.1)
        return super().step(closure)


def test_nothing_is_disturbed():
    w = weights()
    optimizer = Counting([w], lr=0.1, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    w.grad = torch.randn_like(w)
    optimizer.step()
    schedule.step()
    fired = []
    optimizer.register_step_post_hook(lambda *_: fired.append(1))

    def everything():
        own = {
            k: v for k, v in vars(optimizer).items() if k in ("count", "log", "state", "defaults")
        }
        return repr(
            (own, optimizer.param_groups, w, w.grad, optimizer.rng.getstate(), random.getstate(),
             torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(),
             np.random.get_state()[2])
        )  # fmt: skip

    before = everything()
    group = optimizer.param_groups[0]
    decay_effect(optimizer, group, w)
    decay_share(optimizer, group, w, "wd")
    assert everything() == before
    assert fired == []
    copied = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copied)


@pytest.mark.parametrize(
    ("dtype", "c", "share"),
    [
        (torch.float32, 1e-3, 1e-3),
        (torch.float32, 1e-8, 0.0),  # 1 - 1e-8 == 1
        (torch.bfloat16, 1e-3, 0.0),
        (torch.bfloat16, 0.1, 0.1),
    ],
)
def test_the_share_of_stored_weights(dtype, c, share):
    w = nn.Parameter(torch.randn(64, 64).to(dtype))
    optimizer = torch.optim.AdamW([w], lr=0.01, weight_decay=c / 0.01)
    found = decay_share(optimizer, optimizer.param_groups[0], w, "wd")
    assert found == pytest.approx(share, rel=0.02)


def test_l2_has_no_share_of_its_own():
    w = weights()
    optimizer = torch.optim.Adam([w], weight_decay=0.1)
    assert math.isnan(decay_share(optimizer, optimizer.param_groups[0], w, "l2"))


@pytest.mark.filterwarnings("error")
def test_lookahead_is_known_by_what_it_wraps_also_once_one_was_copied():
    """Copying hooks the steps of the class, and leaves the copy without what it wraps."""
    net = nn.Linear(2, 2)
    wrapped = timm.optim.create_optimizer_v2(net, "lookahead_adamw", lr=0.1, weight_decay=0.1)
    copy.deepcopy(wrapped)
    assert hooked(wrapped) is wrapped._base_optimizer
