import copy
import gc
import math
import pickle
import warnings
import weakref

import pytest
import timm.optim
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests import reference
from tests.small import batch, loss_of, small, train
from wd_probe import (
    InputError,
    OpposingPenaltyProbe,
    WdProbeWarning,
    WeightDecay,
    layers,
    layerwise_rates,
)
from wd_probe.decay.methods import METHODS

DECAYING = [method for method in METHODS if method != "baseline"]
#: The methods whose share of the weight must stay below one.
SHRINKING = ["wd", "rwd", "pwd", "lpwd", "cautious", "corrected"]


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def scaled(model, factor):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(factor)
    return twin


# --- against the paper's algorithms, as loops -----------------------------------------------------


class Quadratic(nn.Module):
    """Three layers of weights pulled to points that move with every step."""

    def __init__(self, sizes=(3, 1, 4)):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for number, size in enumerate(sizes, start=1):
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))
            self.add_module(f"layer{number}", layer)

    def forward(self, t):
        return sum(
            ((p - self.target(t, i)).square().sum() / 2 for i, p in enumerate(self.parameters())),
            torch.zeros((), dtype=torch.float64),
        )

    @staticmethod
    def target(t, i):
        return math.sin(1.7 * t + i)

    def gradient(self, t, theta):
        return [[w - self.target(t, i) for w in layer] for i, layer in enumerate(theta)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("opt", ["adam", "momentum"])
@pytest.mark.parametrize("scale", [None, "eq9", "mean"])
def test_every_method_is_the_papers_algorithm(method, opt, scale):
    model, eta, lam = Quadratic(), 0.1, 0.8
    theta = [p.tolist() for p in model.parameters()]
    if opt == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=eta)
        update = reference.adam(model.gradient)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=eta, momentum=0.9)
        update = reference.momentum(model.gradient)
    expected = reference.decayed_training(
        method, theta, update, eta, lam, layers=scale, scale=scale or "max2"
    )
    with WeightDecay(model, optimizer, method, rate=lam, scale=scale):
        for t in range(1, 13):
            model(t).backward()
            optimizer.step()
            optimizer.zero_grad()
            for p, layer in zip(model.parameters(), next(expected), strict=True):
                torch.testing.assert_close(p.tolist(), layer, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("held", ["a number", "a tensor"])
@pytest.mark.parametrize("convention", ["lr*rate", "rate"])
def test_corrected_decay_follows_the_learning_rate_twice(held, convention):
    """c = ηλ·η/η_max (arXiv 2506.02285); a warm-up's η_max is what its schedule starts from."""
    model = small()
    twin = copy.deepcopy(model)

    def adam(ps):
        return torch.optim.Adam(ps, lr=torch.tensor(0.02) if held == "a tensor" else 0.02)

    optimizer, plain = adam(model.parameters()), adam(twin.parameters())
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda k: [0.1, 0.5, 1.0, 0.7, 0.2, 0.0][k])
        for one in (optimizer, plain)
    ]
    WeightDecay(model, optimizer, "corrected", rate=0.9, convention=convention)
    wd = WeightDecay(twin, plain, "wd", rate=0.9, convention=convention)
    for step in range(5):
        wd.rate = 0.9 * float(plain.param_groups[0]["lr"]) / 0.02
        for one, its in ((model, optimizer), (twin, plain)):
            loss_of(one, step).backward()
            its.step()
            its.zero_grad()
        for schedule in schedules:
            schedule.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_corrected_decay_goes_on_from_its_state():
    """Without a schedule's word η_max is the largest learning rate so far."""
    models = [small(), small()]
    for model, broken in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        decay = WeightDecay(model, optimizer, "corrected", rate=0.9)
        for step, lr in enumerate((0.1, 0.4, 0.2, 0.05)):
            if step == 2 and broken:
                state = decay.state_dict()
                assert state["tops"] == [[0.4]]
                decay.detach()
                decay = WeightDecay(model, optimizer, "corrected", rate=0.9)
                decay.load_state_dict(state)
            optimizer.param_groups[0]["lr"] = lr
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(*models)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cautious_decay_falls_on_weights_that_the_step_draws_in(dtype):
    """arXiv 2510.12402: θ − ηU − c·1[U⊙θ ≥ 0]⊙θ, whatever the optimizer, with a closure too."""
    for has_closure in (False, True):
        model = small(dtype)
        twin = copy.deepcopy(model)
        optimizer, plain = (torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin))
        WeightDecay(model, optimizer, "cautious", rate=0.9)
        masked = 0
        for step in range(6):
            before = [p.detach().clone() for p in twin.parameters()]

            def closure(of=model, its=optimizer, step=step):
                its.zero_grad()
                loss = loss_of(of, step)
                loss.backward()
                return loss

            if has_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            closure(twin, plain)
            plain.step()
            with torch.no_grad():
                for p, theta in zip(twin.parameters(), before, strict=True):
                    mask = (theta - p) * theta >= 0  # U = (θ − û) / η
                    masked += int((~mask).sum())
                    p -= 0.009 * theta * mask
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
        assert masked > 100


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rate_zero_and_baseline_change_nothing(method, dtype):
    model = small(dtype)
    twin = copy.deepcopy(model)
    sgd, plain = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin))
    with WeightDecay(model, sgd, method, rate=0.5 if method == "baseline" else 0.0):
        train(model, sgd, 5)
    train(twin, plain, 5)
    assert same(model, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", ["torch", "timm"])
def test_wd_on_adam_is_adamw(dtype, own):
    model = small(dtype)
    twin = copy.deepcopy(model)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    with WeightDecay(model, adam, "wd", rate=0.3):
        train(model, adam, 20)
    if own == "torch":
        adamw = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.3)
    else:
        adamw = timm.optim.create_optimizer_v2(
            twin, "adamw", lr=0.01, weight_decay=0.3, filter_bias_and_bn=False
        )
    train(twin, adamw, 20)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps, wd: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=wd),
        lambda ps, wd: torch.optim.Adam(ps, lr=0.01, weight_decay=wd),
        lambda ps, wd: torch.optim.Adam(ps, lr=0.01, weight_decay=wd, fused=True),
        lambda ps, wd: torch.optim.RMSprop(ps, lr=0.01, weight_decay=wd),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2_is_the_optimizers_own(make, dtype):
    model = small(dtype)
    twin = copy.deepcopy(model)
    ours, own = make(model.parameters(), 0), make(twin.parameters(), 0.3)
    with WeightDecay(model, ours, "l2", rate=0.3):
        train(model, ours, 20)
    train(twin, own, 20)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("method", ["l1", "l2"])
