"""The results of a grid over seeds: settings, intervals, differences, the best of each method."""

import functools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import counted
from ..runs.findings import LITTLE
from .grid import AXES, Cell, Summary, other_axes
from .ledger import rows

Basis = Literal["validation", "test"]
#: By what the best setting is chosen, and what is then told of it: paths in a cell's summary.
CHOICE: dict[Basis, tuple[str, str]] = {
    "validation": ("chosen", "val_top1"),
    "test": ("best10", "mean"),
}
TOP1: dict[Basis, tuple[str, str]] = {
    "validation": ("chosen", "top1"),
    "test": ("best10", "mean"),
}


# --- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """The cells of a grid that differ in nothing but their seed, by rising seed.

    ``others`` are the further options in which the grid's settings differ, e.g. ``batch_size``.
    """

    dataset: str
    model: str
    opt: str
    method: str
    lr: float
    weight_decay: float
    cells: tuple[Summary, ...]
    others: tuple[tuple[str, Any], ...] = ()

    def values(self, *path: str) -> list[float]:
        """A figure of every cell, NaN where it has none, e.g. ``("best10", "mean")``."""
        found: list[float] = []
        for cell in self.cells:
            value: Any = cell
            for key in path:
                value = None if value is None else value.get(key)
            found.append(math.nan if value is None else float(value))
        return found

    def mean(self, *path: str) -> float:
        """The mean over the seeds that have the figure; NaN where none has."""
        known = _known(self.values(*path))
        return statistics.fmean(known) if known else math.nan

    @property
    def state(self) -> str | None:
        """What decay did to most weights in most of the cells; None where none tells."""
        found = [(cell.get("dynamics") or {}).get("state") for cell in self.cells]
        told = Counter(state for state in found if state is not None)
        return str(told.most_common(1)[0][0]) if told else None

    @property
    def diverged(self) -> int:
        """How many of the cells gave no usable model."""
        return sum(cell["status"] != "finished" for cell in self.cells)


def settings(cells: Sequence[Cell], summaries: Sequence[Summary]) -> list[Setting]:
    """The cells of a grid gathered over seeds, in the order of the grid."""
    others = other_axes(cells)
    gathered: dict[tuple[tuple[str, Any], ...], list[Summary]] = {}
    for cell, summary in zip(cells, summaries, strict=True):
        own = replace(cell.options, lr=cell.options.learning_rate)
        key = tuple((name, getattr(own, name)) for name in (*AXES[:-1], *others))
        gathered.setdefault(key, []).append({**summary, "seed": own.seed})
    count = len(AXES) - 1
    return [
        Setting(
            **dict(key[:count]),
            cells=tuple(sorted(found, key=lambda summary: summary["seed"])),
            others=key[count:],
        )
        for key, found in gathered.items()
    ]


# --- over seeds -----------------------------------------------------------------------------------


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
    known = _known(values)
    if not known:
        return Interval(math.nan, math.nan, 0)
    reach = _quantile(len(known)) * _error(known) if len(known) > 1 else math.nan
    return Interval(statistics.fmean(known), reach, len(known))


def difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """``one`` minus ``other``, paired by position.

    Args:
        one: a figure of each seed.
        other: of the same seeds, in the same order.
    """
    gaps = _known([a - b for a, b in zip(one, other, strict=True)])
    found, error = interval(gaps), _error(gaps)
    p = _two_sided(found.mean / error, len(gaps) - 1) if error > 0 else math.nan
    return Difference(found, p)


def paired(one: Setting, other: Setting, *path: str) -> Difference:
    """A figure of ``one`` minus that of ``other``, over the seeds that both have."""
    found = [
        dict(zip((cell["seed"] for cell in setting.cells), setting.values(*path), strict=True))
        for setting in (one, other)
    ]
    shared = [seed for seed in found[0] if seed in found[1]]
    return difference(*([values[seed] for seed in shared] for values in found))


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _deviation(known: Sequence[float]) -> float:
    return statistics.stdev(known) if len(known) > 1 else math.nan


def _error(known: Sequence[float]) -> float:
    """The standard error of their mean."""
    return _deviation(known) / math.sqrt(len(known)) if known else math.nan


@functools.cache
def _quantile(count: int) -> float:
    """By how many standard errors a 95 % interval of so many values reaches out."""
    from scipy import special  # scipy.stats takes a second to load

    return float(special.stdtrit(count - 1, 0.975))


def _two_sided(t: float, degrees: int) -> float:
    """The probability of a t at least so far from 0."""
    from scipy import special

    return 2 * float(special.stdtr(degrees, -abs(t)))


# --- the best settings, and what lies beside them -------------------------------------------------


@dataclass(frozen=True, slots=True)
class Best:
    """The best of the settings tried of one dataset, model, optimizer and method."""

    setting: Setting
    tried: int
    basis: Basis

    @property
    def top1(self) -> Interval:
        """Test top-1 over seeds, at the epoch that is best on validation.

        Without a validation split, of each seed's ten best epochs, as in the paper.
        """
        return interval(self.setting.values(*TOP1[self.basis]))

    def record(self) -> dict[str, Any]:
        """For JSON."""
        setting, top1 = self.setting, self.top1
        return {
            "dataset": setting.dataset,
            "model": setting.model,
            "opt": setting.opt,
            "method": setting.method,
            **dict(setting.others),
            "lr": setting.lr,
            "weight_decay": setting.weight_decay,
            "top1": {
                "mean": top1.mean,
                "std": _deviation(_known(setting.values(*TOP1[self.basis]))),
                "half_width": top1.half_width,
            },
            "val_top1": setting.mean(*CHOICE["validation"]),
            "R_op": setting.mean("rate", "mean"),
            "state": setting.state,
            "remaining": setting.mean("dynamics", "remaining"),
            "seeds": len(setting.cells),
            "diverged": setting.diverged,
            "tried": self.tried,
        }


def basis(settings: Sequence[Setting]) -> Basis:
    """Validation where every finished cell of a grid has it: else settings cannot be compared."""
    scores = [
        score
        for setting in settings
        for score, cell in zip(setting.values(*CHOICE["validation"]), setting.cells, strict=True)
        if cell["status"] == "finished"
    ]
    return "validation" if scores and all(map(math.isfinite, scores)) else "test"


def best_settings(settings: Sequence[Setting], by: Basis) -> list[Best]:
    """The best η and λ for each dataset, model, optimizer, method and further axis.

    Args:
        settings: all or some of a grid.
        by: the whole grid's :func:`basis`; see :func:`merit`.
    """
    gathered: dict[Any, list[Setting]] = {}
    for s in settings:
        gathered.setdefault((s.dataset, s.model, s.opt, s.method, s.others), []).append(s)
    return [
        Best(max(tried, key=lambda setting: merit(setting, by)), len(tried), by)
        for tried in gathered.values()
    ]


def merit(setting: Setting, by: Basis) -> tuple[float, ...]:
    """What settings are ranked by, the best with the largest.

    The mean over seeds of the validation top-1 at the epoch where it is best, or of the ten best
    test top-1 where there is no validation split. Settings of which a seed diverged or failed come
    after those with none; of equals the smaller λ, then the smaller η, comes first.
    """
    mean = setting.mean(*CHOICE[by])
    known = mean if math.isfinite(mean) else -math.inf
    return -setting.diverged, known, -setting.weight_decay, -setting.lr


def change(chosen: Setting, other: Setting, *path: str) -> float:
    """By how much a figure's mean over seeds differs in another setting from the chosen one's.

    It goes to 0 where a seed of the other gave no usable model.
    """
    return (0.0 if other.diverged else other.mean(*path)) - chosen.mean(*path)


def robustness(settings: Sequence[Setting], chosen: Setting) -> float:
    """How far top-1 falls at most where λ moves by up to ten times from the chosen, η kept.

    Returns:
        The largest fall of the mean test top-1 after the last epoch over the settings in reach;
        NaN where none in reach has one. See :func:`change`.
    """
    near = [
        other
        for other in settings
        if other.lr == chosen.lr
        and other is not chosen
        and other.weight_decay
        and 0.099 <= other.weight_decay / chosen.weight_decay <= 10.1
    ]
    return max(_known([-change(chosen, other, "top1") for other in near]), default=math.nan)


def lag_told(pairs: Iterable[tuple[Cell, Summary]]) -> str:
    """What batch norm's running statistics cost the cells that are scored by them; "" if little."""
    asked = [
        (known["running"], known["updated"])
        for cell, summary in pairs
        if (known := summary.get("batch_norm")) and not cell.options.update_bn
    ]
    costs = [updated - running for running, updated in asked if None not in (running, updated)]
    lagging = [cost for cost in costs if cost > LITTLE]
    if not lagging:
        return ""
    return (
        f"In {len(lagging)} of {counted(len(asked), 'cell')} batch norm's running statistics lag "
        f"behind the weights, and cost up to {100 * max(lagging):.0f} points on training images: "
        "settings may rank otherwise with `--update-bn`, which evaluates by statistics taken anew."
    )


def result(cells: Sequence[Cell], summaries: Sequence[Summary], folder: Path) -> dict[str, Any]:
    """The result of `wdprobe sweep`: counts by status, the best settings, a row for each cell."""
    found = settings(cells, summaries)
    by = basis(found)
    return {
        "command": "sweep",
        "counts": Counter(str(summary["status"]) for summary in summaries),
        "chosen_by": f"{by} top-1",
        "lag": lag_told(zip(cells, summaries, strict=True)),
        "best": [best.record() for best in best_settings(found, by)],
        "cells": rows(cells, summaries),
        "run": str(folder),
    }
