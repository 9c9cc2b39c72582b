"""The passes over float32 weights on the CPU.

They are in `cpu.c`, compiled on first use (see `compiled`). Without a compiler, or with
``WD_PROBE_KERNEL=0``, numpy does the same more slowly.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..movement import Moved
from ..sums import WIDTH, Doubles
from .blocks import Blocks, Integers, alike
from .compiled import library

_BLOCK = 1 << 18  # weights a thread takes at a time; also what keeps sums independent of threads

Floats = NDArray[np.float32]


class _Passes(NamedTuple):
    """The compiled passes; see `cpu.c`."""

    copy: Callable[..., None]
    halve: Callable[..., None]
    tally: Callable[..., None]
    tally_half: Callable[..., None]
    tally_state: Callable[..., None]


# --- which tensors -------------------------------------------------------------------------------


def copying(target: Tensor, source: Tensor) -> str | None:
    """The pass that copies a source into its target, or None where none does."""
    if passes() is None:
        return None
    if _fits(target, source):
        return "copy"
    return "halve" if _halves(target, source) else None


def copier(name: str, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Callable[[], None]:
    """What copies sources into targets by a pass, while they stay where they are."""
    blocks = Blocks(sources, _BLOCK)
    return partial(_run, name, blocks, blocks.addresses(sources), blocks.addresses(targets))


def way(before: Tensor | Moved, after: Tensor) -> "type[Tally] | None":
    """What counts a tensor before against after, or None where the passes cannot."""
    if isinstance(before, Moved):
        second = before.first if before.second is None else before.second
        follows = _fits(before.first, after) and _fits(second, after)
        return _State if follows and passes() else None
    if _fits(before, after):
        return _Whole if passes() else _InNumpy
    return _Half if _halves(before, after) and passes() else None


def _fits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are plain float32 on the CPU, laid out alike without gaps."""
    return one.dtype == torch.float32 and _are_floats(one, other)


def _halves(one: Tensor, other: Tensor) -> bool:
    """Whether the first may hold the upper halves of the second's numbers."""
    return one.dtype == torch.bfloat16 and _are_floats(one, other)


def _are_floats(one: Tensor, other: Tensor) -> bool:
    return other.dtype == torch.float32 and other.is_cpu and alike(one, other)


# --- counting ------------------------------------------------------------------------------------


class Tally:
    """Counts tensors before against after, block by block."""

    def __init__(self, befores: Sequence[Any], afters: Sequence[Tensor]) -> None:
        self._tensors = befores, afters  # kept from being freed
        self.blocks = Blocks(afters, _BLOCK)
        self.before, self.after = map(self.blocks.addresses, (befores, afters))

    def __call__(self, factors: Sequence[float | Tensor]) -> Tensor:
        """The float64 (tensors, WIDTH) sums at these c."""
        c = np.array([float(factor) for factor in factors], dtype=np.float32)[self.blocks.numbers]
        found = np.zeros((len(c), WIDTH))
        self.count(c, found)
        return torch.from_numpy(self.blocks.summed(found))

    def count(self, c: Floats, found: Doubles) -> None:
        """Add every block's counts to its row."""
        raise NotImplementedError

    def run(self, name: str, *more: NDArray[Any]) -> None:
        """Call a compiled pass."""
        _run(name, self.blocks, self.before, self.after, *more)


class _Whole(Tally):
    def count(self, c: Floats, found: Doubles) -> None:
        self.run("tally", c, found)


class _Half(Tally):
    def count(self, c: Floats, found: Doubles) -> None:
        self.run("tally_half", c, found)


class _State(Tally):
    def __init__(self, befores: Sequence[Moved], afters: Sequence[Tensor]) -> None:
        super().__init__([moved.first for moved in befores], afters)
        self._moved = befores
        numbers = self.blocks.numbers
        has_second = np.array([moved.second is not None for moved in befores])
        seconds = [moved.first if moved.second is None else moved.second for moved in befores]
        self._second = self.blocks.addresses(seconds) * has_second[numbers]
        self._numbers = np.array([moved[2:] for moved in befores], np.float32)[numbers].T.copy()

    def count(self, c: Floats, found: Doubles) -> None:
        self.run("tally_state", self._second, *self._numbers, c, found)


class _InNumpy(Tally):
    def count(self, c: Floats, found: Doubles) -> None:
        def work(k: int) -> None:
            size = self.blocks.sizes[k]
            before, after = _array(self.before[k], size), _array(self.after[k], size)
            found[k] = tally_numpy(before, after, float(c[k]))

        _in_threads(len(c), work)


def _run(name: str, blocks: Blocks, first: Integers, second: Integers, *more: NDArray[Any]) -> None:
    """Call a compiled pass over blocks of two tensors each."""
    compiled = getattr(passes(), name)
    pointers = [array.ctypes.data for array in (first, second, blocks.sizes, *more)]
    compiled(len(blocks.sizes), *pointers[:3], torch.get_num_threads(), *pointers[3:])


def _array(address: np.int64, size: np.int64) -> Floats:
    return np.ctypeslib.as_array((ctypes.c_float * int(size)).from_address(int(address)))


def tally_numpy(theta: Floats, stepped: Floats, c: float) -> list[float]:
    """One block: the few weights that may have crossed zero are found fast, then looked at."""
    with np.errstate(all="ignore"):
        product = theta * stepped
        near = product > 0
        np.logical_not(near, out=near)  # crossed, zero, underflown or NaN
        total = float(np.abs(theta, out=product).sum())
        if not (np.isfinite(total) and np.isfinite(stepped.sum())):
            near[:] = True  # NaN, infinity, or a sum too large for float32
        where = np.flatnonzero(near)
        old, new = theta[where].astype(np.float64), stepped[where].astype(np.float64)
        finite = np.isfinite(old) & np.isfinite(new)
        if not (finite.all() and np.isfinite(total)):
            total = float(np.abs(old[finite]).sum())
        across = finite & (np.sign(old) * np.sign(new) < 0)
        opposes = across & (np.abs(new) > c / 2 * np.abs(old))
        flipped = across & (np.abs(new) > c * np.abs(old))
    bad = len(finite) - int(finite.sum())
    return [
        len(theta) - bad - int((finite & (old == 0)).sum()),
        int(opposes.sum()),
        int(flipped.sum()),
        bad,
        float(np.abs(old[opposes]).sum()),
        total,
    ]


def _in_threads(count: int, work: Callable[[int], None]) -> None:
    """Call ``work(0)`` to ``work(count - 1)`` in as many threads as torch uses."""
    threads = max(1, min(torch.get_num_threads(), count))

    def share(first: int) -> None:
        for k in range(first, count, threads):
            work(k)

    others = [_pool().submit(share, first) for first in range(1, threads)]
    share(0)
    for other in others:
        other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="wd_probe")


@functools.cache
def passes() -> _Passes | None:
    """The compiled passes, or None where they are unavailable."""
    names = [f"wd_probe_{name}" for name in _Passes._fields]
    if os.environ.get("WD_PROBE_KERNEL") == "0":
        return None
    compiled = library(resources.files(__package__).joinpath("cpu.c").read_bytes(), names)
    if compiled is None:
        return None
    pointer = ctypes.c_void_p
    found = _Passes(*(getattr(compiled, name) for name in names))
    for function, more in zip(found, (0, 0, 2, 2, 7), strict=True):
        shared = (ctypes.c_int64, pointer, pointer, pointer, ctypes.c_int)
        function.argtypes = (*shared, *(pointer,) * more)  # type: ignore[attr-defined]
        function.restype = None  # type: ignore[attr-defined]
    return found
