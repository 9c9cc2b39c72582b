import copy
import math
import random
import threading
import warnings
from fractions import Fraction

import numpy as np
import pytest
import timm
import timm.optim
import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional as F

from tests import reference
from tests.small import batch, small, train
from wd_probe import InputError, OpposingPenaltyProbe, WdProbeWarning, WeightDecay, layers
from wd_probe.decay.methods import attached


def oracle(model, optimizer, factors, steps):
    """Train while counting every step with the float64 oracle: one dict per step and tensor."""
    found, kept = [], {}

    def before():
        kept.clear()
        kept.update({name: p.detach().clone() for name, p in model.named_parameters()})

    def after():
        found.append(
            {
                name: reference.tally(kept[name], p.detach(), factors(name))
                for name, p in model.named_parameters()
            }
        )

    train(model, optimizer, steps, before, after)
    return found


TORCH = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.3),
    "adamw-fused": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.3, fused=True),
    "adamw-single": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.3, foreach=False),
    "adam-flag": lambda ps: torch.optim.Adam(
        ps, lr=0.05, weight_decay=0.3, decoupled_weight_decay=True
    ),
    "nadam-flag": lambda ps: torch.optim.NAdam(
        ps, lr=0.05, weight_decay=0.3, decoupled_weight_decay=True
    ),
    "radam-flag": lambda ps: torch.optim.RAdam(
        ps, lr=0.05, weight_decay=0.3, decoupled_weight_decay=True
    ),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.05, weight_decay=0.3),
    "tensor-lr": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.05), weight_decay=0.3),
}
TIMM = [
    "adamw", "nadamw", "lion", "adabelief", "adafactorbv", "mars", "radamw", "sgdw",
    pytest.param(
        "muon",
        marks=pytest.mark.skipif(
            Version(timm.__version__) < Version("1.0.27"),
            reason="Muon of timm before 1.0.27 has a rate of its own for vectors",
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_steps_agree_with_the_oracle_on_every_weight(name, dtype):
    if name == "tensor-lr" and dtype is torch.bfloat16:
        pytest.skip("torch's foreach AdamW does not mix a float32 tensor rate with bfloat16")
    model = small(dtype)
    optimizer = TORCH[name](model.parameters())
    with OpposingPenaltyProbe(model, optimizer) as probe:
        expected = oracle(model, optimizer, lambda _: 0.05 * 0.3, 12)
    assert [record.step for record in probe.records] == list(range(1, 13))
    assert sum(record.total.opposing for record in probe.records) > 5
    for record, tensors in zip(probe.records, expected, strict=True):
        for tensor, counts in tensors.items():
            tally = record.tensors[tensor]
            assert tally.penalized == counts["penalized"]
            assert tally.opposing == counts["opposing"]
            assert tally.flipped == counts["flipped"]
            assert tally.total_penalty == pytest.approx(0.015 * counts["total_size"], rel=1e-5)


@pytest.mark.parametrize("name", TIMM)
def test_timms_decoupled_optimizers_agree_with_the_oracle(name):
    model = small()
    optimizer = timm.optim.create_optimizer_v2(
        model, name, lr=0.1, weight_decay=0.3, filter_bias_and_bn=False
    )
    with OpposingPenaltyProbe(model, optimizer) as probe:
        expected = oracle(model, optimizer, lambda _: 0.1 * 0.3, 8)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [record.total.opposing for record in probe.records] == counts
    assert sum(counts) > 0


def test_muon_where_torch_has_it():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.05, weight_decay=0.3)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        expected = oracle(model, optimizer, lambda _: 0.05 * 0.3, 8)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [record.total.opposing for record in probe.records] == counts
    assert sum(counts) > 0


@pytest.mark.parametrize("convention", ["lr*rate", "rate"])
@pytest.mark.parametrize("opt", ["momentum", "adam", "lamb", "lookahead_momentum"])
def test_wd_on_any_optimizer_in_both_conventions(convention, opt):
    model = small()
    optimizer = timm.optim.create_optimizer_v2(model, opt, lr=0.1, filter_bias_and_bn=False)
    c = 0.2 * 0.1 if convention == "lr*rate" else 0.2
    with (
        WeightDecay(model, optimizer, "wd", rate=0.2, convention=convention),
        OpposingPenaltyProbe(model, optimizer) as probe,
    ):
        if opt.startswith("lookahead"):
            train(model, optimizer, 10)
            assert len(probe.records) == 10
            return
        expected = oracle(model, optimizer, lambda _: c, 10)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [record.total.opposing for record in probe.records] == counts
    assert sum(counts) > 0


@pytest.mark.parametrize("keep", ["whole", "half", "nothing"])
@pytest.mark.parametrize("name", [*TORCH, "sgd-wd"])
def test_weights_are_bit_identical_with_the_probe_on_or_off(name, keep):
    def run(probed):
        model = small()
        if name == "sgd-wd":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            WeightDecay(model, optimizer, "wd", rate=0.1)
        else:
            optimizer = TORCH[name](model.parameters())
        if probed:
            probe = OpposingPenaltyProbe(model, optimizer, profile=[0.1, 1.0], keep=keep)
            assert not optimizer.state
        drawn = torch.rand(3)
        train(model, optimizer, 6)
        assert not probed or len(probe.records) == 6
        return list(model.parameters()), optimizer.state_dict(), drawn

    (plain, plain_state, plain_drawn), (probed, state, drawn) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))
    assert torch.equal(plain_drawn, drawn)
    assert str(plain_state) == str(state)


