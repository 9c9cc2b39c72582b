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
        self._pairs: list[tuple[Tensor | Moved, Tensor]] = []
        self._coarse: list[tuple[int, Tensor, Tensor, bool]] = []
        penalties = penalized.of_each(penalized.penalties)
        for k, (p, before, one) in enumerate(zip(self._weights, befores, penalties, strict=True)):
            pair: tuple[Tensor | Moved, Tensor] = before, local(p)
            if p.dtype.itemsize == 2 and one.is_stored and isinstance(before, Tensor):
                self._coarse.append((k, before, local(p), one.falls_after))
            elif one.falls_after and isinstance(before, Tensor):
                pair = (local(p), before)
            self._pairs.append(pair)
        self._tally = kernel.Tallying([a for a, _ in self._pairs], [b for _, b in self._pairs])

    def holds(self, penalized: Penalized, version: int) -> bool:
        """Whether it does for these."""
        return (
            same(penalized.weights, self._weights)
            and (_ways(penalized), version) == (self._ways, self._version)
            and places(penalized.weights) == self._places
        )

    def tally(self, penalized: Penalized) -> Tensor:
        """The float64 (weights, sums.WIDTH) sums; writes over copies, so it comes last."""
        for k, before, after, turned in self._coarse:
            _leave_out(before, after, penalized.penalties[penalized.numbers[k]].c, turned)
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


def _leave_out(before: Tensor, after: Tensor, c: float | Tensor, turned: bool) -> None:
    """Put 0 for weights that decay does not move, as (1 − c)θ is rounded to θ (theory fact 27).

    Where it falls after the step, what stands after it goes there too, with the sign from before.
    """
    if turned:
        signed = torch.copysign(after.abs(), before)
        before.copy_(torch.where(before == 0, after, signed))
    before.masked_fill_((before * (1 - c) == before) & before.isfinite(), 0)


def _ways(penalized: Penalized) -> list[tuple[str, bool]]:
    return penalized.of_each([(one.way, one.is_stored) for one in penalized.penalties])