def test_gradients_are_the_callers_again_after_the_step(method):
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = batch(0)
    F.cross_entropy(model(images), labels).backward()
    kept = [p.grad for p in model.parameters()]
    before = [g.clone() for g in kept]
    with WeightDecay(model, sgd, method, rate=0.5):
        sgd.step()
    for p, g, was in zip(model.parameters(), kept, before, strict=True):
        assert p.grad is g
        assert torch.equal(g, was)


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.2, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.05),
    "adam-fused": lambda ps: torch.optim.Adam(ps, lr=0.05, fused=True),
    "lion": lambda ps: timm.optim.Lion(ps, lr=0.01),
}


def convnet(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 4, 2), nn.GELU(), nn.Flatten(), nn.Linear(12, 4)
    ).to(dtype)


@pytest.mark.parametrize("opt", OPTIMIZERS)
@pytest.mark.parametrize("make", [small, convnet])
@pytest.mark.parametrize("scale", [None, "max2"])
def test_rwd_is_pwd_read_at_another_moment(opt, make, scale):
    """Fact 8: started at (1 − c)θ₀, rwd is (1 − c) times pwd after every step, to the last bit."""
    pwd = make(torch.float64)
    rwd = copy.deepcopy(pwd)
    lr = OPTIMIZERS[opt](pwd.parameters()).defaults["lr"]
    shares = dict.fromkeys((name for name, _ in pwd.named_parameters()), lr * 0.5)
    if scale:
        for layer, rate in zip(found := layers(pwd), layerwise_rates(len(found), 0.5), strict=True):
            shares |= dict.fromkeys(layer.parameters, lr * rate)

    def decayed(model):
        return {name: p.detach() * (1 - shares[name]) for name, p in model.named_parameters()}

    rwd.load_state_dict(decayed(pwd))
    one, other = OPTIMIZERS[opt](pwd.parameters()), OPTIMIZERS[opt](rwd.parameters())
    WeightDecay(pwd, one, "pwd", rate=0.5, scale=scale)
    WeightDecay(rwd, other, "rwd", rate=0.5, scale=scale)
    for _ in range(25):
        train(pwd, one, 1)
        train(rwd, other, 1)
        assert all(torch.equal(p, decayed(pwd)[name]) for name, p in rwd.named_parameters())