def test_r_op_follows_the_learning_rate_and_hardly_the_decay_rate():
    """Fact 3, measured."""

    def rate(lr, weight_decay):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        with OpposingPenaltyProbe(model, optimizer) as probe:
            train(model, optimizer, 30)
        assert all(r.flip_rate <= r.rate for r in probe.records)
        return sum(r.rate for r in probe.records) / 30

    assert rate(1e-2, 0.0005) == pytest.approx(rate(1e-2, 0.05), rel=0.05)
    assert rate(1e-2, 0.05) > 3 * rate(1e-3, 0.05)


def test_groups_frozen_weights_and_missing_gradients():
    """Fact 6: what is not penalized is in neither numerator nor denominator."""
    model = nn.ModuleDict({k: nn.Linear(4, 4) for k in ("a", "b", "c", "d")})
    model["b"].requires_grad_(False)
    with torch.no_grad():
        model["a"].bias.zero_()
    optimizer = torch.optim.AdamW(
        [
            {"params": model["a"].parameters(), "lr": 0.1, "weight_decay": 0.5},
            {"params": model["b"].parameters(), "weight_decay": 0.5},
            {"params": model["c"].parameters(), "weight_decay": 0.0},
            {"params": model["d"].parameters(), "weight_decay": 0.25},
        ],
        lr=0.2,
    )
    with OpposingPenaltyProbe(model, optimizer) as probe:
        sum(model[k](torch.ones(1, 4)).sum() for k in "abc").backward()
        model["d"].weight.grad = torch.zeros(4, 4)
        size = model["d"].weight.abs().sum().item()
        optimizer.step()
    record = probe.records[0]
    sizes = {name: tally.penalized for name, tally in record.tensors.items() if tally.penalized}
    assert sizes == {"a.weight": 16, "d.weight": 16}
    assert record.tensors["d.weight"].total_penalty == pytest.approx(0.2 * 0.25 * size, rel=1e-5)
    assert math.isnan(record.tensors["c.weight"].rate)
    assert record.penalized == 32


def test_live_learning_rates():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    sizes = []
    with OpposingPenaltyProbe(model, optimizer) as probe:
        train(
            model,
            optimizer,
            4,
            before=lambda: sizes.append(sum(p.abs().sum().item() for p in model.parameters())),
            after=schedule.step,
        )
    factors = [r.total.total_penalty / s for r, s in zip(probe.records, sizes, strict=True)]
    assert factors == pytest.approx([0.05, 0.025, 0.0125, 0.00625], rel=1e-5)


