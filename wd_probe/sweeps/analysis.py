"""What a grid of runs comes to over seeds: intervals, paired differences, robustness to λ."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .cells import Setting


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds and the half-width of its 95 % confidence interval (Student's t).

    Both are NaN where there is nothing to average; the half-width where there is one value only.
    """

    mean: float
    half_width: float
    count: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two settings, seed by seed: mean, its interval, and the p of a paired t-test (two-sided).

    p is NaN where fewer than two seeds have both, or all differences are the same.
    """

    interval: Interval
    p: float


def interval(values: Sequence[float]) -> Interval:
    """The mean of the values that are numbers, with its 95 % confidence interval."""
    from scipy import stats

    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Interval(math.nan, math.nan, 0)
    mean = statistics.fmean(known)
    if len(known) < 2:
        return Interval(mean, math.nan, 1)
    spread = statistics.stdev(known) / math.sqrt(len(known))
    return Interval(mean, float(stats.t.ppf(0.975, len(known) - 1)) * spread, len(known))


def difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """``one`` minus ``other``, paired by position.

    Args:
        one: a figure of each seed.
        other: of the same seeds, in the same order.
    """
    from scipy import stats

    pairs = [
        (a, b) for a, b in zip(one, other, strict=True) if math.isfinite(a) and math.isfinite(b)
    ]
    gaps = [a - b for a, b in pairs]
    p, spread = math.nan, statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    if spread > 0:
        p = 2 * float(stats.t.sf(abs(statistics.fmean(gaps)) / spread, len(gaps) - 1))
    return Difference(interval(gaps), p)


def robustness(settings: Sequence[Setting], chosen: Setting) -> float:
    """How far top-1 falls at most where λ moves by up to ten times from the chosen, η kept.

    Returns:
        The largest fall of the mean test top-1 over the settings in reach, a diverged one counted
        as a fall to zero; NaN where there is no other λ in reach.
    """
    top = interval(chosen.values("top1")).mean
    falls = [
        top - (0.0 if other.diverged else interval(other.values("top1")).mean)
        for other in settings
        if other.lr == chosen.lr
        and other is not chosen
        and other.weight_decay
        and 0.099 <= other.weight_decay / chosen.weight_decay <= 10.1
    ]
    return max(falls) if falls else math.nan