@pytest.mark.parametrize("method", ["rwd", "pwd", "lpwd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("opt", ["sgd", "adam"])
def test_rwd_and_pwd_never_oppose(method, dtype, opt):
    """Eq. 8, counted on û itself."""
    model = small(dtype)
    optimizer = OPTIMIZERS[opt](model.parameters())
    seen, stood = [], {}

    def keep(*_):
        stood.update({p: p.detach().clone() for p in model.parameters()})

    def compare(*_):
        for p in model.parameters():
            u_hat = stood[p].double().flatten().tolist()
            after = p.detach().double().flatten().tolist()
            seen.extend(
                (reference.opposes(u, u - w), u != w) for u, w in zip(u_hat, after, strict=True)
            )

    if method == "rwd":
        WeightDecay(model, optimizer, method, rate=1.0)
        first = optimizer.register_step_post_hook(keep)  # between the step and the decay
        optimizer._optimizer_step_post_hooks.move_to_end(first.id, last=False)
        optimizer.register_step_post_hook(compare)
    else:
        WeightDecay(model, optimizer, method, rate=1.0)
        model.register_forward_pre_hook(keep, prepend=True)
        model.register_forward_pre_hook(compare)
    train(model, optimizer, 10)
    assert not any(opposes for opposes, _ in seen)
    assert sum(moved for _, moved in seen) > len(seen) / 4


@given(st.integers(1, 60), st.floats(1e-6, 10))
def test_layer_scales_have_the_means_they_should(n, rate):
    """Fact 12."""
    means = {scale: sum(layerwise_rates(n, rate, scale)) / n for scale in ("eq9", "max2", "mean")}
    assert means["eq9"] == pytest.approx(rate * (n + 1) / (2 * n))
    assert means["max2"] == pytest.approx(rate * (n + 1) / n)
    assert means["mean"] == pytest.approx(rate)


# --- when a decay before the forward pass happens -------------------------------------------------


def counted(model, optimizer, rate=0.5, lr=0.1, method="pwd"):
    """A pwd whose weights tell how often they were decayed (the gradient is zero)."""
    decay = WeightDecay(model, optimizer, method, rate=rate)

    def times():
        p = next(model.parameters())
        return round(math.log(p.detach().abs().max().item()) / math.log(1 - lr * rate))

    with torch.no_grad():
        next(model.parameters()).fill_(1.0)
    return decay, times


def zero_step(model, optimizer):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()


def test_pwd_decays_once_before_the_first_training_pass_after_a_step():
    model, (images, _) = small(torch.float64), batch(0, torch.float64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    _, times = counted(model, sgd)
    model.eval()
    model(images)
    assert times() == 0  # an evaluation sees what the last step left
    model.train()
    for _ in range(3):  # gradient accumulation, several passes
        model(images).sum().backward()
        assert times() == 1
    zero_step(model, sgd)
    assert times() == 1
    model(images)
    assert times() == 2


def test_pwd_with_closures_and_checkpointing_and_frozen_weights():
    from torch.utils.checkpoint import checkpoint

    model, (images, _) = small(torch.float64), batch(0, torch.float64)
    model[2].requires_grad_(False)
    frozen = copy.deepcopy(model[2])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    _, times = counted(model, sgd)

    def closure():
        sgd.zero_grad()
        loss = 0 * checkpoint(model, images, use_reentrant=False).sum()
        loss.backward()
        return loss

    for number in range(1, 4):
        sgd.step(closure)
        assert times() == number
    assert same(model[2], frozen)


class Lightninglike(nn.Module):
    """Its training step calls a part of it, and never itself."""

    def __init__(self):
        super().__init__()
        self.net = small(torch.float64)

    def training_step(self, step):
        images, labels = batch(step, torch.float64)
        return F.cross_entropy(self.net(images).float(), labels)


def test_pwd_where_the_loop_calls_a_part_of_the_model():
    model = Lightninglike()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = copy.deepcopy(model)
    WeightDecay(model, sgd, "pwd", rate=0.5)
    WeightDecay(plain.net, other := torch.optim.SGD(plain.parameters(), lr=0.1), "pwd", rate=0.5)
    for step in range(4):
        model.training_step(step).backward()
        sgd.step()
        sgd.zero_grad()
    train(plain.net, other, 4)
    assert same(model, plain)
    hooked = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    assert hooked == ["", "net"]


@pytest.mark.parametrize("compiled_first", [True, False])
def test_pwd_on_a_compiled_model(compiled_first):
    model = small()
    twin = copy.deepcopy(model)
    sgd, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    torch._dynamo.reset()
    if compiled_first:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        WeightDecay(compiled, sgd, "pwd", rate=0.5)
    else:
        WeightDecay(model, sgd, "pwd", rate=0.5)
        compiled = torch.compile(model, backend="eager")
    WeightDecay(twin, plain, "pwd", rate=0.5)
    train(compiled, sgd, 1)
    train(compiled, sgd, 1)
    with torch.compiler.set_stance(fail_on_recompile := "fail_on_recompile"):
        assert fail_on_recompile
        train(compiled, sgd, 4)
    train(twin, plain, 1)
    train(twin, plain, 1)
    train(twin, plain, 4)
    assert same(model, twin)


def test_a_step_without_a_training_pass_is_told_once():
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    WeightDecay(model, sgd, "pwd", rate=0.5)
    model.eval()
    probe = OpposingPenaltyProbe(model, sgd)
    with pytest.warns(WdProbeWarning, match="pwd took nothing off in this step: no forward") as t:
        train(model, sgd, 3)
    assert len(t) == 1
    model.train()
    train(model, sgd, 1)
    assert [record.penalized for record in probe.records] == [0, 0, 0, 212]


def test_copies_and_pickles_of_the_model_do_not_decay():
    model, (images, _) = small(torch.float64), batch(0, torch.float64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    decay, times = counted(model, sgd)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = copy.deepcopy(twin)
        twin.train()(images)
        assert same(twin, before)
    assert times() == 0
    decay.detach()
    decay.detach()
    model(images)
    assert times() == 0


def test_a_dropped_model_and_optimizer_are_freed():
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    WeightDecay(model, sgd, "pwd", rate=0.1)
    gone = weakref.ref(model)
    del model, sgd
    gc.collect()
    assert gone() is None


# --- closures, scalers, groups --------------------------------------------------------------------


@pytest.mark.parametrize("method", DECAYING)
def test_closures_give_the_same_weights(method):
    model = small(torch.float64)
    twin = copy.deepcopy(model)
    sgd, plain = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin))
    WeightDecay(model, sgd, method, rate=0.5)
    WeightDecay(twin, plain, method, rate=0.5)
    for step in range(5):
        images, labels = batch(step, torch.float64)

        def closure():
            sgd.zero_grad()
            loss = F.cross_entropy(model(images).float(), labels)  # noqa: B023
            loss.backward()
            return loss

        loss = sgd.step(closure) if step % 2 else sgd.step(closure=closure)
        assert loss.requires_grad
    train(twin, plain, 5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", DECAYING)
@pytest.mark.parametrize("fused", [True, False])
def test_gradient_scalers(method, fused):
    """Scaled gradients give the same weights; a voided step decays nothing, and not twice later."""
    model = small()
    twin = copy.deepcopy(model)
    adam, plain = (torch.optim.Adam(m.parameters(), lr=0.05, fused=fused) for m in (model, twin))
    WeightDecay(model, adam, method, rate=0.5)
    WeightDecay(twin, plain, method, rate=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in (0, 1, 1, 2):
        images, labels = batch(step)
        scaler.scale(F.cross_entropy(model(images), labels)).backward()
        if step == 1 and scaler.get_scale() == 4.0:
            model[0].weight.grad[0, 0] = math.inf
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(adam)
            assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        else:
            scaler.step(adam)
        scaler.update()
        adam.zero_grad()
    train(twin, plain, 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_groups_schedules_and_tensor_learning_rates():
    """c follows the live rate of each group."""
    model = nn.ModuleDict({k: nn.Linear(2, 2, bias=False) for k in "ab"})
    adam = torch.optim.Adam(
        [
            {"params": model["a"].parameters(), "lr": torch.tensor(0.5)},
            {"params": model["b"].parameters()},
        ],
        lr=0.25,
    )
    before = copy.deepcopy(model)
    with WeightDecay(model, adam, "rwd", rate=0.5) as decay:
        zero_step(model, adam)
        assert torch.equal(model["a"].weight, before["a"].weight * 0.75)
        assert torch.equal(model["b"].weight, before["b"].weight * 0.875)
        adam.param_groups[1]["lr"] = 1.0
        decay.rate = 0.25
        zero_step(model, adam)
        assert torch.equal(model["b"].weight, before["b"].weight * 0.875 * 0.75)


@pytest.mark.parametrize("method", ["wd", "rwd"])
def test_chosen_parameters_alone_decay_and_those_without_gradient_do_not(method):
    model = nn.ModuleDict({k: nn.Linear(2, 2) for k in "ab"})
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(model)
    with WeightDecay(model, sgd, method, rate=0.5, parameters=["a.weight", "b.weight"]):
        for p in model["a"].parameters():
            p.grad = torch.zeros_like(p)
        sgd.step()
    assert torch.equal(model["a"].weight, before["a"].weight * 0.5)
    assert torch.equal(model["a"].bias, before["a"].bias)
    assert torch.equal(model["b"].weight, before["b"].weight)


def test_layers_of_ones_own():
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    groups = layers(model)
    before = copy.deepcopy(model)
    with WeightDecay(model, sgd, "wd", rate=0.2, scale="eq9", groups=groups):
        zero_step(model, sgd)
    assert torch.equal(model[0].weight, before[0].weight * (1 - 0.1))
    assert torch.equal(model[2].weight, before[2].weight * (1 - 0.2))


@pytest.mark.parametrize("method", ["rwd", "pwd", "lpwd"])
def test_the_other_moment(method):
    """Fact 8: inside, pwd's weights are decayed and rwd's not yet; outside, the very same bits."""
    model = small(torch.float64)
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    decay = WeightDecay(model, adam, method, rate=0.5)
    train(model, adam, 3)
    before = copy.deepcopy(model)
    factors = [decay.factor(p, adam.param_groups[0]) for p in model.parameters()]
    assert factors == pytest.approx([0.05] * 4 if method != "lpwd" else [0.05, 0.05, 0.1, 0.1])
    with decay.at_other_moment():
        for p, was, c in zip(model.parameters(), before.parameters(), factors, strict=True):
            expected = was / (1 - c) if method == "rwd" else was * (1 - c)
            torch.testing.assert_close(p, expected, rtol=1e-14, atol=0)
    assert same(model, before)


def test_the_other_moment_is_left_bit_for_bit_however_it_ends():
    model = small()
    one, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    decay = WeightDecay(model, [one, other], "pwd", rate=0.5)
    before = copy.deepcopy(model)
    with decay.at_other_moment():
        assert not same(model, before)
    assert same(model, before)
    other.param_groups[0]["lr"] = 5.0
    with pytest.raises(InputError, match=r"would take off 2\.5 times"), decay.at_other_moment():
        pass
    assert same(model, before)


@pytest.mark.parametrize("method", ["l1", "l2", "wd"])
def test_a_step_that_another_hook_stops_is_decayed_once_when_it_is_taken(method):
    model, twin = small(torch.float64), small(torch.float64)
    made = []
    for net in (model, twin):
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        made.append((sgd, WeightDecay(net, sgd, method, rate=0.5)))
        F.cross_entropy(net(batch(0, torch.float64)[0]), batch(0)[1]).backward()
    (sgd, _), (plain, _) = made
    broken = [True]

    def stop(*_):
        if broken.pop():
            raise RuntimeError("not now")

    sgd.register_step_pre_hook(stop)
    with pytest.raises(RuntimeError, match="not now"):
        sgd.step()
    broken.append(False)
    sgd.step()
    plain.step()
    assert same(model, twin)
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    broken.append(False)
    for one in (sgd, plain):
        one.step()
    assert same(model, twin)


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("between", ["steps", "forward and step"])
def test_a_resumed_run_is_bit_identical(method, between):
    def make():
        model = small()
        adam = torch.optim.Adam(model.parameters(), lr=0.05)
        return model, adam, WeightDecay(model, adam, method, rate=0.5)

    whole, adam, _ = make()
    train(whole, adam, 7)
    first, adam, decay = make()
    train(first, adam, 3)
    if between != "steps":
        first(batch(9)[0])  # decayed already: not to be decayed again
    saved = copy.deepcopy((first.state_dict(), adam.state_dict(), decay.state_dict()))
    second, adam, decay = make()
    for part, state in zip((second, adam, decay), saved, strict=True):
        part.load_state_dict(state)

    def rest(model, optimizer):
        for step in range(3, 7):
            images, labels = batch(step)
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    continued, adam_whole, _ = make()
    train(continued, adam_whole, 3)
    rest(continued, adam_whole)
    rest(second, adam)
    assert same(second, continued)


def test_state_of_another_method_is_refused():
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with WeightDecay(model, sgd, "lpwd", rate=0.1) as decay:
        state = decay.state_dict()
    with (
        WeightDecay(model, sgd, "pwd", rate=0.1) as decay,
        pytest.raises(InputError, match=r"this state is of method 'lpwd', and .* has 'pwd'"),
    ):
        decay.load_state_dict(state)


# --- bad input ------------------------------------------------------------------------------------


def test_parameters_are_chosen_by_name():
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"by name, such as 'weight', got a Parameter$"):
        WeightDecay(net, optimizer, "wd", rate=0.1, parameters=[net.weight])


def test_bad_input():
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="unknown method 'decay'; choose from baseline, l1,"):
        WeightDecay(model, sgd, "decay", rate=0.1)
    with pytest.raises(InputError, match=r"rate must be a finite number ≥ 0, got -1"):
        WeightDecay(model, sgd, "wd", rate=-1)
    with pytest.raises(InputError, match=r"unknown convention 'eta'; choose from lr\*rate, rate"):
        WeightDecay(model, sgd, "wd", rate=0.1, convention="eta")
    with pytest.raises(InputError, match="unknown scale 'steep'; choose from eq9, max2"):
        WeightDecay(model, sgd, "wd", rate=0.1, scale="steep")
    with pytest.raises(InputError, match="the model has no parameter named 'head'"):
        WeightDecay(model, sgd, "wd", rate=0.1, parameters=["head"])
    adamw = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    with pytest.raises(InputError, match=r"decays by itself \(weight_decay=0\.02 .*weight_decay=0"):
        WeightDecay(model, adamw, "wd", rate=0.1)
    with WeightDecay(model, sgd, "wd", rate=0.1), pytest.raises(InputError, match="already"):
        WeightDecay(model, sgd, "pwd", rate=0.1)
    some = torch.optim.SGD(model[0].parameters(), lr=0.1)
    lacking = r"the optimizer lacks 2 of the 4 parameters to decay \('2.weight' first\); build it"
    with pytest.raises(InputError, match=lacking):
        WeightDecay(model, some, "wd", rate=0.1)
    WeightDecay(model, some, "wd", rate=0.1, parameters=["0.weight", "0.bias"]).detach()
    with pytest.raises(InputError, match="LBFGS moves the weights several times"):
        WeightDecay(model, torch.optim.LBFGS(model.parameters()), "pwd", rate=0.1)
    one = nn.Linear(2, 2)
    with pytest.raises(InputError, match="layer-wise decay needs a model of several layers"):
        WeightDecay(one, torch.optim.SGD(one.parameters(), lr=0.1), "lpwd", rate=0.1)
    with pytest.raises(InputError, match=r"no layer that holds the parameter '0\.weight'"):
        WeightDecay(model, sgd, "lpwd", rate=0.1, groups=layers(Quadratic()))
    with pytest.raises(InputError, match=r"rate must be a finite number ≥ 0, got 0\.1"):
        WeightDecay(model, sgd, "wd", rate="0.1")
    sparse = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"0 has sparse gradients.*sparse=False"):
        WeightDecay(sparse, torch.optim.SGD(sparse.parameters(), lr=0.1), "wd", rate=0.1)
    with torch.inference_mode():
        frozen = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"^weight was made under torch\.inference_mode\(\)"):
        WeightDecay(frozen, torch.optim.SGD(frozen.parameters(), lr=0.1), "wd", rate=0.1)
    empty = nn.Linear(2, 2, device="meta")
    with pytest.raises(InputError, match=r"^weight is on the meta device, without numbers"):
        WeightDecay(empty, torch.optim.SGD(empty.parameters(), lr=0.1), "wd", rate=0.1)


@pytest.mark.parametrize("method", ["wd", "rwd", "l1", "l2"])
def test_sparse_gradients_that_no_module_announces(method):
    table = nn.ParameterList([torch.ones(4, 2)])
    sgd = torch.optim.SGD(table.parameters(), lr=0.1)
    WeightDecay(table, sgd, method, rate=0.1)
    F.embedding(torch.tensor([1]), table[0], sparse=True).sum().backward()
    with pytest.raises(InputError, match=r"^0 has sparse gradients.*parameters="):
        sgd.step()


@pytest.mark.parametrize("method", ["wd", "rwd", "l1", "l2"])
def test_whole_numbers_with_a_gradient(method):
    table = nn.ParameterList([nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)])
    table.append(torch.ones(2))
    sgd = torch.optim.SGD(table.parameters(), lr=0.1)
    WeightDecay(table, sgd, method, rate=0.1)
    table[1].grad = torch.ones(2)
    sgd.step()
    table[0].grad = torch.ones(4, dtype=torch.int8)
    with pytest.raises(
        InputError, match=r"^0 has a gradient, and is of whole numbers.*parameters="
    ):
        sgd.step()