def test_every_and_drain_and_layers():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    probe = OpposingPenaltyProbe(model, optimizer, every=3)
    train(model, optimizer, 7)
    assert [r.step for r in probe.drain()] == [1, 4, 7]
    assert probe.records == ()
    train(model, optimizer, 3)
    record = probe.records[0]
    assert record.step == 10
    assert [(t.index, t.name) for t in record.layers] == [(1, "0"), (2, "2")]
    assert sum(t.penalized for t in record.layers) == record.penalized
    assert sum(t.opposing for t in record.layers) == record.total.opposing
    probe.close()
    probe.close()
    train(model, optimizer, 3)
    assert [r.step for r in probe.records] == [10]
    assert not optimizer._optimizer_step_pre_hooks


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        model(torch.ones(1, 6)).sum().backward()
        optimizer.step()
    assert probe.records[0].penalized == 36


L2 = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.1, weight_decay=0.01),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=0.1, weight_decay=0.01),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.1, weight_decay=0.01),
}


def stepped_without(make, model, optimizer):
    """û of every parameter: another optimizer of the kind, loaded with this one's state, steps."""
    twin = copy.deepcopy(model)
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    other = make(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in other.param_groups:
        group["weight_decay"] = 0
    other.step()
    return {name: p.detach() for name, p in twin.named_parameters()}


def counted_exactly(make, model, optimizer, steps):
    """Eq. 10 and 11 on û and P = û − θ', weight by weight, in rational numbers."""
    found, u_hat = [], {}

    def before():
        u_hat.update(stepped_without(make, model, optimizer))

    def after():
        pairs = [
            (u, Fraction(u) - Fraction(w))
            for name, p in model.named_parameters()
            for u, w in zip(
                u_hat[name].double().flatten().tolist(), p.double().flatten().tolist(), strict=True
            )
        ]
        opposing = [p for u, p in pairs if reference.opposes(u, p)]
        taken = float(sum(abs(p) for _, p in pairs))
        found.append(
            (
                sum(p != 0 for _, p in pairs),
                len(opposing),
                float(sum(map(abs, opposing))) / taken,
            )
        )

    train(model, optimizer, steps, before, after)
    return found


def counts(probe):
    return [(r.penalized, r.total.opposing, pytest.approx(r.mass)) for r in probe.records]


@pytest.mark.parametrize("kind", L2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2_is_measured_against_the_same_step_without_it(kind, dtype):
    model = small(dtype)
    optimizer = L2[kind](model.parameters())
    with pytest.warns(WdProbeWarning, match="L2 regularization .* measured against a copy") as told:
        probe = OpposingPenaltyProbe(model, optimizer)
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    expected = counted_exactly(L2[kind], model, optimizer, 8)
    assert counts(probe) == expected
    assert sum(opposing for _, opposing, _ in expected) > 0


@pytest.mark.parametrize("kind", L2)
def test_what_would_need_a_copy_can_be_left_unmeasured(kind):
    model = small()
    optimizer = L2[kind](model.parameters())
    with pytest.warns(WdProbeWarning, match=r"L2 regularization .* not measured there"):
        probe = OpposingPenaltyProbe(model, optimizer, exact=False)
    train(model, optimizer, 2)
    assert all(math.isnan(r.rate) and r.penalized == 0 for r in probe.records)


PLAIN = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.2, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.05),
}


