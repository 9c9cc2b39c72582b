"""The plan of a count: which tensor is counted against which, and where they lie."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..sharding import local
from . import formulas, kernel
from .copies import places, same
from .movement import Moved
from .penalties import Penalized


class Plan:
    """Counts what a step did by closed rules.

    Prepared once, it holds while the same tensors are penalized in the same ways and lie where
    they lay.

    Args:
        penalized: the weights, whose penalties all have a closed rule.
        befores: what is known of each as it stood before the step.
        version: of the copies among these.
        rows: which of the probe's parameters they are.
    """

    def __init__(
        self,
        penalized: Penalized,
        befores: Sequence[Tensor | Moved],
        version: int,
        rows: NDArray[np.int64],
    ) -> None:
        self.rows = rows
        self._weights, self._ways, self._version = penalized.weights, _ways(penalized), version
        self._places = places(self._weights)
        falls_after = penalized.of_each([one.falls_after for one in penalized.penalties])
        self._pairs: list[tuple[Tensor | Moved, Tensor]] = []
        for p, before, turned in zip(self._weights, befores, falls_after, strict=True):
            if turned and isinstance(before, Tensor):
                self._pairs.append((local(p), before))
            else:
                self._pairs.append((before, local(p)))
        self._tally = kernel.Tallying([a for a, _ in self._pairs], [b for _, b in self._pairs])

    def holds(self, penalized: Penalized, version: int) -> bool:
        """Whether it does for these."""
        return (
            same(penalized.weights, self._weights)
            and (_ways(penalized), version) == (self._ways, self._version)
            and places(penalized.weights) == self._places
        )

    def tally(self, penalized: Penalized) -> Tensor:
        """The float64 (weights, sums.WIDTH) sums."""
        return self._tally(penalized.of_each([one.factor for one in penalized.penalties]))

    def profile(self, penalized: Penalized, rates: Sequence[float]) -> Tensor:
        """The float64 (weights, rates) counts at other decay rates; for decay beside a step."""
        rows = []
        penalties = penalized.of_each(penalized.penalties)
        for (before, after), one in zip(self._pairs, penalties, strict=True):
            c = float(one.c)
            factors = [c * wanted / one.rate for wanted in rates]
            theta = before.before(after) if isinstance(before, Moved) else before
            rows.append(formulas.profile(theta, after, c, factors).double().cpu())
        return torch.stack(rows) if rows else torch.zeros(0, len(rates), dtype=torch.float64)


def _ways(penalized: Penalized) -> list[str]:
    return penalized.of_each([one.way for one in penalized.penalties])