@pytest.mark.parametrize("method", DECAYING)
@pytest.mark.parametrize("what", ["complex", "no dimensions", "empty", "in inference mode"])
def test_weights_of_other_kinds(method, what):
    """Two steps with a gradient of zero; against the same of ordinary weights."""
    made = {
        "complex": lambda: torch.tensor([3 + 4j]),
        "no dimensions": lambda: torch.tensor(5.0),
        "empty": lambda: torch.empty(0),
        "in inference mode": lambda: torch.tensor([5.0]),
    }
    net = nn.ModuleList([nn.ParameterList([made[what]()]), nn.ParameterList([torch.tensor([5.0])])])
    net.forward = lambda: None
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with WeightDecay(net, sgd, method, rate=0.5, scale="mean" if method == "lpwd" else None):
        for _ in range(2):
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            net()
            with torch.inference_mode(what == "in inference mode"):
                sgd.step()
    one, usual = net.parameters()
    if method != "lpwd" and one.numel():
        assert one.detach().abs().item() == pytest.approx(usual.item())
    assert 0 < usual.item() < 5


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("method", ["wd", "rwd", "l1", "l2"])
def test_optimizers_that_take_a_hessian(method):
    """Which needs the weights of its graph as they were, and gradients that have one."""
    terms = {"l1": lambda p: 0.5 * p.sign(), "l2": lambda p: 0.5 * p}
    net, twin = small(), small()
    decay = None
    for one in (net, twin):
        hessian = timm.optim.create_optimizer_v2(one, "adahessian", lr=0.1, weight_decay=0)
        if one is net:
            decay = WeightDecay(net, hessian, method, rate=0.5)
        images, labels = batch(0)
        F.cross_entropy(one(images), labels).backward(create_graph=True)
        before = [p.detach().clone() for p in one.parameters()]
        if one is twin and method in terms:
            for p in one.parameters():
                p.grad = p.grad + terms[method](p.detach())
        hessian.step()
        for p in one.parameters():
            p.grad = None
    assert decay is not None
    for p, q, was in zip(net.parameters(), twin.parameters(), before, strict=True):
        taken = {"wd": 0.05 * was, "rwd": 0.05 * q}.get(method, 0)
        torch.testing.assert_close(p, q - taken)