@pytest.mark.parametrize("method", ["l1", "l2", "wd", "rwd"])
@pytest.mark.parametrize("opt", PLAIN)
def test_attached_methods_are_measured_exactly(method, opt):
    """Also rwd, whose closed form says 0: counted on û itself it is 0."""
    model = small(torch.float64)
    optimizer = PLAIN[opt](model.parameters())
    WeightDecay(model, optimizer, method, rate=0.5)
    probe = OpposingPenaltyProbe(model, optimizer, exact=True)
    expected = counted_exactly(PLAIN[opt], model, optimizer, 8)
    assert counts(probe) == expected
    opposing = sum(n for _, n, _ in expected)
    assert opposing == 0 if method == "rwd" else opposing > 0


@pytest.mark.parametrize("method", ["wd", "rwd"])
@pytest.mark.parametrize("opt", PLAIN)
@pytest.mark.parametrize("scale", [None, "max2"])
def test_closed_forms_agree_with_the_exact_mode(method, opt, scale):
    model = small(torch.float64)
    optimizer = PLAIN[opt](model.parameters())
    WeightDecay(model, optimizer, method, rate=0.5, scale=scale)
    closed = OpposingPenaltyProbe(model, optimizer)
    exact = OpposingPenaltyProbe(model, optimizer, exact=True)
    train(model, optimizer, 10)
    assert counts(closed) == counts(exact)
    for one, other in zip(closed.records, exact.records, strict=True):
        assert one.total.flipped == other.total.flipped
        assert one.total.total_penalty == pytest.approx(other.total.total_penalty)


@pytest.mark.parametrize("method", ["pwd", "lpwd"])
@pytest.mark.parametrize("exact", [None, True])
def test_pwd_opposes_nothing_and_its_literal_reading_is_that_of_wd(method, exact):
    """Fact 9, with θ the weight that stood before the decay."""
    model = small(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    theta = {}
    decay = WeightDecay(model, optimizer, method, rate=0.5)
    model.register_forward_pre_hook(
        lambda *_: theta.update({n: p.detach().clone() for n, p in model.named_parameters()}),
        prepend=True,
    )
    factors = {n: decay.factor(p, {"lr": 0.2}) for n, p in model.named_parameters()}
    paired = OpposingPenaltyProbe(model, optimizer, exact=exact)
    literal = OpposingPenaltyProbe(model, optimizer, exact=exact, reading="literal")
    expected = []

    def after():
        expected.append(
            [reference.tally(theta[n], p.detach(), factors[n]) for n, p in model.named_parameters()]
        )

    train(model, optimizer, 10, after=after)
    opposing = [sum(t["opposing"] for t in tallies) for tallies in expected]
    assert sum(opposing) > 0
    assert [r.total.opposing for r in literal.records] == opposing
    for record, tallies in zip(paired.records, expected, strict=True):
        sizes = [c * t["total_size"] for c, t in zip(factors.values(), tallies, strict=True)]
        assert record.rate == record.mass == 0
        assert record.penalized == sum(t["penalized"] for t in tallies)
        assert record.total.total_penalty == pytest.approx(sum(sizes))
        assert record.flip_rate > 0


@pytest.mark.parametrize("exact", [None, True])
def test_decay_after_the_update_by_an_optimizer_itself(exact):
    """timm's LaProp is rwd, its Adan divides by 1 + ηλ: both take off what stands."""
    for name, left in (("laprop", lambda c: 1 - c), ("adan", lambda c: 1 / (1 + c))):
        model = small(torch.float64)
        optimizer = timm.optim.create_optimizer_v2(
            model, name, lr=0.1, weight_decay=0.3, filter_bias_and_bn=False
        )
        probe = OpposingPenaltyProbe(model, optimizer, exact=exact)
        sizes = []

        def after(model=model, left=left, sizes=sizes):
            stands = sum(p.abs().sum().item() for p in model.parameters())
            sizes.append(stands / left(0.03) - stands)

        train(model, optimizer, 5, after=after)
        assert [r.rate for r in probe.records] == [0] * 5
        taken = [r.total.total_penalty for r in probe.records]
        assert taken == pytest.approx(sizes)


def test_closures_are_measured_exactly_too():
    model = small(torch.float64)
    optimizer = L2["adam"](model.parameters())
    twin, other = copy.deepcopy(model), L2["adam"]
    twin_optimizer = other(twin.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WdProbeWarning)
        probe = OpposingPenaltyProbe(model, optimizer)
        plain = OpposingPenaltyProbe(twin, twin_optimizer)
    for step in range(4):
        images, labels = batch(step, torch.float64)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images).float(), labels)  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
    train(twin, twin_optimizer, 4)
    assert [r.values.tolist() for r in probe.records] == [r.values.tolist() for r in plain.records]


