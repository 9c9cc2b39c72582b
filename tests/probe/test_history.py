import itertools
import tracemalloc

import pytest
import torch
from torch import nn

from wd_probe import OpposingPenaltyProbe, WeightDecay
from wd_probe.probe.history import Thinned


@pytest.mark.parametrize("limit", [2, 8, 9])
@pytest.mark.parametrize("count", [1, 8, 9, 100, 1000])
def test_a_thinned_series_keeps_its_maximum_and_its_newest(limit, count):
    generator = torch.Generator().manual_seed(count)
    values = torch.rand(count, generator=generator).tolist()
    values[count // 2] = float("nan")
    thinned = Thinned(limit, lambda item: item[1])
    for step, value in enumerate(values):
        thinned.append((step, value))
    kept = list(thinned)
    assert len(kept) <= limit + 1
    assert kept[-1] == (count - 1, values[-1]) or count - 1 == count // 2
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    finite = [value for value in values if value == value]
    if finite:
        assert max(finite) in [value for _, value in kept]
    if count <= limit:
        assert [step for step, _ in kept] == list(range(count))


@pytest.mark.parametrize("limit", [2, 3, 8, 9])
def test_a_thinned_series_is_thinned_evenly(limit):
    for count in range(1, 100):
        thinned = Thinned(limit, float)
        for value in range(count):
            thinned.append(value)
        kept = list(thinned)  # of rising values each stretch keeps its last
        strides = {b - a for a, b in itertools.pairwise([-1, *kept[:-1]])}
        assert len(strides) <= 1
        assert len(kept) > limit / 2 or count <= limit


@pytest.mark.slow
def test_a_hundred_thousand_steps_in_bounded_memory():
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    WeightDecay(model, optimizer, "wd", rate=0.01)
    probe = OpposingPenaltyProbe(model, optimizer, history=64)
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(100_000, 2, 2, generator=generator)

    def run(first, last):
        for step in range(first, last):
            model.weight.grad = gradients[step]
            optimizer.step()

    seen = 0
    run(0, 20_000)
    _ = probe.records
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        run(20_000, 100_000)
        kept = probe.records
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 200_000
    assert 32 <= len(kept) <= 65
    assert kept[-1].step == probe.steps == 100_000
    assert probe.total.penalized == 400_000
    assert seen < probe.total.total.opposing < 400_000
