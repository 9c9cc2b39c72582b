import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sweeps.conftest import AXES, BASE
from wd_probe.sweeps.grid import grid
from wd_probe.sweeps.results import (
    Setting,
    basis,
    best_settings,
    change,
    difference,
    interval,
    paired,
    robustness,
    settings,
)

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


@given(AXES)
def test_settings_gather_seeds_and_nothing_else(axes):
    cells = grid(BASE, axes)
    gathered = settings(cells, [{"status": "finished", "n": i} for i in range(len(cells))])
    assert sorted(c["n"] for s in gathered for c in s.cells) == list(range(len(cells)))
    for setting in gathered:
        of = [cells[c["n"]].options for c in setting.cells]
        assert len({replace(o, seed=0) for o in of}) == 1
        assert [o.seed for o in of] == sorted(set(axes["seed"]))
    assert len(gathered) * len(set(axes["seed"])) == len(cells)


def test_best_settings_put_those_that_diverged_last():
    cells = grid(BASE, {"weight_decay": [0.1, 0.2, 0.3], "seed": [0, 1]})
    top1 = {0.1: (0.5, 0.6), 0.2: (0.9, None), 0.3: (0.6, 0.7)}
    summaries = [
        {
            "status": "diverged" if value is None else "finished",
            "best10": {"mean": value},
            "chosen": None if value is None else {"val_top1": 1 - value, "top1": value},
        }
        for cell in cells
        for value in [top1[cell.options.weight_decay][cell.options.seed]]
    ]
    (by_validation,) = best_settings(found := settings(cells, summaries), basis(found))
    assert by_validation.basis == "validation"
    assert by_validation.setting.weight_decay == 0.1
    assert by_validation.top1.mean == pytest.approx(0.55)
    for summary in summaries:
        summary["chosen"] = None
    (by_test,) = best_settings(found := settings(cells, summaries), basis(found))
    assert (by_test.basis, by_test.setting.weight_decay) == ("test", 0.3)
    half_width = 12.7062 * 0.1 / 2  # t(0.975, 1) times the standard error
    assert by_test.record()["top1"] == pytest.approx(
        {"mean": 0.65, "std": 0.1 / 2**0.5, "half_width": half_width}, rel=1e-5
    )


def test_of_equal_settings_the_smaller_rates_are_best_in_any_order():
    cells = grid(BASE, {"lr": [0.1, 0.01], "weight_decay": [0.2, 0.1]})
    summaries = [{"status": "finished", "best10": {"mean": 0.9}} for _ in cells]
    for turned in (1, -1):
        (best,) = best_settings(settings(cells[::turned], summaries), "test")
        assert (best.setting.lr, best.setting.weight_decay) == (0.01, 0.1)


def test_settings_are_paired_over_the_seeds_that_both_have():
    cells = grid(BASE, {"weight_decay": [0.1, 0.2], "seed": [0, 1, 2]})
    top1 = {(0.1, 0): 0.5, (0.1, 1): 0.7, (0.2, 1): 0.6, (0.2, 2): 0.9}
    kept = [c for c in cells if (c.options.weight_decay, c.options.seed) in top1]
    one, other = settings(
        kept,
        [
            {"status": "finished", "top1": top1[c.options.weight_decay, c.options.seed]}
            for c in kept
        ],
    )
    found = paired(one, other, "top1").interval
    assert (found.count, found.mean) == (1, pytest.approx(0.1))


def test_what_has_no_result_does_not_hide_how_far_top1_falls():
    chosen, lower = setting(1, [0.8], [0.8]), setting(0.5, [0.6], [0.6])
    unknown = Setting("d", "m", "adam", "wd", 0.1, 2, ({"status": "finished", "top1": None},))
    for found in ([chosen, unknown, lower], [chosen, lower, unknown]):
        assert robustness(found, chosen) == pytest.approx(0.2)
    assert math.isnan(robustness([chosen, unknown], chosen))
    assert change(chosen, setting(2, [0.9, math.nan], [0.9, math.nan]), "top1") == -0.8
