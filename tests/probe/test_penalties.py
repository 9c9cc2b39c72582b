"""Which penalty is taken for a step's, and how it is found."""

import copy
import math
import threading
import warnings
from fractions import Fraction

import pytest
import timm
import timm.optim
import torch
from torch import nn
from torch.nn import functional as F

from tests import reference
from tests.small import LR, RATE, Oracle, adamw, batch, counted, loss_of, small, train
from wd_probe import (
    OpposingPenaltyProbe,
    WdProbeWarning,
    WeightDecay,
)
from wd_probe.probe.sums import LASTS

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


def test_l2_of_plain_sgd_is_decoupled_decay_and_is_measured():
    """Without momentum η(g + λθ) = ηg + ηλθ: the one case where the two are the same."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        expected = counted(model, optimizer, 0.05, 5)
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


def test_each_optimizers_own_rule():
    """One decays, the other has L2, and a third does not decay."""
    model = nn.Sequential(*small(), nn.Linear(4, 4))
    first, second = (
        adamw(model[0].parameters()),
        torch.optim.Adam(model[2].parameters(), lr=LR, weight_decay=RATE),
    )
    third = torch.optim.AdamW(model[3].parameters(), lr=LR, weight_decay=0.0)
    with pytest.warns(WdProbeWarning) as told:
        probe = OpposingPenaltyProbe(model, [first, second, third])
    l2, none = (str(warning.message) for warning in told)
    assert l2.startswith("Adam, parameter group 0: its weight_decay is L2")
    assert none.startswith("AdamW has weight_decay=0 in every group")
    loss_of(model, 0).backward()
    for one in (first, second, third):
        one.step()
    record = probe.records[0]
    assert record.tensors["0.weight"].total_penalty > 0
    assert record.tensors["2.weight"].total_penalty > 0
    assert record.tensors["3.weight"].penalized == 0


def test_one_warning_tells_of_all_groups_alike():
    """As layer decay makes them; those that come to decay later, too."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    groups = [
        {"params": [p], "lr": 0.01 * 0.9**k, "weight_decay": RATE * (k % 4 != 3)}
        for k, p in enumerate(model.parameters())
    ]
    optimizer = torch.optim.Adam(groups)

    def steps():
        for _ in range(2):
            model(torch.randn(8, 4)).square().sum().backward()
            optimizer.step()

    with pytest.warns(WdProbeWarning) as told:
        probe = OpposingPenaltyProbe(model, optimizer)
    assert [str(one.message)[:44] for one in told] == [
        "Adam, 30 of 40 parameter groups: its weight_"
    ]
    steps()
    for group in optimizer.param_groups:
        group["weight_decay"] = RATE
    with pytest.warns(WdProbeWarning) as told:
        steps()
    assert [str(one.message)[:32] for one in told] == ["Adam, 10 of 40 parameter groups:"]
    assert len(probe.records) == 4


def flipped(optimizer):
    optimizer.param_groups[0]["decoupled_weight_decay"] ^= True


def loaded(optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["decoupled_weight_decay"] ^= True
    optimizer.load_state_dict(state)


def reordered(optimizer):
    optimizer.param_groups.reverse()


def replaced(optimizer):
    group = optimizer.param_groups.pop()
    del optimizer.param_groups[0]
    optimizer.add_param_group(group)


@pytest.mark.filterwarnings("ignore:Adam")
@pytest.mark.parametrize("change", [flipped, loaded, reordered, replaced])
def test_a_groups_rule_is_that_of_its_options_as_they_stand(change):
    def run(changed_ahead):
        model = small()
        matrices = [p for p in model.parameters() if p.ndim > 1]
        groups = [{"params": matrices[::2]}, {"params": matrices[1::2]}]
        groups[1]["decoupled_weight_decay"] = True
        optimizer = torch.optim.Adam(groups, lr=0.1, weight_decay=2.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WdProbeWarning)
            probe = OpposingPenaltyProbe(model, optimizer)
            train(model, optimizer, 2)
            change(optimizer)
            if changed_ahead:
                probe.close()
                probe = OpposingPenaltyProbe(model, optimizer)
            train(model, optimizer, 2)
        return probe.records[-2:]

    attached, fresh = run(False), run(True)
    own = [[r.values[:, ~LASTS].tolist() for r in records] for records in (attached, fresh)]
    assert own[0] == own[1]
    assert all(r.penalized for r in fresh)


def test_cautious_decay_does_not_remove_opposing_penalties():
    """Theory fact 11: every opposing weight lies inside its mask; the others have no penalty."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    WeightDecay(model, optimizer, "cautious", rate=RATE)
    probe, counts = OpposingPenaltyProbe(model, optimizer), []
    oracle = Oracle(model.named_parameters())

    def after():
        oracle.after()
        moved = [(oracle.kept[n], p.detach()) for n, p in model.named_parameters()]
        counts.append(sum(int(((y - x) * x <= 0).sum()) for x, y in moved))

    train(model, optimizer, 12, oracle.before, after)
    for record, tensors, penalized in zip(probe.records, oracle.steps, counts, strict=True):
        assert record.total.opposing == sum(t["opposing"] for t in tensors.values())
        assert record.total.flipped == sum(t["flipped"] for t in tensors.values())
        assert record.penalized == penalized < 212
    assert probe.total.total.opposing > 10
