"""The weights as they stood: kept from step to step, and taken anew where somebody wrote them."""

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..sharding import PLAIN, local
from . import kernel
from .sums import Factors

#: What is kept of float32 weights from step to step: all of it, or their signs.
Keep = Literal["whole", "signs"]


class Copies:
    """What is kept of some weights between two looks at them.

    What stands after one step is what stands before the next (theory fact 28), unless somebody
    writes in between: that shows by a tensor's version, or, for writes past it (``.data``, other
    aliases), by a sample of every tensor (fact 29).
    """

    def __init__(self) -> None:
        self._rooms: dict[Tensor, Tensor] = {}
        self._weights: list[Tensor] = []
        self._signs = False
        self._places: tuple[list[int], list[Any]] = [], []  # where numbers lie, and how
        self._versions: list[float] | None = None  # as the last count has left them
        self._kept: kernel.Kept | None = None
        self._turn = 0

    def __getitem__(self, p: Tensor) -> Tensor:
        return self._rooms[p]

    def take(self, weights: list[Tensor], *, signs: bool) -> bool:
        """Keep what stands of these weights.

        Args:
            weights: parameters.
            signs: whether signs are enough of those of float32.

        Returns:
            Whether they are others than before, or lie elsewhere or otherwise.
        """
        here, versions = _here(weights), self._versions
        layout = [*map(Tensor.stride, here), *map(Tensor.numel, here)]
        places, self._versions = (_pointers(here), layout), None
        is_same = same(weights, self._weights) and (signs, places) == (self._signs, self._places)
        if self._kept is None or not is_same:
            self._weights, self._kept = [], None  # as they are if there is no memory for the rest
            self._kept = kernel.Kept(here, signs, [self._rooms.get(p) for p in weights])
            self._rooms.update(zip(weights, self._kept.rooms, strict=True))
            self._weights, self._signs, self._places = weights, signs, places
        elif versions is not None:
            changed = np.array(list(map(operator.ne, versions, _versions(here))), dtype=bool)
            self._turn += 1
            self._kept.renew(changed, self._turn)
            return False
        self._kept.copy()
        return not is_same

    def count(self, by: Factors) -> Tensor:
        """Count what a step did to the weights taken, and keep what stands.

        Returns:
            The float64 (weights, len(sums.RAW)) sums.

        Raises:
            RuntimeError: the step has put the weights elsewhere, laid out otherwise.
        """
        here = _here(self._weights)
        if _pointers(here) != self._places[0]:
            self._follow(here)
        assert self._kept is not None
        found = self._kept.count(by)
        self._versions = _versions(here)
        return found

    def _follow(self, here: list[Tensor]) -> None:
        """Go where a step has put its weights."""
        old = [self._rooms[p] for p in self._weights]
        moved = kernel.Kept(here, self._signs, old)
        if self._signs or not same(moved.rooms, old):
            raise RuntimeError("the step has put its weights elsewhere, laid out otherwise")
        self._kept, self._places = moved, (_pointers(here), self._places[1])


def _here(weights: list[Tensor]) -> list[Tensor]:
    """The parts of weights that this process holds."""
    return weights if PLAIN.issuperset(map(type, weights)) else list(map(local, weights))


def _pointers(here: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, here))


def _versions(here: list[Tensor]) -> list[float]:
    """Of each how often it was written, as torch counts; NaN where it does not."""
    try:
        return list(map(_version, here))
    except RuntimeError:  # inference tensors have none
        return [math.nan if one.is_inference() else one._version for one in here]


_version = operator.attrgetter("_version")


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two lists hold the very same tensors."""
    return len(one) == len(other) and all(map(operator.is_, one, other))
