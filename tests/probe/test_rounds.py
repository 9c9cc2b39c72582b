"""Steps of several optimizers as one record, whenever they are read."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.small import batch, small
from wd_probe import OpposingPenaltyProbe, StepRecord

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
    assert np.array_equal(probe.total.values, sum(record.values for record in drained))
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