@pytest.mark.parametrize("reading", ["paired", "literal"])
@pytest.mark.parametrize("method", ["pwd", "lpwd"])
def test_decay_in_a_closures_forward_pass(method, reading):
    """The same numbers as in a plain loop, where the forward pass comes before the step."""

    def run(with_closure):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        WeightDecay(model, optimizer, method, rate=0.5)
        probe = OpposingPenaltyProbe(model, optimizer, reading=reading)
        for step in range(6):

            def closure(step=step):
                images, labels = batch(step)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                return loss

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        return [dict(record.tensors) for record in probe.records]

    assert run(True) == run(False)


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


def test_a_copy_without_decay_wherever_the_rate_is_looked_up():
    class Own(torch.optim.SGD):
        """L2 by an attribute."""

        def __init__(self, ps, lr, weight_decay):
            super().__init__(ps, lr=lr, momentum=0.9)
            self.weight_decay = self.defaults["weight_decay"] = weight_decay
            self.param_groups[0]["weight_decay"] = weight_decay

        def step(self, closure=None):
            (group,) = self.param_groups
            group["weight_decay"] = self.weight_decay
            return super().step(closure)

    model = small(torch.float64)
    optimizer = Own(model.parameters(), 0.2, 0.1)
    with pytest.warns(WdProbeWarning, match="measured against a copy"):
        probe = OpposingPenaltyProbe(model, optimizer)
    train(model, optimizer, 4)
    assert [r.penalized for r in probe.records] == [212] * 4


def test_a_random_optimizer_and_its_copy_draw_the_same_numbers():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.add_(torch.randn_like(p) + random.random() + np.random.random())
            return super().step(closure)

    def run(probed):
        model = small(torch.float64)
        optimizer = Noisy(model.parameters(), lr=0.1, momentum=0.9)
        WeightDecay(model, optimizer, "wd", rate=0.5)
        probe = OpposingPenaltyProbe(model, optimizer, exact=True) if probed else None
        random.seed(0)
        np.random.seed(0)
        train(model, optimizer, 3)
        return model, probe

    (plain, _), (probed, probe) = run(False), run(True)
    assert all(map(torch.equal, plain.parameters(), probed.parameters()))
    sizes = probe.records[0].total.total_penalty
    assert sizes == pytest.approx(0.05 * sum(p.abs().sum().item() for p in small().parameters()))


def test_a_step_that_fails_by_itself_is_not_the_copys_fault():
    class Failing(torch.optim.Adam):
        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("boom")
            return super().step(closure)

    model = small()
    optimizer = Failing(model.parameters(), lr=0.05, weight_decay=0.1)
    optimizer.fails = False
    with pytest.warns(WdProbeWarning, match="L2 regularization"):
        probe = OpposingPenaltyProbe(model, optimizer)
    train(model, optimizer, 2)
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="boom"):
        train(model, optimizer, 1)
    optimizer.fails = False
    train(model, optimizer, 2)
    assert [record.step for record in probe.records] == [1, 2, 3, 4]
    assert all(record.penalized for record in probe.records)