@pytest.mark.parametrize("chosen", [None, ["0.weight", "2.weight"]])
@pytest.mark.parametrize("method", DECAYING)
def test_replaced_parameters_decay_and_the_old_ones_are_let_go(method, chosen):
    """As where a model is densified; parameters that are none of the model's come and go too."""
    model, strange = small(), nn.Linear(2, 2)
    sgd = torch.optim.SGD([*model.parameters(), *strange.parameters()], lr=0.1)
    alive = []
    decay = WeightDecay(model, sgd, method, rate=0.5, parameters=chosen)
    for wide in (16, 20, 24):
        model[0], model[2], strange = nn.Linear(8, wide), nn.Linear(wide, 4), nn.Linear(2, 2)
        sgd.param_groups[0]["params"] = [*model.parameters(), *strange.parameters()]
        alive += [weakref.ref(model[0].weight), weakref.ref(strange.weight)]
        train(model, sgd, 1)
        assert decay.decays(model[0].weight)
        assert decay.decays(model[0].bias) == (chosen is None)
        gc.collect()
    assert [one() is None for one in alive] == [True, True, True, True, False, False]
    model[2] = nn.Identity()
    model.append(nn.Linear(24, 4))
    sgd.param_groups[0]["params"] = list(model.parameters())
    model(batch(0)[0]).sum().backward()
    sgd.step()
    assert decay.decays(model[0].weight)


