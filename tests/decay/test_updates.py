"""What steps depend on, and that wd is Eq. 1 where they read the weights."""

import copy
import warnings

import pytest
import timm.optim
import torch
from torch import nn
from torch.nn import functional as F

from tests.decay.test_moments import Reading
from tests.small import batch, small
from wd_probe import WeightDecay
from wd_probe.decay.updates import Updates


def timms(name, **options):
    def make(parameters):
        return timm.optim.create_optimizer_v2(list(parameters), name, weight_decay=0.0, **options)

    return make


def pytorch_optimizers(name, **options):
    def make(parameters):
        module = pytest.importorskip("pytorch_optimizer")
        return getattr(module, name)(parameters, weight_decay=0.0, **options)

    return make


READ = {
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.05),
    "lamb": timms("lamb", lr=0.05, always_adapt=True),
    "lambc": timms("lambc", lr=0.05, always_adapt=True),
    "lars": timms("lars", lr=0.05, always_adapt=True, trust_coeff=0.1),
    "fromage": lambda ps: pytest.importorskip("pytorch_optimizer").Fromage(ps, lr=0.05),
    "schedule-free": pytorch_optimizers("ScheduleFreeAdamW", lr=0.05),
    "ranger": pytorch_optimizers("Ranger", lr=0.05),
    "madgrad": timms("madgrad", lr=0.05),
    "own": lambda ps: Reading(ps, lr=0.05),
    "tensor lr": lambda ps: torch.optim.Adafactor(ps, lr=torch.tensor(0.05)),
}
UNREAD = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.05),
    "fused": lambda ps: torch.optim.Adam(ps, lr=0.05, fused=True),
    "foreach": lambda ps: torch.optim.Adam(ps, lr=0.05, foreach=True),
    "a tensor as lr": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.05)),
    "warm-up": lambda ps: torch.optim.RMSprop(ps, lr=1e-12),
    "zero": lambda ps: torch.optim.NAdam(ps, lr=0.0),
    "lion": timms("lion", lr=0.05),
    "lamb without a trust ratio": timms("lamb", lr=0.05),
    "adafactorbv": timms("adafactorbv", lr=0.05),
    "adamp": timms("adamp", lr=0.05),  # reads their direction alone
    "muon": timms("muon", lr=0.05),
}


@pytest.mark.parametrize("name", [*READ, *UNREAD])
def test_whether_a_step_reads_the_weights(name):
    matrix, vector = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))
    optimizer = (READ | UNREAD)[name]([matrix, vector])
    (group,) = optimizer.param_groups
    found = {Updates().reads_weights(optimizer, group, p) for p in (matrix, vector)}
    assert (True in found) == (name in READ)


def test_a_changed_flag_is_seen():
    updates, p = Updates(), nn.Parameter(torch.randn(5, 4))
    lamb = timms("lamb", lr=0.05)([p])
    (group,) = lamb.param_groups
    assert not updates.reads_weights(lamb, group, p)
    group["always_adapt"] = True
    assert updates.reads_weights(lamb, group, p)


def test_what_cannot_be_tried_is_taken_to_read():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of order")

    p = nn.Parameter(torch.randn(2))
    broken = Broken([p], lr=0.1)
    assert Updates().reads_weights(broken, broken.param_groups[0], p)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", [*READ, *UNREAD])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wd_is_eq_1_with_and_without_a_closure(name, closure):
    """θ' = θ − ηU(θ) − cθ, U that of the optimizer itself from the very same state."""
    model, rate = small(torch.float64), 0.5
    optimizer = (READ | UNREAD)[name](model.parameters())
    lr = float(optimizer.param_groups[0]["lr"])
    WeightDecay(model, optimizer, "wd", rate=rate)
    for step in range(7):  # past the period of Ranger's lookahead
        images, labels = batch(step, torch.float64)

        def grade(net, images=images, labels=labels):
            net.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            return loss

        twin = copy.deepcopy(model)
        stepped = (READ | UNREAD)[name](twin.parameters())
        stepped.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        grade(twin)
        stepped.step()
        theta = [p.detach().clone() for p in model.parameters()]
        if closure:
            optimizer.step(lambda: grade(model))
        else:
            grade(model)
            optimizer.step()
        for p, u_hat, was in zip(model.parameters(), twin.parameters(), theta, strict=True):
            torch.testing.assert_close(p, u_hat - lr * rate * was, rtol=1e-12, atol=1e-14)
        if lr > 1e-6:
            assert not torch.equal(p, u_hat)


