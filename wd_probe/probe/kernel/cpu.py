"""The passes over float32 weights on the CPU: `cpu.c`, compiled on first use (see `compiled`)."""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError, WdProbeError
from ..sums import PASSED, RAW, Doubles, Factors
from .blocks import Blocks, Integers, alike
from .compiled import library

_BLOCK = 1 << 18  # weights a thread takes at a time; also what keeps sums independent of threads
_WORD = 32  # signs in an integer of them


class _Passes(NamedTuple):
    """The compiled passes; see `cpu.c`."""

    copy: Callable[..., None]
    differs: Callable[..., None]
    tally: Callable[..., None]
    signs: Callable[..., None]
    differs_signs: Callable[..., None]
    tally_signs: Callable[..., None]


_SYMBOLS = [f"wd_probe_{name}" for name in _Passes._fields]
#: Of each how many arrays it takes after those of blocks of two tensors.
_MORE = (0, 2, 3, 2, 2, 2)


def fits(tensor: Tensor) -> bool:
    """Whether the passes can read it: plain float32 on the CPU, without gaps."""
    return (
        tensor.dtype == torch.float32
        and tensor.is_cpu
        and alike(tensor, tensor)
        and passes() is not None
    )


class Whole:
    """Keeps weights themselves. Valid while they stay where they are.

    Args:
        kept: what to keep them in, of :meth:`room`.
        now: the weights.
    """

    _DIFFERS = "differs"

    def __init__(self, kept: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        self._tensors = kept, now  # kept from being freed
        self._blocks = Blocks(now, _BLOCK)
        self._kept, self._now = self._places(kept), self._blocks.addresses(now)
        arrays = self._kept, self._now, self._blocks.sizes
        self._arrays = [array.ctypes.data for array in arrays]
        numbers = np.arange(len(self._blocks.sizes), dtype=np.uint64)
        self._draws = (numbers * 0x9E3779B1).astype(np.uint32)

    @staticmethod
    def room(now: Tensor, old: Tensor | None) -> Tensor:
        """A tensor to keep weights in: the old one, where it will do."""
        if old is not None and old.dtype == now.dtype and alike(old, now):
            return old
        return torch.empty_like(now)

    def copy(self, chosen: NDArray[np.bool_] | None = None) -> None:
        """Keep what stands, of all tensors or of the chosen ones."""
        self._call("copy", chosen=chosen)

    def renew(self, changed: NDArray[np.bool_], turn: int) -> None:
        """Keep what stands of tensors that have changed, or of which a sample has.

        Args:
            changed: of each tensor whether it is known to have.
            turn: picks another sample each time.
        """
        turns = self._draws + np.uint32(turn * 0x85EBCA77 % (1 << 32))
        found = np.zeros(len(turns), dtype=np.uint8)
        self._call(self._DIFFERS, turns, found)
        if not (changed.any() or found.any()):
            return
        stale = changed.copy()
        stale[self._blocks.numbers[found > 0]] = True
        self.copy(stale)

    def count(self, by: Factors) -> Tensor:
        """Count what a step did, and keep what stands; see :class:`.kernel.Kept`."""
        of = by.numbers[self._blocks.numbers]
        c = np.array([float(c) for c in by.c], dtype=np.float64)[of]
        after = np.array(by.of_stepped, dtype=np.uint8)[of]
        return _padded(self._sums("tally", c, after))

    def _places(self, kept: Sequence[Tensor]) -> Integers:
        return self._blocks.addresses(kept)

    def _sums(self, name: str, *more: NDArray[Any]) -> Doubles:
        found = np.zeros((len(self._blocks.sizes), PASSED))
        self._call(name, *more, found)
        return self._blocks.summed(found)

    def _call(
        self, name: str, *more: NDArray[Any], chosen: NDArray[np.bool_] | None = None
    ) -> None:
        """Call a compiled pass over the blocks of all tensors, or of the chosen ones."""
        sizes = self._blocks.sizes
        kept, now, of = self._arrays
        if chosen is not None:
            sizes = np.where(chosen[self._blocks.numbers], sizes, 0)
            of = sizes.ctypes.data
        compiled = getattr(passes(), name)
        rest = [array.ctypes.data for array in more]
        compiled(len(sizes), kept, now, of, torch.get_num_threads(), *rest)


class Signs(Whole):
    """Keeps a bit of each weight: whether it is negative; and one more where some are zero.

    What opposes is then what crosses zero (theory fact 30); of sizes it tells nothing.
    """

    _DIFFERS = "differs_signs"

    def __init__(self, kept: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        super().__init__(kept, now)
        self._zeros: Integers = np.zeros_like(self._kept)
        self._rooms: dict[int, Tensor] = {}  # by tensor, for which of its weights are zero

    @staticmethod
    def room(now: Tensor, old: Tensor | None) -> Tensor:
        """A tensor to keep signs in."""
        words = -(-now.numel() // _WORD)
        is_one = old is not None and old.dtype == torch.int32 and old.shape == (words,)
        return old if old is not None and is_one else torch.empty(words, dtype=torch.int32)

    def copy(self, chosen: NDArray[np.bool_] | None = None) -> None:
        """Keep the signs that stand."""
        found = np.zeros(len(self._blocks.sizes))
        self._call("signs", self._zeros, found, chosen=chosen)
        self._mark(self._blocks.summed(found[:, None])[:, 0] > 0)

    def count(self, by: Factors) -> Tensor:
        """Count what has crossed zero, and keep the signs that stand; sizes are NaN."""
        found = self._sums("tally_signs", self._zeros)
        zeros = found[:, RAW.index("size")].copy()
        found[:, RAW.index("opposing_size") :] = np.nan
        self._mark(zeros > 0)
        return _padded(found)

    def _places(self, kept: Sequence[Tensor]) -> Integers:
        begins = np.array([tensor.data_ptr() for tensor in kept], dtype=np.int64)
        found: Integers = begins[self._blocks.numbers] + self._blocks.starts // 8
        return found

    def _mark(self, has_zeros: NDArray[np.bool_]) -> None:
        """Keep which weights are zero, of tensors that had none before."""
        new = [k for k in np.flatnonzero(has_zeros).tolist() if k not in self._rooms]
        if not new:
            return
        kept = self._tensors[0]
        for k in new:
            self._rooms[k] = torch.zeros_like(kept[k])
        numbers = self._blocks.numbers
        begins = [self._rooms[k].data_ptr() if k in self._rooms else 0 for k in range(len(kept))]
        places = np.array(begins, dtype=np.int64)[numbers]
        self._zeros = np.where(places > 0, places + self._blocks.starts // 8, 0)
        chosen = np.zeros(len(kept), dtype=bool)
        chosen[new] = True
        self._call("signs", self._zeros, np.zeros(len(numbers)), chosen=chosen)


def _padded(found: Doubles) -> Tensor:
    """With columns for what passes do not add up."""
    result = np.zeros((len(found), len(RAW)))
    result[:, :PASSED] = found
    return torch.from_numpy(result)


@functools.cache
def passes() -> _Passes | None:
    """The compiled passes, or None where they are unavailable."""
    try:
        compiled = _library()
    except WdProbeError:
        return None
    pointer = ctypes.c_void_p
    found = _Passes(*(getattr(compiled, name) for name in _SYMBOLS))
    for function, more in zip(found, _MORE, strict=True):
        shared = (ctypes.c_int64, pointer, pointer, pointer, ctypes.c_int)
        function.argtypes = (*shared, *(pointer,) * more)  # type: ignore[attr-defined]
        function.restype = None  # type: ignore[attr-defined]
    return found


def why_not() -> WdProbeError | None:
    """Why there are no compiled passes: a RunError where there should be; None where there are."""
    if passes() is not None:
        return None
    try:
        _library()
    except WdProbeError as error:
        return error
    return None


def _library() -> ctypes.CDLL:
    if os.environ.get("WD_PROBE_KERNEL") == "0":
        raise InputError("WD_PROBE_KERNEL=0 turns it off")
    return library(resources.files(__package__).joinpath("cpu.c").read_bytes(), _SYMBOLS)