@pytest.mark.parametrize("method", SHRINKING)
def test_a_rate_that_flips_signs_is_refused_with_the_largest_allowed(method):
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    scaled = method == "lpwd"
    where = r"layer 2 of 2 \(2\)" if scaled else "the weights"
    allowed = 5 if scaled else 10
    message = (
        rf"{method} with rate 20 would take off {20 / allowed:g} times {where}, which flips "
        rf"signs; the largest allowed rate here is {allowed}"
    )
    with pytest.raises(InputError, match=message):
        WeightDecay(model, sgd, method, rate=20)
    WeightDecay(model, sgd, method, rate=allowed).detach()
    with WeightDecay(model, sgd, method, rate=allowed):
        sgd.param_groups[0]["lr"] = 0.2
        with pytest.raises(InputError, match="would take off 2 times"):
            train(model, sgd, 1)
    live = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    with WeightDecay(model, live, method, rate=allowed):
        live.param_groups[0]["lr"].fill_(0.2)
        with pytest.raises(InputError, match="would take off 2 times"):
            train(model, live, 1)
    sgd.param_groups[0]["lr"] = 1e-9
    with pytest.raises(InputError, match="largest allowed rate here is "):
        WeightDecay(model, sgd, method, rate=2.0, convention="rate")


@pytest.mark.parametrize("held", ["a number", "a tensor"])
@pytest.mark.parametrize("method", DECAYING)
def test_learning_rates_that_are_none_are_refused(method, held):
    """At once, and at the step that has them; 0 is one."""

    def of(lr):
        return torch.tensor(lr) if held == "a tensor" else lr

    for lr, said in (
        (-0.1, r"is -0\.1, with which decay would push weights away .* take maximize=True"),
        (math.nan, "is nan"),
        (math.inf, "is inf"),
    ):
        model = small()
        sgd = torch.optim.SGD(model.parameters(), lr=of(0.1))
        sgd.param_groups[0]["lr"] = of(lr)
        said = "the learning rate of parameter group 0 " + said
        before = copy.deepcopy(model)
        if method not in ("l1", "l2"):
            with pytest.raises(InputError, match=said):
                WeightDecay(model, sgd, method, rate=0.5)
        sgd.param_groups[0]["lr"] = of(0.1)
        WeightDecay(model, sgd, method, rate=0.5)
        sgd.param_groups[0]["lr"] = of(lr)
        with pytest.raises(InputError, match=said):
            train(model, sgd, 2)
        if method not in ("pwd", "lpwd"):
            assert same(model, before)
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=of(0.0))
    before = copy.deepcopy(model)
    WeightDecay(model, sgd, method, rate=0.5)
    train(model, sgd, 2)
    assert same(model, before)


