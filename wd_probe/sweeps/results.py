"""What a grid came to: for each method, the settings that did best."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .cells import Cell, Setting, Summary, rows, settings

Basis = Literal["validation", "test"]
#: Where the top-1 that settings are chosen by stands, and the one that is reported.
_PATHS = {
    "validation": (("chosen", "val_top1"), ("chosen", "top1")),
    "test": (("best10", "mean"), ("best10", "mean")),
}


@dataclass(frozen=True, slots=True)
class Best:
    """The best of the settings tried of one dataset, model, optimizer and method."""

    setting: Setting
    tried: int
    basis: Basis

    def top1(self) -> tuple[float, float]:
        """Test top-1 over seeds, mean and deviation; of the epoch that is best on validation.

        Without a validation split, of each seed's ten best epochs, as in the paper.
        """
        return _mean_and_deviation(self.setting.values(*_PATHS[self.basis][1]))

    def record(self) -> dict[str, Any]:
        """For JSON."""
        setting, (mean, deviation) = self.setting, self.top1()
        return {
            "dataset": setting.dataset,
            "model": setting.model,
            "opt": setting.opt,
            "method": setting.method,
            **dict(setting.others),
            "lr": setting.lr,
            "weight_decay": setting.weight_decay,
            "top1": {"mean": mean, "std": deviation},
            "val_top1": _mean_and_deviation(setting.values("chosen", "val_top1"))[0],
            "R_op": _mean_and_deviation(setting.values("rate", "mean"))[0],
            "seeds": len(setting.cells),
            "diverged": setting.diverged,
            "tried": self.tried,
        }


def basis(settings: Sequence[Setting]) -> Basis:
    """Validation where every finished cell has it: else settings could not be compared."""
    scores = [
        score
        for setting in settings
        for score, cell in zip(setting.values("chosen", "val_top1"), setting.cells, strict=True)
        if cell["status"] == "finished"
    ]
    return "validation" if scores and all(map(math.isfinite, scores)) else "test"


def best_settings(settings: Sequence[Setting]) -> list[Best]:
    """The best η and λ for each dataset, model, optimizer, method and further axis.

    By the mean over seeds of the validation top-1, or of the test top-1 where there was no
    validation split. Settings of which a seed diverged or failed come last.
    """
    by = basis(settings)
    gathered: dict[Any, list[Setting]] = {}
    for s in settings:
        gathered.setdefault((s.dataset, s.model, s.opt, s.method, s.others), []).append(s)
    return [
        Best(max(tried, key=lambda setting: _merit(setting, by)), len(tried), by)
        for tried in gathered.values()
    ]


def _merit(setting: Setting, by: Basis) -> tuple[int, float]:
    mean, _ = _mean_and_deviation(setting.values(*_PATHS[by][0]))
    return -setting.diverged, mean if math.isfinite(mean) else -math.inf


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    known = [value for value in values if math.isfinite(value)]
    return (
        statistics.fmean(known) if known else math.nan,
        statistics.stdev(known) if len(known) > 1 else math.nan,
    )


def result(cells: Sequence[Cell], summaries: Sequence[Summary], folder: Path) -> dict[str, Any]:
    """What `wdprobe sweep` came to: counts by status, the best settings, a row for each cell."""
    found = settings(cells, summaries)
    return {
        "command": "sweep",
        "counts": Counter(str(summary["status"]) for summary in summaries),
        "chosen_by": f"{basis(found)} top-1",
        "best": [best.record() for best in best_settings(found)],
        "cells": rows(cells, summaries),
        "run": str(folder),
    }
