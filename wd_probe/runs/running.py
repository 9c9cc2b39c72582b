"""What a long run keeps of its steps in little room."""

import math
from typing import Any


class Running:
    """Count, mean, largest and last of numbers that come one by one; NaN counts as last only."""

    def __init__(self) -> None:
        self.count, self.total, self.top, self.last = 0, 0.0, math.nan, math.nan

    def add(self, value: float) -> None:
        """One more."""
        self.last = value
        if math.isfinite(value):
            self.count += 1
            self.total += value
            self.top = value if math.isnan(self.top) else max(self.top, value)

    @property
    def mean(self) -> float:
        """Of those that are numbers; NaN if none is."""
        return self.total / self.count if self.count else math.nan

    def statistics(self) -> dict[str, float]:
        """Mean, largest and last; all NaN if none is a number."""
        last = self.last if self.count else math.nan
        return {"mean": self.mean, "max": self.top, "last": last}

    def state_dict(self) -> dict[str, Any]:
        """Its four numbers."""
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.count, self.total = int(state["count"]), float(state["total"])
        self.top, self.last = float(state["top"]), float(state["last"])


class Stretches:
    """Cuts a run's steps into stretches: of one step for the first 2,000, then ever longer.

    A stretch is a thousandth of the steps before it, so that their number grows with the logarithm
    of the run's length: 6,178 for 100,000 steps, 10,791 for ten million.
    """

    def __init__(self) -> None:
        self.count, self.end = 0, 0

    def ends(self) -> bool:
        """Count a step; whether it is the last of its stretch."""
        if self.count == self.end:
            self.end += max(1, self.count // 1000)
        self.count += 1
        return self.count == self.end

    def state_dict(self) -> dict[str, Any]:
        """Its two numbers."""
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.count, self.end = int(state["count"]), int(state["end"])
