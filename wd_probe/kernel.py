"""The probe's work on many tensors at once: on the CPU at the speed of memory.

The passes are in `kernel.c`, compiled once per machine with the C compiler that `torch.compile`
uses too (``$CC``, else ``cc``) and kept in the user's cache. Without a compiler, or with
``WD_PROBE_KERNEL=0``, numpy does the same more slowly. On other devices torch does.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import penalty
from .errors import InputError
from .sharding import PLAIN

_BLOCK = 1 << 18  # weights a thread takes at a time; also what keeps sums independent of threads
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# OpenMP finds the runtime that torch has loaded already, and so the same threads: a pool of our own
# would compete with theirs, which spin for a while after every operation.
_THREADING = ("-fopenmp", "-fopenmp-simd")
_FIELDS = len(penalty.TALLY_FIELDS)

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


class Moved(NamedTuple):
    """How far a step moved a tensor, by the optimizer's state after it.

    θ = (θ' + rate·first / (√second·root + eps)) · up; without ``second``, (θ' + rate·first) · up.
    """

    first: Tensor
    second: Tensor | None
    rate: float
    root: float
    eps: float
    up: float

    def before(self, stepped: Tensor) -> Tensor:
        """θ; 0 where it is no more than rounding may have left of a zero."""
        moved = self.rate * self.first.float()
        if self.second is not None:
            moved = moved / (self.second.float().sqrt() * self.root + self.eps)
        theta = (stepped.float() + moved) * self.up
        still = (theta.abs() <= 1e-6 * moved.abs()) & moved.isfinite()
        return torch.where(still, 0.0, theta)


#: θ or what is known of it, θ', and c.
Job = tuple[Tensor | Moved, Tensor, float | Tensor]


class _Blocks(NamedTuple):
    """Two tensors' memory cut into blocks: int64 arrays, one entry a block."""

    first: Integers
    second: Integers
    sizes: Integers
    starts: Integers  # in the tensor
    numbers: Integers  # which pair of tensors it is of

    def run(self, compiled: Callable[..., None], *more: int) -> None:
        """Call a compiled pass over the blocks."""
        first, second, sizes = (part.ctypes.data for part in self[:3])
        compiled(len(self.sizes), first, second, sizes, torch.get_num_threads(), *more)


class _Passes(NamedTuple):
    """The compiled passes; see `kernel.c`."""

    copy: Callable[..., None]
    halve: Callable[..., None]
    tally: Callable[..., None]
    tally_half: Callable[..., None]
    tally_state: Callable[..., None]


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy every source into its target, all of the same device, dtype and layout.

    A float32 source may have a bfloat16 target, which only `tally_all` is to read: on the CPU it
    holds the upper half of every number.
    """
    passes = _passes()
    if passes is not None and all(map(_fits, targets, sources)):
        _blocks(sources, targets).run(passes.copy)
    elif passes is not None and all(map(_halves, targets, sources)):
        _blocks(sources, targets).run(passes.halve)
    else:
        torch._foreach_copy_(list(targets), list(sources))


def tally_all(jobs: Sequence[Job]) -> Tensor:
    """`penalty.tally` of every (θ, θ', c).

    Args:
        jobs: for each tensor the weights before (or their copy in bfloat16, or how far they moved),
            the weights after and the factor taken off.

    Returns:
        A float64 tensor (len(jobs), len(TALLY_FIELDS)) on the weights' device; the device is not
        waited for.
    """
    if not jobs:
        return torch.zeros(0, _FIELDS, dtype=torch.float64)
    by_way: dict[Callable[[Sequence[Any]], Tensor], list[int]] = {}
    wide = [_widened(job) for job in jobs]
    for number, (theta, stepped, _) in enumerate(wide):
        if isinstance(theta, Moved):
            way = _tally_moved
        elif _fits(theta, stepped):
            way = _tally_whole
        else:
            way = _tally_half if _passes() and _halves(theta, stepped) else _tally_plainly
        by_way.setdefault(way, []).append(number)
    if len(by_way) == 1:
        return next(iter(by_way))(wide)
    device = jobs[0][1].device
    result = torch.zeros(len(jobs), _FIELDS, dtype=torch.float64, device=device)
    for tally, chosen in by_way.items():
        result[chosen] = tally([wide[number] for number in chosen]).to(device)
    return result


def _widened(job: Job) -> Job:
    """The job in float32, where the compiled passes take it so."""
    theta, stepped, c = job
    if isinstance(theta, Moved):
        if _passes() and _follows(theta, stepped):
            return job
        theta = theta.before(stepped)
    if stepped.dtype != torch.float32 or not _passes():
        theta = _float32(theta)
    return theta, _float32(stepped), c


def _tally_plainly(jobs: Sequence[Any]) -> Tensor:
    device = jobs[0][1].device
    return torch.stack([penalty.tally(*job).to(device, non_blocking=True) for job in jobs])


def _float32(tensor: Tensor) -> Tensor:
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if half else tensor


def _fits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are plain float32 on the CPU, laid out alike without gaps."""
    return one.dtype == torch.float32 and _alike(one, other)


def _halves(one: Tensor, other: Tensor) -> bool:
    """Whether the first may hold the upper halves of the second's numbers."""
    return one.dtype == torch.bfloat16 and _alike(one, other)


def _follows(moved: Moved, stepped: Tensor) -> bool:
    second = moved.first if moved.second is None else moved.second
    return _fits(moved.first, stepped) and _fits(second, stepped)


def _alike(one: Tensor, other: Tensor) -> bool:
    if not (other.dtype == torch.float32 and one.is_cpu and other.is_cpu):
        return False
    if type(one) not in PLAIN or type(other) not in PLAIN:
        return False
    if one.is_contiguous() and other.is_contiguous():
        return True
    return one.stride() == other.stride() and _is_dense(one)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    return (
        tensor.is_contiguous()
        or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
        or (tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d))
    )


