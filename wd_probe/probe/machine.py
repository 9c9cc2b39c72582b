"""What a machine has for the probe: versions, a processor, a compiler, a place for its work."""

import os
import platform
import re
import stat
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from ..cache import cache_dir
from ..errors import InputError, first_line
from .kernel.compiled import found_compiler, kept_folder

_NEEDED = re.compile(r"([\w.-]+)[^;]*(?:;.*extra == ['\"](\w+)['\"])?")


@dataclass(frozen=True, slots=True)
class Compiler:
    """The C compiler.

    Attributes:
        path: where it is; None where there is none.
        version: the first line that it says of itself.
    """

    path: str | None
    version: str


@dataclass(frozen=True, slots=True)
class Cache:
    """The folder of compiled kernels.

    Attributes:
        folder: where; None where there is no place for it.
        owner: a user's name, or number.
        mode: what may be done to it by whom, in octal.
        problem: why nothing is kept in it, so that each process compiles anew.
    """

    folder: str | None
    owner: str | None
    mode: str | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Machine:
    """What is there.

    Attributes:
        python: its version.
        system: the operating system's name and version.
        cpu: the processor's name.
        processors: how many this process may use.
        load: processes that wanted one during the last minute, on average; None where unknown.
        threads: that torch counts with.
        versions: of the packages that wd_probe needs; None of one that is missing.
        optional: the same of those it can do without.
        compiler: for the kernel on the CPU.
        cache: for what that compiles.
    """

    python: str
    system: str
    cpu: str
    processors: int
    load: float | None
    threads: int
    versions: dict[str, str | None]
    optional: dict[str, str | None]
    compiler: Compiler
    cache: Cache


def machine() -> Machine:
    """Look at this machine."""
    needed, extra = _packages()
    return Machine(
        python=platform.python_version(),
        system=platform.platform(),
        cpu=_cpu(),
        processors=_processors(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        threads=torch.get_num_threads(),
        versions={name: _version(name) for name in needed},
        optional={name: _version(name) for name in ("triton", *extra)},
        compiler=_compiler(),
        cache=_cache(),
    )


def _packages() -> tuple[list[str], list[str]]:
    """The packages that wd_probe needs, itself first, and those of its extras."""
    found = [_NEEDED.match(line) for line in metadata.requires("wd_probe") or ()]
    pairs = [one.groups() for one in found if one is not None]
    needed = [name for name, extra in pairs if extra is None]
    return ["wd-probe", *needed], [name for name, extra in pairs if extra not in (None, "dev")]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        told = ""
    named = re.search(r"^model name\s*: (.*)$", told, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _compiler() -> Compiler:
    path = found_compiler()
    if path is None:
        return Compiler(None, "")
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return Compiler(path, first_line(error))
    return Compiler(path, next(iter(done.stdout.splitlines()), ""))


def _cache() -> Cache:
    problem = None
    try:
        with kept_folder():
            pass
    except (OSError, InputError) as error:
        problem = first_line(error)
    try:
        folder = cache_dir() / "kernel"
        found = folder.lstat()
    except (OSError, InputError):
        return Cache(None, None, None, problem)
    try:
        owner = folder.owner()
    except (KeyError, NotImplementedError):  # a user that the machine does not know; Windows
        owner = str(found.st_uid)
    return Cache(str(folder), owner, f"{stat.S_IMODE(found.st_mode):o}", problem)