def test_an_optimizer_that_cannot_be_stepped_twice_is_told_once_and_trains_on():
    class Locked(torch.optim.Adam):
        def __init__(self, params, **options):
            super().__init__(params, **options)
            self.lock = threading.Lock()

    model = small()
    optimizer = Locked(model.parameters(), lr=0.1, weight_decay=0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        probe = OpposingPenaltyProbe(model, optimizer)
        train(model, optimizer, 3)
    assert len(told) == 2
    assert (
        "a copy of Locked cannot be stepped (cannot pickle '_thread.lock' object), so R_op"
        in str(told[-1].message)
    )
    assert len(probe.records) == 3
    assert all(math.isnan(r.rate) for r in probe.records)


def test_l2_of_plain_sgd_is_decoupled_decay_and_is_measured():
    """Without momentum η(g + λθ) = ηg + ηλθ: the one case where the two are the same."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        expected = oracle(model, optimizer, lambda _: 0.05, 5)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [record.total.opposing for record in probe.records] == counts


@pytest.mark.parametrize("opt", ["lamb", "adamp", "sgdp"])
def test_rules_that_are_not_known_are_measured_exactly(opt):
    def make(parameters):
        return timm.optim.create_optimizer_v2(
            list(parameters), opt, lr=0.1, weight_decay=0.3, filter_bias_and_bn=False
        )

    model = small(torch.float64)
    optimizer = make(model.parameters())
    with pytest.warns(WdProbeWarning, match="its decay rule is not known, so R_op is measured ag"):
        probe = OpposingPenaltyProbe(model, optimizer)
    expected = counted_exactly(make, model, optimizer, 5)
    assert counts(probe) == expected


def test_decay_that_follows_the_square_of_the_learning_rate():
    """timm's corrected decay, c = η²λ/η_max, under a schedule."""
    model = small(torch.float64)
    optimizer = timm.optim.create_optimizer_v2(
        model, "adamc", lr=0.1, weight_decay=0.3, filter_bias_and_bn=False
    )
    closed, exact = (OpposingPenaltyProbe(model, optimizer, exact=e) for e in (None, True))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, 5, after=schedule.step)
    assert counts(closed) == counts(exact)
    assert sum(r.total.opposing for r in closed.records) > 0


def test_no_decay_at_all_is_said():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    with pytest.warns(WdProbeWarning, match="nothing is penalized, so R_op is undefined"):
        OpposingPenaltyProbe(model, optimizer)


