"""`penalty.tally` over many tensors at once: one compiled pass on the CPU, plain torch elsewhere.

The pass is `kernel.c`, compiled once per machine with the C compiler that `torch.compile` uses too
(``$CC``, else ``cc``) and kept in the user's cache. Without a compiler, or with
``WD_PROBE_KERNEL=0``, plain tensor operations give the same counts more slowly.
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

import numpy as np
import torch
from torch import Tensor

from . import penalty
from .errors import InputError

_BLOCK = 1 << 19  # weights a thread takes at a time; also what keeps sums independent of threads
_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC")

Job = tuple[Tensor, Tensor, float | Tensor]


def tally_all(jobs: Sequence[Job]) -> Tensor:
    """`penalty.tally` of every (θ, θ', c).

    Args:
        jobs: for each tensor the weights before, the weights after and the factor taken off.

    Returns:
        A float64 tensor (len(jobs), len(TALLY_FIELDS)) on the weights' device; the device is not
        waited for.
    """
    if not jobs:
        return torch.zeros(0, len(penalty.TALLY_FIELDS), dtype=torch.float64)
    native = _native()
    if native is not None and all(_fits(*job) for job in jobs):
        return _tally_native(native, jobs)
    first = jobs[0][0].device
    return torch.stack([penalty.tally(*job).to(first, non_blocking=True) for job in jobs])


def _fits(theta: Tensor, stepped: Tensor, c: float | Tensor) -> bool:
    return (
        theta.dtype == stepped.dtype == torch.float32
        and theta.device.type == stepped.device.type == "cpu"
        and not (isinstance(c, Tensor) and c.device.type != "cpu")
        and type(theta) in (Tensor, torch.nn.Parameter)
        and type(stepped) in (Tensor, torch.nn.Parameter)
        and theta.stride() == stepped.stride()
        and _is_dense(theta)
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    return (
        tensor.is_contiguous()
        or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
        or (tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d))
    )


def _tally_native(native: Callable[..., None], jobs: Sequence[Job]) -> Tensor:
    blocks = [
        (theta.data_ptr() + 4 * start, stepped.data_ptr() + 4 * start, size, float(c), index)
        for index, (theta, stepped, c) in enumerate(jobs)
        for start in range(0, theta.numel(), _BLOCK)
        for size in (min(_BLOCK, theta.numel() - start),)
    ]
    partial = np.zeros((len(blocks), len(penalty.TALLY_FIELDS)))
    address, row = partial.ctypes.data, partial.strides[0]

    def work(first: int, step: int) -> None:
        for k in range(first, len(blocks), step):
            before, after, size, c, _ = blocks[k]
            native(before, after, size, c, address + k * row)

    threads = max(1, min(torch.get_num_threads(), len(blocks)))
    others = [_pool().submit(work, k, threads) for k in range(1, threads)]
    work(0, threads)
    for other in others:
        other.result()
    result = np.zeros((len(jobs), len(penalty.TALLY_FIELDS)))
    np.add.at(result, np.array([block[4] for block in blocks], dtype=int), partial)
    return torch.from_numpy(result)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="wd_probe")


@functools.cache
def _native() -> Callable[..., None] | None:
    """The compiled pass, or None where it cannot be had."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("WD_PROBE_KERNEL") == "0" or compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, InputError, subprocess.SubprocessError):
        return None
    function = library.wd_probe_tally
    pointer = ctypes.c_void_p
    function.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_float, pointer]
    function.restype = None
    return function


def _compiled(compiler: str) -> Path:
    source = resources.files("wd_probe").joinpath("kernel.c").read_bytes()
    machine = " ".join([compiler, *_FLAGS, platform.platform(), platform.processor(), _cpu()])
    key = hashlib.sha256(source + machine.encode()).hexdigest()[:16]
    target = cache_dir() / f"kernel-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch, "kernel.so")
            command = [compiler, *_FLAGS, "-x", "c", "-", "-o", str(built)]
            subprocess.run(command, input=source, check=True, capture_output=True, timeout=60)
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