def _blocks(one: Sequence[Tensor], other: Sequence[Tensor]) -> _Blocks:
    rows = [
        (
            a.data_ptr() + a.element_size() * start,
            b.data_ptr() + b.element_size() * start,
            min(_BLOCK, a.numel() - start),
            start,
            number,
        )
        for number, (a, b) in enumerate(zip(one, other, strict=True))
        for start in range(0, a.numel(), _BLOCK)
    ]
    return _Blocks(*np.array(rows, dtype=np.int64).reshape(-1, 5).T.copy())


def _tally_whole(jobs: Sequence[Any]) -> Tensor:
    blocks, factors, partial = _prepared([job[0] for job in jobs], jobs)
    passes = _passes()
    if passes is not None:
        blocks.run(passes.tally, factors.ctypes.data, partial.ctypes.data)
    else:

        def work(k: int) -> None:
            before, after = (_array(part[k], blocks.sizes[k]) for part in blocks[:2])
            partial[k] = _tally_numpy(before, after, float(factors[k]))

        _in_threads(len(factors), work)
    return _summed(partial, blocks, len(jobs))


def _tally_half(jobs: Sequence[Any]) -> Tensor:
    blocks, factors, partial = _prepared([job[0] for job in jobs], jobs)
    passes = _passes()
    assert passes is not None
    blocks.run(passes.tally_half, factors.ctypes.data, partial.ctypes.data)
    return _summed(partial, blocks, len(jobs))


def _tally_moved(jobs: Sequence[Any]) -> Tensor:
    moved: list[Moved] = [job[0] for job in jobs]
    blocks, factors, partial = _prepared([one.first for one in moved], jobs)
    seconds = [0 if one.second is None else one.second.data_ptr() for one in moved]
    second = np.array(seconds, dtype=np.int64)[blocks.numbers]
    second += np.where(second, 4 * blocks.starts, 0)
    numbers = [
        np.array([getattr(one, name) for one in moved], dtype=np.float32)[blocks.numbers]
        for name in ("rate", "root", "eps", "up")
    ]
    passes = _passes()
    assert passes is not None
    addresses = (part.ctypes.data for part in (*numbers, factors))
    blocks.run(passes.tally_state, second.ctypes.data, *addresses, partial.ctypes.data)
    return _summed(partial, blocks, len(jobs))


def _prepared(
    first: Sequence[Tensor], jobs: Sequence[Any]
) -> tuple[_Blocks, Floats, NDArray[np.float64]]:
    blocks = _blocks(first, [job[1] for job in jobs])
    factors = np.array([float(job[2]) for job in jobs], dtype=np.float32)[blocks.numbers]
    return blocks, factors, np.zeros((len(factors), _FIELDS))


def _summed(partial: NDArray[np.float64], blocks: _Blocks, jobs: int) -> Tensor:
    result = np.zeros((jobs, _FIELDS))
    np.add.at(result, blocks.numbers, partial)
    return torch.from_numpy(result)


def _array(address: np.int64, size: np.int64) -> Floats:
    return np.ctypeslib.as_array((ctypes.c_float * int(size)).from_address(int(address)))


def _tally_numpy(theta: Floats, stepped: Floats, c: float) -> list[float]:
    """One block: the few weights that may have crossed zero are found fast, then looked at."""
    with np.errstate(all="ignore"):
        product = theta * stepped
        near = product > 0
        np.logical_not(near, out=near)  # crossed, zero, underflown or NaN
        total = float(np.abs(theta, out=product).sum())
        if not (np.isfinite(total) and np.isfinite(stepped.sum())):
            near[:] = True
        where = np.flatnonzero(near)
        old, new = theta[where].astype(np.float64), stepped[where].astype(np.float64)
        finite = np.isfinite(old) & np.isfinite(new)
        if not finite.all():
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
def _passes() -> _Passes | None:
    """The compiled passes, or None where they cannot be had."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("WD_PROBE_KERNEL") == "0" or compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, InputError, subprocess.SubprocessError):
        return None
    pointer = ctypes.c_void_p
    passes = _Passes(*(getattr(library, f"wd_probe_{name}") for name in _Passes._fields))
    for compiled, more in zip(passes, (0, 0, 2, 2, 7), strict=True):
        shared = (ctypes.c_int64, pointer, pointer, pointer, ctypes.c_int)
        compiled.argtypes = (*shared, *(pointer,) * more)  # type: ignore[attr-defined]
        compiled.restype = None  # type: ignore[attr-defined]
    return passes


def _compiled(compiler: str) -> Path:
    source = resources.files("wd_probe").joinpath("kernel.c").read_bytes()
    machine = " ".join(
        [compiler, *_FLAGS, *_THREADING, platform.platform(), platform.processor(), _cpu()]
    )
    key = hashlib.sha256(source + machine.encode()).hexdigest()[:16]
    target = cache_dir() / f"kernel-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch, "kernel.so")
            for threading in _THREADING:
                command = [compiler, *_FLAGS, threading, "-x", "c", "-", "-o", str(built)]
                done = subprocess.run(command, input=source, capture_output=True, timeout=60)
                if done.returncode == 0:
                    break
            built.replace(target)  # atomic: another process never loads half a file
    return target


def _cpu() -> str:
    """What `-march=native` depends on, so that a shared home folder serves different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return "".join(line for line in lines[:40] if line.startswith(("model name", "flags")))


def cache_dir() -> Path:
    """This user's folder for things that can be made again; created if missing.

    Raises:
        InputError: it cannot be created.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base, "wd_probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cache folder {folder} cannot be made ({error.strerror}); set XDG_CACHE_HOME"
        ) from error
    return folder