def test_wd_is_eq_1_in_half_precision_and_with_many_layers_rates():
    model = small(torch.bfloat16)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    decay = WeightDecay(model, optimizer, "wd", rate=2.0, scale="max2")
    twin = copy.deepcopy(model)
    for net in (model, twin):
        F.cross_entropy(net(batch(0, torch.bfloat16)[0]).float(), batch(0)[1]).backward()
    torch.optim.Adafactor(twin.parameters(), lr=0.1).step()
    theta = [p.detach().clone() for p in model.parameters()]
    group = optimizer.param_groups[0]
    factors = [decay.factor(p, group) for p in model.parameters()]
    assert sorted(set(factors)) == pytest.approx([0.2, 0.4])
    optimizer.step()
    for p, u_hat, was, c in zip(model.parameters(), twin.parameters(), theta, factors, strict=True):
        torch.testing.assert_close(p, (u_hat.float() - c * was.float()).bfloat16())


def test_only_what_reads_the_weights_is_copied(monkeypatch):
    made = []
    clone = torch.Tensor.clone
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    WeightDecay(model, sgd, "wd", rate=0.5)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "clone", lambda t: made.append(t.numel()) or clone(t))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        sgd.step()
    assert max(made, default=0) <= 8


# --- maximize -------------------------------------------------------------------------------------


class Ascent(torch.optim.Optimizer):
    """Follows the gradient, whatever its options say."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=group["lr"])


CLIMB = {
    "sgd": lambda ps, wd: torch.optim.SGD(ps, lr=0.1, momentum=0.9, maximize=True, weight_decay=wd),
    "adam": lambda ps, wd: torch.optim.Adam(ps, lr=0.01, maximize=True, weight_decay=wd),
    "one by one": lambda ps, wd: torch.optim.Adam(
        ps, lr=0.01, maximize=True, weight_decay=wd, foreach=False
    ),
    "foreach": lambda ps, wd: torch.optim.Adam(
        ps, lr=0.01, maximize=True, weight_decay=wd, foreach=True
    ),
    "a tensor as lr": lambda ps, wd: torch.optim.Adam(
        ps, lr=torch.tensor(0.01), maximize=True, weight_decay=wd
    ),
    "fused": lambda ps, wd: torch.optim.Adam(
        ps, lr=0.01, maximize=True, weight_decay=wd, fused=True
    ),
    "rmsprop": lambda ps, wd: torch.optim.RMSprop(ps, lr=0.01, maximize=True, weight_decay=wd),
    "adagrad": lambda ps, wd: torch.optim.Adagrad(ps, lr=0.01, maximize=True, weight_decay=wd),
}


@pytest.mark.parametrize("name", CLIMB)
@pytest.mark.parametrize("scaled", [False, True])
def test_l2_where_the_objective_is_maximized_is_the_optimizers_own(name, scaled):
    """Some parameters are in a group that is minimized."""
    runs = []
    for wd in (0.0, 0.3):
        model = small(torch.float64)
        groups = [
            {"params": model[0].parameters()},
            {"params": model[2].parameters(), "maximize": False},
        ]
        optimizer = CLIMB[name](groups, wd)
        if not wd:
            WeightDecay(model, optimizer, "l2", rate=0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        for step in range(6):
            images, labels = batch(step, torch.float64)
            scaler.scale(F.cross_entropy(model(images), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if step == 3:
                optimizer.param_groups[1]["maximize"] = True
        runs.append(list(model.parameters()))
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["l1", "l2"])
def test_penalties_draw_towards_zero_whoever_follows_the_gradient(method):
    package = pytest.importorskip("pytorch_optimizer")
    for make in (
        lambda ps: torch.optim.SGD(ps, lr=0.1, maximize=True),
        lambda ps: torch.optim.SGD(ps, lr=0.1),
        Ascent,
        lambda ps: package.SGDW(ps, lr=0.1, weight_decay=0.0, maximize=True),
        lambda ps: package.AdaBelief(ps, lr=0.1, weight_decay=0.0, maximize=True),
        lambda ps: timm.optim.NAdamW(ps, lr=0.1, weight_decay=0.0, maximize=True),
        lambda ps: timm.optim.Lion(ps, lr=0.1, weight_decay=0.0, maximize=True),
    ):
        p = nn.Parameter(torch.tensor([3.0, -3.0]))
        model = nn.ParameterList([p])
        optimizer = make([p])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            WeightDecay(model, optimizer, method, rate=1.0)
        for _ in range(10):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert (p.abs() < 2.5).all(), (optimizer, p)
        assert torch.equal(p.grad.abs(), torch.zeros(2))


def test_ten_steps_of_l2_under_maximize():
    p = nn.Parameter(torch.ones(()))
    sgd = torch.optim.SGD([p], lr=0.1, maximize=True)
    WeightDecay(nn.ParameterList([p]), sgd, "l2", rate=1.0)
    for _ in range(10):
        p.grad = torch.zeros(())
        sgd.step()
    assert p.item() == pytest.approx(0.9**10)