@pytest.mark.parametrize("method", SHRINKING)
def test_a_convention_without_a_learning_rate_needs_none(method):
    """Where c = λ, it may be negative, or the optimizer's own affair."""
    for lr in (-0.1, None):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        sgd.param_groups[0]["lr"] = lr
        WeightDecay(model, sgd, method, rate=0.5, convention="rate", scale="mean")
        if lr is None:
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            sgd.param_groups[0]["lr"] = lr
            with pytest.raises(InputError, match=r"group 0 is .*own affair \(lr=None\).*'rate'"):
                WeightDecay(model, sgd, method, rate=0.5)


def test_rwd_that_leaves_nothing_has_no_other_moment():
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = WeightDecay(model, sgd, "rwd", rate=10.0)
    train(model, sgd, 1)
    assert not any(p.any() for p in model.parameters())
    with pytest.raises(InputError, match="rwd with c = 1 leaves nothing but zeros"):  # noqa: SIM117
        with decay.at_other_moment():
            pass
    decay.rate = 9.0
    with decay.at_other_moment():
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", ["l1", "l2"])
def test_penalties_in_the_gradient_have_no_largest_rate(method):
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with WeightDecay(model, sgd, method, rate=20):
        train(model, sgd, 1)


# --- measured -------------------------------------------------------------------------------------


def test_no_warning_without_a_reason():
    for method in METHODS:
        model = small()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            WeightDecay(model, sgd, method, rate=0.1)
            if method not in ("baseline", "l1", "l2"):
                OpposingPenaltyProbe(model, sgd)
            train(model, sgd, 2)
