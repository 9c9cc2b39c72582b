"""Counting on a GPU in two launches of Triton, whatever the number of tensors.

Where Triton is missing, or does not count as torch does on this device, torch counts instead.
"""

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import formulas
from ..movement import Moved
from ..sums import WIDTH
from .blocks import Blocks, alike

_BLOCK, _TILE = 8192, 1024  # weights that a program counts, and that it reads at a time
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # as triton_passes.DTYPES


def way(before: Tensor | Moved, after: Tensor) -> "Callable[..., Tally] | None":
    """What counts a tensor before against after, or None where Triton cannot."""
    device = after.device
    if device.type not in ("cuda", "xpu") or not _is_right(device):
        return None
    moved = isinstance(before, Moved)
    read = [before.first, before.second] if isinstance(before, Moved) else [before]
    given = [tensor for tensor in read if tensor is not None]
    known = (torch.float32,) if moved else _DTYPES
    if after.dtype in known and all(t.dtype in known and alike(t, after) for t in given):
        lined_up = after.numel() % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in (*given, after))
        return _maker(lined_up, device, given[0].dtype, after.dtype, moved)
    return None


@functools.cache
def _maker(lined_up: bool, *_: object) -> "Callable[..., Tally]":
    """One for each of what tensors that are counted together have in common."""
    return functools.partial(Tally, lined_up=lined_up)


class Tally:
    """Counts tensors before against after, all of the same dtypes on one device.

    Args:
        befores: the weights before, or how far they moved.
        afters: the weights after.
        lined_up: whether every tensor begins at a multiple of 16 bytes and has a multiple of 16
            weights, so that several are read at a time.
    """

    def __init__(
        self,
        befores: Sequence[Tensor | Moved],
        afters: Sequence[Tensor],
        lined_up: bool = False,
    ) -> None:
        self._tensors = befores, afters  # kept from being freed
        self._lined_up = lined_up
        self._device, self._count = afters[0].device, len(afters)
        blocks = Blocks(afters, _BLOCK)
        moves = [before for before in befores if isinstance(before, Moved)]
        first: list[Tensor] = [b.first if isinstance(b, Moved) else b for b in befores]
        second = [first[k] if one.second is None else one.second for k, one in enumerate(moves)]
        has_second = np.array([one.second is not None for one in moves], dtype=np.int64)
        addresses = [blocks.addresses(first), blocks.addresses(afters)]
        if moves:
            addresses.append(blocks.addresses(second) * has_second[blocks.numbers])
        squares = addresses[2] if moves else np.zeros_like(blocks.sizes)
        table = np.stack([*addresses[:2], squares, blocks.sizes, blocks.numbers])
        self._table = self._sent(table).unbind()
        self._begins = self._sent(np.concatenate([[0], blocks.ends]))
        numbers = np.array([one[2:] for one in moves], dtype=np.float32)
        self._moves, self._moved = self._sent(numbers), bool(moves)
        self._dtypes = first[0].dtype, afters[0].dtype
        self._factors: tuple[Any, Tensor | None] = (None, None)

    def __call__(self, factors: Sequence[float | Tensor]) -> Tensor:
        """The float64 (tensors, WIDTH) sums at these c."""
        from . import triton_passes as passes

        c = self._c(factors)
        blocks = len(self._table[0])
        before, after = (passes.DTYPES[dtype] for dtype in self._dtypes)
        wide = passes.DTYPES[torch.float64 if torch.float64 in self._dtypes else torch.float32]
        found, sums = (
            torch.empty(rows, passes.WIDTH, dtype=torch.float64, device=self._device)
            for rows in (blocks, self._count)
        )
        with _current(self._device):
            if blocks:
                passes.count[blocks,](
                    *self._table, c, self._moves, found,
                    BEFORE=before, AFTER=after, WIDE=wide, MOVED=self._moved,
                    LINED_UP=self._lined_up, BLOCK=_BLOCK, TILE=_TILE, enable_fp_fusion=False,
                )  # fmt: skip
            passes.fold[self._count,](found, self._begins, sums, TILE=64, enable_fp_fusion=False)
        return sums[:, :WIDTH]

    def _c(self, factors: Sequence[float | Tensor]) -> Tensor:
        """The factors on the device; sent only when they have changed."""
        tensors = {id(c): c for c in factors if isinstance(c, Tensor)}
        plain = [0.0 if isinstance(c, Tensor) else c for c in factors]
        known, sent = self._factors
        if sent is None or known != plain:
            sent = self._sent(np.array(plain, dtype=np.float64))
            self._factors = plain, sent
        for one in tensors.values():
            where = self._sent(np.array([c is one for c in factors]))
            sent = torch.where(where, one.to(self._device, torch.float64, non_blocking=True), sent)
        return sent

    def _sent(self, array: NDArray[Any]) -> Tensor:
        """A copy on the device, which the host does not wait for."""
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _is_right(device: torch.device) -> bool:
    """Whether Triton is there and counts as `formulas.tally` does on this device."""
    if os.environ.get("WD_PROBE_KERNEL") == "0":
        return False
    generator = torch.Generator().manual_seed(0)
    theta, step = (torch.randn(_BLOCK + 77, generator=generator).to(device) for _ in range(2))
    theta[:4] = torch.tensor([0.0, torch.nan, torch.inf, -1e-40])
    stepped = theta * 0.9 - step * 0.1
    try:
        found = Tally([theta, theta], [stepped, -theta])([0.1, 0.01])
    except Exception:  # of whatever a compiler and a driver may raise
        return False
    expected = [formulas.tally(theta, stepped, 0.1), formulas.tally(theta, -theta, 0.01)]
    return torch.allclose(found, torch.stack(expected), rtol=1e-5)
