"""Counting on a GPU in two launches of Triton, whatever the number of tensors.

Where Triton is missing, or does not count as torch does on this device, torch counts instead.
"""

import functools
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError, RunError, WdProbeError, first_line
from .. import formulas
from ..sums import RAW, Factors
from .blocks import Blocks, alike

_BLOCK, _TILE = 8192, 1024  # weights that a program counts, and that it reads at a time
TYPES = ("cuda", "xpu")  # of devices that Triton is for
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # as triton_passes.DTYPES


def fits(tensor: Tensor) -> bool:
    """Whether Triton can read it."""
    device = tensor.device
    on_gpu = device.type in TYPES and _is_right(device)
    return on_gpu and tensor.dtype in _DTYPES and alike(tensor, tensor)


def is_lined_up(tensor: Tensor) -> bool:
    """Whether it begins at a multiple of 16 bytes and has a multiple of 16 weights.

    Several are then read at a time.
    """
    return tensor.numel() % 16 == 0 and tensor.data_ptr() % 16 == 0


class Whole:
    """Keeps weights themselves, all of the same dtype on one device; see :class:`.cpu.Whole`."""

    _LINED_UP = False

    def __init__(self, kept: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        self._kept, self._now = list(kept), list(now)
        self._device, self._dtype = now[0].device, now[0].dtype
        blocks = Blocks(now, _BLOCK)
        addresses = (blocks.addresses(kept), blocks.addresses(now))
        table = np.stack([*addresses, blocks.sizes, blocks.numbers])
        self._table = self._sent(table).unbind()
        self._begins = self._sent(np.concatenate([[0], blocks.ends]))
        self._factors: tuple[Any, Tensor | None] = (None, None)

    @staticmethod
    def room(now: Tensor, old: Tensor | None) -> Tensor:
        """A tensor to keep weights in: the old one, where it will do."""
        if old is not None and old.dtype == now.dtype and alike(old, now):
            return old
        return torch.empty_like(now)

    def copy(self) -> None:
        """Keep what stands."""
        torch._foreach_copy_(self._kept, self._now)

    def renew(self, changed: NDArray[np.bool_], turn: int) -> None:
        """Keep what stands of tensors that have changed, or of which a sample has."""
        from . import triton_passes as passes

        if changed.all():
            return self.copy()
        stale = self._sent(changed.astype(np.int32))
        blocks = len(self._table[0])
        for run in (passes.compare, passes.renew) if blocks else ():
            with _current(self._device):
                run[blocks,](
                    *self._table, stale, turn, DTYPE=passes.DTYPES[self._dtype],
                    LINED_UP=self._LINED_UP, BLOCK=_BLOCK, TILE=_TILE,
                )  # fmt: skip
        return None

    def count(self, by: Factors) -> Tensor:
        """Count what a step did, and keep what stands."""
        from . import triton_passes as passes

        c = self._c(by)
        blocks = len(self._table[0])
        wide = passes.DTYPES[torch.float64 if self._dtype == torch.float64 else torch.float32]
        found, sums = (
            torch.empty(rows, passes.WIDTH, dtype=torch.float64, device=self._device)
            for rows in (blocks, len(self._now))
        )
        with _current(self._device):
            if blocks:
                passes.count[blocks,](
                    *self._table, c, found,
                    DTYPE=passes.DTYPES[self._dtype], WIDE=wide, LINED_UP=self._LINED_UP,
                    BLOCK=_BLOCK, TILE=_TILE, enable_fp_fusion=False,
                )  # fmt: skip
            passes.fold[len(self._now),](found, self._begins, sums, TILE=64, enable_fp_fusion=False)
        return sums[:, : len(RAW)]

    def _c(self, by: Factors) -> Tensor:
        """The factors on the device, −1 where what stands is weighed; sent when they change."""
        pairs = list(zip(by.c, by.of_stepped, strict=True))
        plain = [-1.0 if is_of else 0.0 if isinstance(c, Tensor) else c for c, is_of in pairs]
        known, sent = self._factors
        if sent is None or known[0] != plain or not np.array_equal(known[1], by.numbers):
            sent = self._sent(np.array(plain, dtype=np.float64)[by.numbers])
            self._factors = (plain, by.numbers), sent
        for k, (one, is_of) in enumerate(pairs):
            if isinstance(one, Tensor) and not is_of:
                there = one.to(self._device, torch.float64, non_blocking=True)
                sent = torch.where(self._sent(by.numbers == k), there, sent)
        return sent

    def _sent(self, array: NDArray[Any]) -> Tensor:
        """A copy on the device, which the host does not wait for."""
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


class LinedUp(Whole):
    """The same of tensors that are lined up."""

    _LINED_UP = True


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _is_right(device: torch.device) -> bool:
    """Whether Triton is there and counts as `formulas.tally` does on this device."""
    return why_not(device) is None


def why_not(device: torch.device) -> WdProbeError | None:
    """Why Triton does not count on a device: a RunError where it should; None where it does."""
    if os.environ.get("WD_PROBE_KERNEL") == "0":
        return InputError("WD_PROBE_KERNEL=0 turns it off")
    if importlib.util.find_spec("triton") is None:
        return InputError("triton is not installed")
    generator = torch.Generator().manual_seed(0)
    theta, step = (torch.randn(_BLOCK + 77, generator=generator).to(device) for _ in range(2))
    theta[:4] = torch.tensor([0.0, torch.nan, torch.inf, -1e-40])
    stepped = theta * 0.9 - step * 0.1
    kept = [theta.clone(), theta.clone()]
    try:
        found = Whole(kept, [stepped, -theta]).count(
            Factors(np.arange(2), [0.1, 0.01], [False] * 2)
        )
    except Exception as error:  # whatever a compiler and a driver may raise
        return RunError(f"Triton fails: {first_line(error)}")
    expected = [formulas.tally(theta, stepped, 0.1), formulas.tally(theta, -theta, 0.01)]
    stands = torch.stack(kept), torch.stack([stepped, -theta])
    is_right = torch.allclose(found, torch.stack(expected), rtol=1e-5) and torch.allclose(
        *stands, rtol=0, atol=0, equal_nan=True
    )
    return None if is_right else RunError("Triton counts otherwise than torch")
