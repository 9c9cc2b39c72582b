"""A run is a folder: written as it goes, readable after any end."""

import contextlib
import csv
import errno
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO, TypeVar

from safetensors import SafetensorError

from ..errors import InputError, WdProbeWarning, first_line
from .locks import LOCK, Lock, unwritable
from .schema import TABLES

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_FLUSH_SECONDS = 2.0
_TABLES = tuple(TABLES)
_EVENTS = "events.out.tfevents.*"
_MEASURED_WITH = ("wd-probe", "torch", "timm", "numpy")


def occupied(path: Path) -> str:
    """Why a new run cannot have a folder: it holds one or its rest, or is none. Empty if it can."""
    if os.path.lexists(path / "config.json"):
        return f"{path} holds a run already; choose another --output"
    left = next((file.name for file in _growing(path) if os.path.lexists(file)), None)
    if left:
        return f"{path} holds a run's {left} already; choose another --output"
    there = next(one for one in (path, *path.absolute().parents) if os.path.exists(one))
    if not os.path.isdir(there):
        error = errno.EEXIST if there == path else errno.ENOTDIR
    elif os.access(there, os.W_OK):
        return ""
    else:
        error = errno.EACCES
    return str(unwritable(path, OSError(error, os.strerror(error))))


def check_free(path: Path) -> None:
    """Refuse a folder that a new run cannot have, in the process that would write to it.

    Raises:
        InputError: it holds one.
    """
    from ..ranks import known_rank

    if not known_rank() and (refusal := occupied(path)):
        raise InputError(refusal)


def _growing(path: Path) -> list[Path]:
    """The tables and event files that a run may have, there or not."""
    return [*(path / f"{name}.csv" for name in _TABLES), *sorted(path.glob(_EVENTS))]


