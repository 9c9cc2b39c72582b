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

_BLOCK, _TILE = 8192, 512  # weights that a program counts, and that it reads at a time
_WARPS = 4
TYPES = ("cuda", "xpu")  # of devices that Triton is for
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # as triton_passes.DTYPES


def fits(tensor: Tensor) -> bool:
    """Whether Triton can read it."""
    device = tensor.device
    on_gpu = device.type in TYPES and _is_right(device)
    return on_gpu and tensor.dtype in _DTYPES and alike(tensor, tensor)


class Whole:
    """Keeps weights themselves, all of the same dtype on one device; see :class:`.cpu.Whole`."""

    def __init__(self, kept: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        self._kept, self._now = list(kept), list(now)
        self._device, self._dtype = now[0].device, now[0].dtype
        blocks = Blocks(now, _BLOCK)
        addresses = (blocks.addresses(kept), blocks.addresses(now))
        table = np.stack([*addresses, blocks.sizes, blocks.numbers])
        self._table = self._sent(table).unbind()
        self._begins = self._sent(np.concatenate([[0], blocks.ends]))
        self._stale = torch.empty(len(now), dtype=torch.int32, device=self._device)
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
        if changed.all():
            return self.copy()
        if changed.any():
            self._stale.copy_(self._sent(changed.astype(np.int32)))
        else:
            self._stale.zero_()
        self._run("compare", self._stale, turn)
        self._run("renew", self._stale, turn)
        return None

    def count(self, by: Factors) -> Tensor:
        """Count what a step did, and keep what stands."""
        from . import triton_passes as passes

        wide = torch.float64 if self._dtype == torch.float64 else torch.float32
        return self._summed("count", self._c(by), WIDE=passes.DTYPES[wide])

    def _run(self, name: str, *arguments: Any, **constants: Any) -> None:
        """Launch a program of `triton_passes` for each block."""
        from . import triton_passes as passes

        blocks = len(self._table[0])
        with _current(self._device):
            if blocks:
                getattr(passes, name)[blocks,](
                    *self._table, *arguments, **constants, DTYPE=passes.DTYPES[self._dtype],
                    BLOCK=_BLOCK, TILE=_TILE, num_warps=_WARPS, enable_fp_fusion=False,
                )  # fmt: skip

    def _summed(self, name: str, *arguments: Any, **constants: Any) -> Tensor:
        """What a program finds in each block, summed by tensor."""
        from . import triton_passes as passes

        found, sums = (
            torch.empty(rows, passes.WIDTH, dtype=torch.float64, device=self._device)
            for rows in (len(self._table[0]), len(self._now))
        )
        self._run(name, *arguments, found, **constants)
        with _current(self._device):
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


class Signs(Whole):
    """Keeps of each weight its sign in a byte; see :class:`.cpu.Signs`."""

    @staticmethod
    def room(now: Tensor, old: Tensor | None) -> Tensor:
        """A tensor to keep signs in."""
        if old is not None and old.dtype == torch.int8 and alike(old, now):
            return old
        return torch.empty_like(now, dtype=torch.int8)

    def copy(self) -> None:
        """Keep the signs that stand."""
        self._run("keep_signs")

    def renew(self, changed: NDArray[np.bool_], turn: int) -> None:
        """Keep the signs that stand."""
        self.copy()

    def count(self, by: Factors) -> Tensor:
        """Count what has crossed zero, and keep the signs that stand; sizes are NaN."""
        sums = self._summed("count_signs")
        sums[:, RAW.index("opposing_size") :] = torch.nan
        return sums


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
