"""A C library compiled on first use, and kept where this user alone can write."""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...cache import cache_dir
from ...errors import InputError, RunError, WdProbeError, first_line

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# OpenMP finds the runtime that torch has loaded already, and so the same threads: a pool of our own
# would compete with theirs, which spin for a while after every operation.
_THREADING = ("-fopenmp", "-fopenmp-simd")
#: What `-march=native` depends on, in /proc/cpuinfo of x86 and of ARM.
_FEATURES = ("model name", "flags", "Features", "CPU implementer", "CPU architecture",
             "CPU variant", "CPU part")  # fmt: skip


def library(source: bytes, symbols: Sequence[str]) -> ctypes.CDLL:
    """What a C source compiles to, from the cache if it is there.

    The compiler is the one that `torch.compile` uses too (``$CC``, else ``cc``). A kept library is
    loaded only from a folder of this user's that nobody else can write to, if its checksum is
    right and it has every symbol; else it is compiled anew, and where there is no such folder for
    this process alone.

    Args:
        source: in C.
        symbols: functions that it defines.

    Raises:
        InputError: there is no compiler.
        RunError: what it makes cannot be loaded.
    """
    compiler = found_compiler()
    if compiler is None:
        raise InputError(f"there is no C compiler ({compiler_name()}); $CC names another")
    name, why = f"kernel-{_key(source, compiler)}.so", ""
    for place in (kept_folder, _passing_folder):
        try:
            with place() as folder:
                kept = _loaded(folder / name, symbols)
                return kept or _compiled(source, compiler, folder / name)
        except (OSError, WdProbeError, subprocess.SubprocessError) as error:
            why = first_line(error)
    raise RunError(f"{compiler} makes nothing that can be loaded: {why}")


def compiler_name() -> str:
    """The C compiler's name, whether there is one of it or not."""
    return os.environ.get("CC", "cc")


def found_compiler() -> str | None:
    """Where the C compiler is; None where there is none."""
    return shutil.which(compiler_name())


@contextmanager
def kept_folder() -> Iterator[Path]:
    """Where compiled libraries are kept.

    Raises:
        InputError: there is no place for it, or it is not this user's alone.
        OSError: it cannot be made.
    """
    folder = cache_dir() / "kernel"
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_ours(folder, stat.S_ISDIR):
        raise InputError(f"{folder} is not this user's alone")
    yield folder


@contextmanager
def _passing_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="wd_probe-") as folder:
        yield Path(folder)


def _is_ours(path: Path, is_kind: object) -> bool:
    """Whether it is itself of this kind (no link to one), this user's, and of no other to write."""
    found = path.lstat()
    owned = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.name == "posix"
    return is_kind(found.st_mode) and owned and not shared  # type: ignore[operator]


def _loaded(file: Path, symbols: Sequence[str]) -> ctypes.CDLL | None:
    checksum = file.with_suffix(".sha256")
    if not (file.exists() and checksum.exists()):
        return None
    if not (_is_ours(file, stat.S_ISREG) and _is_ours(checksum, stat.S_ISREG)):
        return None
    if checksum.read_bytes() != _checksum(file):
        return None
    found = ctypes.CDLL(str(file))
    return found if all(hasattr(found, symbol) for symbol in symbols) else None


def _checksum(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).hexdigest().encode()


def _compiled(source: bytes, compiler: str, file: Path) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        built = Path(scratch, file.name)
        for threading in _THREADING:
            command = [compiler, *_FLAGS, threading, "-x", "c", "-", "-o", str(built)]
            done = subprocess.run(command, input=source, capture_output=True, timeout=60)
            if done.returncode == 0:
                break
        else:
            raise RunError(_complaint(done.stderr.decode("utf-8", "replace")))
        found = ctypes.CDLL(str(built))  # before it is kept: a library of that name may be loaded
        checksum = built.with_suffix(".sha256")
        checksum.write_bytes(_checksum(built))
        for made in (built, checksum):
            made.chmod(0o600)
            made.replace(file.with_suffix(made.suffix))  # atomic: no process loads half a file
        return found


def _complaint(said: str) -> str:
    """The line of what a compiler said that tells most."""
    lines = [line for line in said.splitlines() if line.strip()] or ["it said nothing"]
    return next((line for line in lines if "error" in line), lines[-1])


def _key(source: bytes, compiler: str) -> str:
    machine = " ".join([compiler, *_FLAGS, *_THREADING, platform.platform(), _cpu()])
    return hashlib.sha256(source + machine.encode()).hexdigest()[:16]


def _cpu() -> str:
    """The CPU's features, so that a shared home folder serves different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(sorted({line for line in lines if line.startswith(_FEATURES)}))
