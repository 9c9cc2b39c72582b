"""Steps of several optimizers as one record, whenever they are read."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.small import LR, RATE, Oracle, adamw, batch, loss_of, small, train
from wd_probe import InputError, OpposingPenaltyProbe, StepRecord, WdProbeWarning, WeightDecay
from wd_probe.probe.sums import LASTS

TWO, THREE = ("a", "b"), ("a", "b", "c")
PACES = {  # which optimizer steps, one after the other
    "two": TWO * 6,
    "three": THREE * 4,
    "one steps twice before the other": ("a", "a", "b", "a", "b", "a", "a", "a", "b", "a"),
    "one of three never steps": TWO * 5,
    "the other one begins": ("b", "a", "a", "b", "b", "a", "b"),
}


def measured(pace, every=1, between=lambda probe: None):
    """The probe of a training whose optimizers step in such an order."""
    model = nn.Sequential(*small(), nn.Linear(4, 4))
    names = THREE if pace == "one of three never steps" else sorted(set(PACES[pace]))
    optimizers = {
        name: torch.optim.AdamW(model[at].parameters(), lr=0.05, weight_decay=0.3)
        for name, at in zip(names, (0, 2, 3), strict=False)
    }
    probe = OpposingPenaltyProbe(model, list(optimizers.values()), every=every)
    for step, name in enumerate(PACES[pace]):
        images, labels = batch(step)
        F.cross_entropy(model(images), labels).backward()
        optimizers[name].step()
        model.zero_grad()
        between(probe)
    return probe


@pytest.mark.parametrize("reads", [(), ("records",), ("total", "profiles", "records")])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("pace", PACES)
def test_draining_between_any_two_steps_gives_the_same_records(pace, every, reads):
    undrained = measured(pace, every)
    drained: list[StepRecord] = []

    def between(probe):
        for name in reads:
            getattr(probe, name)
        drained.extend(probe.drain())
        for name in reads:
            getattr(probe, name)

    probe = measured(pace, every, between)
    assert [record.step for record in probe.records] in ([], [undrained.records[-1].step])
    probe.close()
    drained.extend(probe.drain())
    assert tuple(drained) == undrained.records
    assert probe.total == undrained.total
    steps = [record.step for record in drained]
    assert all(b == a + every for a, b in itertools.pairwise(steps))
    added = sum(record.values for record in drained)
    assert np.array_equal(probe.total.values[:, ~LASTS], added[:, ~LASTS])
    if every == 1:  # else steps that are not measured have decayed the weights further
        assert np.array_equal(probe.total.values[:, LASTS], drained[-1].values[:, LASTS])
    assert probe.drain() == probe.records == ()


def test_a_round_is_drained_as_soon_as_every_optimizer_has_stepped():
    steps = []
    measured("two", between=lambda probe: steps.append([r.step for r in probe.drain()]))
    assert steps == [[], [1], [], [2], [], [3], [], [4], [], [5], [], [6]]


def test_a_round_is_drained_when_one_optimizer_steps_again():
    steps = []
    measured(
        "one steps twice before the other",
        between=lambda probe: steps.append([r.step for r in probe.drain()]),
    )
    assert steps == [[], [1], [2], [], [3], [], [4], [5], [6], []]


def test_several_optimizers_make_one_record_a_round():
    model = small()
    first, second = adamw(model[0].parameters()), adamw(model[2].parameters(), amsgrad=True)
    probe, oracle = OpposingPenaltyProbe(model, [first, second]), Oracle(model.named_parameters())
    for step in range(8):
        loss_of(model, step).backward()
        oracle.before()
        first.step()
        second.step()
        oracle.after()
        model.zero_grad()
    oracle.agrees_with(probe.records)
    assert probe.total.penalized == sum(record.penalized for record in probe.records)


def test_optimizers_of_different_pace():
    """As a GAN's: a round ends when one of them steps again."""
    model = small()
    often, seldom = adamw(model[0].parameters()), adamw(model[2].parameters())
    probe = OpposingPenaltyProbe(model, [often, seldom])
    for step in range(6):
        loss_of(model, step).backward()
        often.step()
        if step % 3 == 2:
            seldom.step()
        model.zero_grad()
    assert [record.step for record in probe.records] == [1, 2, 3, 4, 5, 6]
    tail = [record.tensors["2.weight"].penalized for record in probe.records]
    assert tail == [0, 0, 64, 0, 0, 64]


@pytest.mark.parametrize("method", ["own", "wd", "rwd", "lpwd", "l2"])
@pytest.mark.parametrize("every", [1, 3])
def test_an_optimizer_for_each_tensor_in_the_backward_pass(method, every):
    """The same weights and counts as one optimizer after it."""

    def run(in_backward):
        model = small()
        make = torch.optim.SGD if method != "own" else adamw
        options = {} if method == "own" else {"lr": LR, "momentum": 0.9}
        if in_backward:
            several = [make([p], **options) for p in model.parameters()]
            for one in several:
                (p,) = one.param_groups[0]["params"]

                def step(p, one=one):
                    one.step()
                    one.zero_grad()

                p.register_post_accumulate_grad_hook(step)
        else:
            several = [make(model.parameters(), **options)]
        if method != "own":
            WeightDecay(model, several, method, rate=RATE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WdProbeWarning)
            probe = OpposingPenaltyProbe(model, several, every=every)
        for step in range(8):
            loss_of(model, step).backward()
            if not in_backward:
                several[0].step()
                several[0].zero_grad()
        return list(model.parameters()), probe.records

    (plain, expected), (weights, records) = run(False), run(True)
    assert all(map(torch.equal, plain, weights))
    assert [record.step for record in records] == list(range(1, 9, every))
    for one, other in zip(expected, records, strict=True):
        assert dict(one.tensors) == dict(other.tensors)


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


def test_state_goes_on_counting():
    model = small()
    optimizer = adamw(model.parameters())
    with OpposingPenaltyProbe(model, optimizer) as whole:
        with OpposingPenaltyProbe(model, optimizer) as first:
            train(model, optimizer, 3)
        with OpposingPenaltyProbe(model, optimizer) as second:
            second.load_state_dict(first.state_dict())
            train(model, optimizer, 3)
    assert [record.step for record in second.records] == [4, 5, 6]
    assert dict(second.total.tensors) == dict(whole.total.tensors)
    other = OpposingPenaltyProbe(nn.Sequential(model), optimizer)
    with pytest.raises(InputError, match="this state is of a probe on other parameters"):
        other.load_state_dict(first.state_dict())
