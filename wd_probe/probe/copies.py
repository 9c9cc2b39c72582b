"""The weights as they stood: kept from step to step, and taken anew where somebody wrote them."""

import math
import operator
from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from ..sharding import local
from . import kernel

#: What is kept of float32 weights from step to step: all of it, or their signs.
Keep = Literal["whole", "signs"]
#: Where a tensor's numbers lie, and how.
_Place = tuple[int, tuple[int, ...]]


class Copies:
    """What is kept of some weights between two looks at them.

    What stands after one step is what stands before the next (theory fact 28), unless somebody
    writes in between: that shows by a tensor's version, or, for writes past it (``.data``, other
    aliases), by a sample of every tensor (fact 29).
    """

    def __init__(self) -> None:
        self._rooms: dict[Tensor, Tensor] = {}
        self._weights: list[Tensor] = []
        self._signs: list[bool] = []
        self._places: list[_Place] = []
        self._versions: list[float] | None = None  # as the last count has left them
        self._kept: kernel.Kept | None = None
        self._turn = 0

    def __getitem__(self, p: Tensor) -> Tensor:
        return self._rooms[p]

    def take(self, weights: list[Tensor], signs: list[bool]) -> None:
        """Keep what stands of these weights.

        Args:
            weights: parameters.
            signs: of each whether its signs are enough.
        """
        places, versions = _places(weights), self._versions
        self._versions = None
        is_same = same(weights, self._weights) and (signs, places) == (self._signs, self._places)
        if self._kept is None or not is_same:
            self._weights, self._kept = [], None  # as they are if there is no memory for the rest
            old = [self._rooms.get(p) for p in weights]
            self._kept = kernel.Kept([local(p) for p in weights], signs, old)
            self._rooms.update(zip(weights, self._kept.rooms, strict=True))
            self._weights, self._signs, self._places = weights, signs, places
        elif versions is not None:
            changed = np.array(list(map(operator.ne, versions, _versions(weights))), dtype=bool)
            self._turn += 1
            return self._kept.renew(changed, self._turn)
        return self._kept.copy()

    def count(self, factors: Sequence[float | Tensor], of_stepped: Sequence[bool]) -> Tensor:
        """Count what a step did to the weights taken, and keep what stands.

        Args:
            factors: c of each.
            of_stepped: of each whether what stands is weighed (see :func:`.formulas.tally`).

        Returns:
            The float64 (weights, len(sums.RAW)) sums.

        Raises:
            RuntimeError: the step has put the weights elsewhere, laid out otherwise.
        """
        if _places(self._weights) != self._places:
            self._follow()
        assert self._kept is not None
        found = self._kept.count(factors, of_stepped)
        self._versions = _versions(self._weights)
        return found

    def _follow(self) -> None:
        """Go where a step has put its weights."""
        old = [self._rooms[p] for p in self._weights]
        moved = kernel.Kept([local(p) for p in self._weights], self._signs, old)
        if any(self._signs) or not same(moved.rooms, old):
            raise RuntimeError("the step has put its weights elsewhere, laid out otherwise")
        self._kept, self._places = moved, _places(self._weights)


def _places(weights: Sequence[Tensor]) -> list[_Place]:
    return [(here.data_ptr(), here.stride()) for here in map(local, weights)]


def _versions(weights: Sequence[Tensor]) -> list[float]:
    """Of each how often it was written, as torch counts; NaN where it does not."""
    return [math.nan if here.is_inference() else here._version for here in map(local, weights)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two lists hold the very same tensors."""
    return len(one) == len(other) and all(map(operator.is_, one, other))
