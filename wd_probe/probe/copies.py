"""Copies of the weights, made ahead of a step."""

import operator
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..sharding import local
from . import kernel

#: What is kept of the weights during a step: all of it, the upper half of every number, or nothing
#: where the optimizer's state tells how far they moved.
Keep = Literal["whole", "half", "nothing"]
#: An address, how the numbers there are laid out, and of which kind.
_Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


class Copies:
    """A copy of each of some weights, made anew before every step.

    Args:
        keep: of float32 weights the whole, or the upper half of every number.

    Attributes:
        version: changes where a copy comes to lie elsewhere.
    """

    def __init__(self, keep: Keep) -> None:
        self.version = 0
        self._half = keep == "half"
        self._kept: dict[Tensor, Tensor] = {}
        self._weights: list[Tensor] = []
        self._places: list[_Place] = []
        self._passes: list[kernel.Copying] = []

    def __getitem__(self, p: Tensor) -> Tensor:
        return self._kept[p]

    def take(self, weights: list[Tensor]) -> None:
        """Copy these weights."""
        lie = places(weights)
        if not (same(weights, self._weights) and lie == self._places):
            self._weights, self._passes = [], []  # as they are if there is no memory for the rest
            self._passes = self._prepared(weights)
            self._weights, self._places = weights, lie
        for copying in self._passes:
            copying()

    def _prepared(self, weights: list[Tensor]) -> list[kernel.Copying]:
        by_kind: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for p in weights:
            kept, here = self._kept.get(p), local(p)
            half = self._half and here.dtype == torch.float32
            dtype = torch.bfloat16 if half else here.dtype
            layout = here.shape, here.stride(), dtype
            if kept is None or (kept.shape, kept.stride(), kept.dtype) != layout:
                self.version += 1
                kept = self._kept[p] = torch.empty_like(here, dtype=dtype)
            targets, sources = by_kind.setdefault((here.device, here.dtype), ([], []))
            targets.append(kept)
            sources.append(here)
        return [kernel.Copying(*both) for both in by_kind.values()]


def places(weights: Sequence[Tensor]) -> list[_Place]:
    """Where their numbers lie."""
    return [
        (here.data_ptr(), here.shape, here.stride(), here.dtype) for here in map(local, weights)
    ]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two lists hold the very same tensors."""
    return len(one) == len(other) and all(map(operator.is_, one, other))