def test_bad_input():
    model, other = small(), small()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(InputError, match="unknown keep 'some'; choose from whole, half, nothing"):
        OpposingPenaltyProbe(model, optimizer, keep="some")
    with pytest.raises(InputError, match="unknown reading 'free'; choose from paired, literal"):
        OpposingPenaltyProbe(model, optimizer, reading="free")
    with pytest.raises(InputError, match="every must be at least 1, got 0"):
        OpposingPenaltyProbe(model, optimizer, every=0)
    with pytest.raises(InputError, match="holds none of the model's parameters"):
        OpposingPenaltyProbe(other, optimizer)
    with pytest.raises(InputError, match="LBFGS moves the weights several times"):
        OpposingPenaltyProbe(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(InputError, match="the list of optimizers is empty"):
        OpposingPenaltyProbe(model, [])
    with pytest.raises(InputError, match="an optimizer is given twice"):
        OpposingPenaltyProbe(model, [optimizer, optimizer])
    with pytest.raises(InputError, match=r"a torch\.optim\.Optimizer is needed, got str"):
        OpposingPenaltyProbe(model, ["adamw"])
    with pytest.raises(InputError, match=r"a torch\.nn\.Module is needed, got list"):
        OpposingPenaltyProbe([model], optimizer)


def test_closures():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    WeightDecay(model, optimizer, "wd", rate=0.5)
    WeightDecay(twin, twin_optimizer, "wd", rate=0.5)
    images, labels = batch(0)
    probe = OpposingPenaltyProbe(model, optimizer)
    probe_twin = OpposingPenaltyProbe(twin, twin_optimizer)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
        twin_optimizer.zero_grad()
        F.cross_entropy(twin(images), labels).backward()
        twin_optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert [r.penalized for r in probe.records] == [r.penalized for r in probe_twin.records]


def test_a_step_that_raises_leaves_no_stale_copy():
    class Brittle(torch.optim.AdamW):
        broken = False

        def step(self, closure=None):
            if self.broken:
                raise RuntimeError("broken")
            return super().step(closure)

    model = small()
    optimizer = Brittle(model.parameters(), lr=0.05, weight_decay=0.3)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        train(model, optimizer, 1)
        optimizer.broken = True
        with pytest.raises(RuntimeError, match="broken"):
            train(model, optimizer, 1)
        optimizer.broken = False
        expected = oracle(model, optimizer, lambda _: 0.015, 3)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [r.total.opposing for r in probe.records][1:] == counts
    assert [r.step for r in probe.records] == [1, 2, 3, 4]


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


def test_a_subclass_that_calls_super_is_measured_and_decayed_once():
    class Louder(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = small()
    twin = copy.deepcopy(model)
    optimizer, plain = (
        kind(m.parameters(), lr=0.1, momentum=0.9)
        for kind, m in ((Louder, model), (torch.optim.SGD, twin))
    )
    WeightDecay(model, optimizer, "wd", rate=0.3)
    WeightDecay(twin, plain, "wd", rate=0.3)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        train(model, optimizer, 4)
    train(twin, plain, 4)
    assert [r.step for r in probe.records] == [1, 2, 3, 4]
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("probe_first", [True, False])
def test_probe_and_decay_attach_in_any_order(probe_first):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if probe_first:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WdProbeWarning)
            probe = OpposingPenaltyProbe(model, optimizer)
        WeightDecay(model, optimizer, "wd", rate=0.5)
    else:
        WeightDecay(model, optimizer, "wd", rate=0.5)
        probe = OpposingPenaltyProbe(model, optimizer)
    expected = oracle(model, optimizer, lambda _: 0.05, 6)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [r.total.opposing for r in probe.records] == counts


def test_steps_that_a_grad_scaler_voids_are_not_logged_as_zero():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3, fused=True)
    probe = OpposingPenaltyProbe(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        images, labels = batch(step)
        scaler.scale(F.cross_entropy(model(images), labels)).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert [r.step for r in probe.records] == [1, 3, 4]


@pytest.mark.parametrize("fused", [True, False])
def test_a_voided_step_decays_nothing(fused):
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=fused)
    WeightDecay(model, optimizer, "wd", rate=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    images, labels = batch(0)
    scaler.scale(F.cross_entropy(model(images), labels)).backward()
    model[0].weight.grad[0, 0] = math.inf
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


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


def test_nan_weights_are_named():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        images, labels = batch(0)
        F.cross_entropy(model(images), labels).backward()
        model[2].bias.grad.fill_(math.nan)
        optimizer.step()
    assert probe.records[0].nonfinite == 4
    assert repr(probe.records[0]).endswith("nonfinite=4)")
    assert probe.records[0].penalized == sum(p.numel() for p in model.parameters()) - 4


def test_profile_of_a_live_run():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    with OpposingPenaltyProbe(model, optimizer, profile=[0.3, 3.0, 20.0], profile_every=2) as probe:
        train(model, optimizer, 6)
    assert [p.step for p in probe.profiles] == [1, 3, 5]
    for profile in probe.profiles:
        record = probe.records[profile.step - 1]
        assert abs(profile.opposing[0] - record.total.opposing) <= 1
        assert list(profile.opposing) == sorted(profile.opposing)
        assert profile.penalized == record.penalized


def test_deepcopy_of_an_optimizer_is_not_attached():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = WeightDecay(model, optimizer, "wd", rate=0.1)
    assert attached(optimizer) is decay
    assert attached(copy.deepcopy(optimizer)) is None
    decay.detach()
    assert attached(optimizer) is None


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


@pytest.mark.filterwarnings("ignore:AdamW has weight_decay=0")
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
