import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wd_probe.sweeps.analysis import difference, interval, robustness
from wd_probe.sweeps.cells import Setting

SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=8)


def setting(rate, top1, val, lr=0.1, method="wd"):
    cells = tuple(
        {"status": "finished" if math.isfinite(t) else "diverged", "top1": t, "val_top1": v}
        for t, v in zip(top1, val, strict=True)
    )
    return Setting("d", "m", "adam", method, lr, rate, cells)


def test_an_interval_is_students():
    """Three values with mean 2 and standard deviation 1: t(0.975, 2) = 4.3027 over √3."""
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2, 3)
    assert found.half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert interval([1.0, math.nan]).count == 1
    assert math.isnan(interval([]).mean)


@given(SHARES, st.floats(-0.5, 0.5))
def test_differences_are_paired(values, gap):
    """The same gap at every seed is certain, however far the seeds lie apart."""
    found = difference([v + gap for v in values], values)
    assert found.interval.mean == pytest.approx(gap, abs=1e-12)
    assert found.interval.half_width == pytest.approx(0, abs=1e-6)


def test_p_of_a_paired_t_test():
    """Differences 1, 2, 3: t = 2√3, two-sided with 2 degrees of freedom."""
    found = difference([1.0, 4.0, 6.0], [0.0, 2.0, 3.0])
    assert found.p == pytest.approx(0.0741799, rel=1e-5)
    assert math.isnan(difference([1.0], [0.0]).p)
    assert difference([1.0, math.nan, 3.0], [0.0, 1.0, 1.0]).interval.count == 2


def test_robustness_is_the_largest_fall_within_ten_times_at_the_same_learning_rate():
    chosen = setting(1, [0.8], [0.8])
    found = [
        chosen,
        setting(10, [0.7], [0.7]),
        setting(0.1, [0.75], [0.7]),
        setting(100, [0.1], [0.1]),
        setting(5, [0.2], [0.2], lr=1.0),
    ]
    assert robustness(found, chosen) == pytest.approx(0.1)
    assert robustness([*found, setting(3, [math.nan], [math.nan])], chosen) == pytest.approx(0.8)
    assert math.isnan(robustness([chosen], chosen))