class RunFolder:
    """Writes a run's files, as the only process that does.

    The first write that fails (a full disk, say) is told once; from then on nothing more is
    written and the run goes on: `failure` says what happened.

    Args:
        path: a folder that does not hold a run yet; made if missing.
        again: it holds one, which is resumed; see :meth:`rewind`.
        lock: of this process on it; it is kept when this is closed. Default one of its own.

    Raises:
        InputError: it cannot be written to, or holds a run without ``again``.
        Busy: another process is writing to it.
    """

    def __init__(self, path: Path, *, again: bool = False, lock: Lock | None = None) -> None:
        self.path = path
        self.failure: str | None = None
        self._tables: dict[str, TextIO] = {}
        self._flushed = time.monotonic()
        if not again and (refusal := occupied(path)):
            raise InputError(refusal)
        advice = "a run is resumed in its own folder" if again else "choose another --output"
        self._lock = Lock(path, advice=advice) if lock is None else None
        if not again and (refusal := occupied(path)):
            self.close()
            raise InputError(refusal)

    def guard(self, write: Callable[[], T]) -> T | None:
        """Call ``write`` unless a write has failed before; a failure is told, not raised."""
        if self.failure is not None:
            return None
        try:
            return write()
        except OSError as error:
            self.failure = f"{error.strerror or error}"
            warnings.warn(
                f"nothing more is written to {self.path} ({self.failure}); "
                "free some space and run again to have the files; measuring goes on",
                WdProbeWarning,
                stacklevel=3,
            )
            return None

    def replace(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file in one move: readers and a killed run have the old one or the new one."""

        def replace() -> None:
            partial = self.path / f"{name}.partial"
            partial.unlink(missing_ok=True)
            try:
                _written(partial, write)
                shutil.copymode(self.path / LOCK, partial)  # safetensors makes files for one user
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                partial.replace(self.path / name)
            except OSError:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise

        self.guard(replace)

    def json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file in one move; NaN becomes null."""
        self.replace(
            name, lambda partial: partial.write_text(dumps(value, indent=2) + "\n", "utf-8")
        )

    def rows(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Append rows to a CSV file; what is appended reaches the disk within two seconds."""

        def write() -> None:
            if name not in self._tables:
                path = self.path / name
                self._tables[name] = file = path.open(
                    "a", encoding="utf-8", errors="backslashreplace", newline=""
                )
                if not file.tell():
                    csv.writer(file).writerow(header)
            csv.writer(self._tables[name]).writerows(rows)
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flushed = time.monotonic()
                for table in self._tables.values():
                    table.flush()

        self.guard(write)

    def sizes(self) -> dict[str, int]:
        """The bytes of each table and event file, once they are on the disk."""
        for table in self._tables.values():
            table.flush()
        found = {}
        for path in _growing(self.path):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    found[path.name] = file.seek(0, os.SEEK_END)
        return found

    def check(self, sizes: Mapping[str, int]) -> None:
        """See that :meth:`rewind` can bring these sizes back.

        Raises:
            InputError: a file is missing, shorter, or not a plain file of this folder.
        """
        found = {path.name: path for path in _growing(self.path)}
        for name, size in sizes.items():
            if name not in found or not isinstance(size, int) or size < 0:
                raise InputError(f"{self.path} is damaged: {name} is missing")
        for name, path in found.items():
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise InputError(f"{path} is not a plain file; it is left alone")
            if sizes.get(name, 0) > (path.stat().st_size if path.exists() else 0):
                raise InputError(f"{path} is damaged: it is shorter than it was at the last save")

    def rewind(self, sizes: Mapping[str, int]) -> None:
        """Cut each table and event file to its size, and remove those without, and all results.

        Raises:
            InputError: as :meth:`check`; nothing is changed then. Or the folder cannot be written.
        """
        self.check(sizes)
        results = ("tensors.csv", "summary.json", "model.safetensors", "model_ema.safetensors")
        try:
            for path in _growing(self.path):
                if path.name in sizes:
                    os.truncate(path, sizes[path.name])
                else:
                    path.unlink(missing_ok=True)
            for path in (*(self.path / name for name in results), *self.path.glob("*.partial")):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written to ({error.strerror}); a run is resumed in its "
                "own folder"
            ) from error

    def close_tables(self) -> None:
        """Flush and close every table."""
        for table in self._tables.values():
            self.guard(table.flush)
            with contextlib.suppress(OSError):
                table.close()
        self._tables.clear()

    def close(self) -> None:
        """Close every table, and let go of the folder."""
        self.close_tables()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def _written(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write``; torch and safetensors have errors of their own for what a file will not take.

    Raises:
        OSError: it cannot be written.
    """
    try:
        write(path)
    except (RuntimeError, SafetensorError) as error:
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, OSError):
            reason = reason.__context__
        raise reason or OSError(first_line(error)) from None


def run_folder(path: Path, *, again: bool = False, lock: Lock | None = None) -> RunFolder:
    """A :class:`RunFolder`; of several processes the first one alone writes to it."""
    from .. import ranks  # loads torch, which asking whether a folder is free need not

    return Unwritten(path) if ranks.rank() else RunFolder(path, again=again, lock=lock)


class Unwritten(RunFolder):
    """The folder of who writes nothing: a process that leaves it all to the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure: str | None = None
        self._tables: dict[str, TextIO] = {}

    def guard(self, write: Callable[[], T]) -> T | None:
        """Write nothing."""
        return None

    def check(self, sizes: Mapping[str, int]) -> None:
        """Leave it to the first process."""

    def rewind(self, sizes: Mapping[str, int]) -> None:
        """Leave it to the first process."""

    def close(self) -> None:
        """Nothing is open."""


def dumps(value: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities, which JSON does not have, become null."""
    text = json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates of file names


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_whole(path: Path, text: str) -> None:
    """Write a file in one move; what lies there, were it a link to elsewhere, is replaced.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    with partial.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write(text)
    partial.replace(path)


def environment(device: "torch.device") -> dict[str, Any]:
    """Versions and machine, for ``config.json``."""
    import torch

    return {
        "versions": {name: metadata.version(name) for name in _MEASURED_WITH},
        "python": platform.python_version(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def command_line() -> str | None:
    """What was typed, as a shell takes it; None where it was not this package's command."""
    started = Path(sys.argv[0] if sys.argv else "")
    ours = started.stem == "wdprobe" or started.parts[-2:] == ("wd_probe", "__main__.py")
    return shlex.join(["wdprobe", *sys.argv[1:]]) if ours else None


def default_folder(command: str, model: str) -> Path:
    """``runs/COMMAND-MODEL-DATE-TIME``, with a number behind it where that is taken."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    safe = "".join(ch if ch.isalnum() or ch in "._-" else "_" for ch in model)
    base = Path("runs", f"{command}-{safe}-{stamp}")
    names = (base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 1000)))
    return next(path for path in names if not path.exists())
