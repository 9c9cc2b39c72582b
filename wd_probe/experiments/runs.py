"""A run is a folder: written as it goes, readable after any end."""

import contextlib
import csv
import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self, TextIO, TypeVar

import torch

from ..errors import InputError, WdProbeWarning
from .contents import CONFIG, SUMMARY, TABLES, check_table
from .files import damaged, read_columns, read_json

T = TypeVar("T")

_FLUSH_SECONDS = 2.0
_TABLES = tuple(TABLES)
_MEASURED_WITH = ("wd-probe", "torch", "timm", "numpy")


class RunFolder:
    """Writes a run's files.

    The first write that fails (a full disk, say) is told once; from then on nothing more is
    written and the run goes on: `failure` says what happened.

    Args:
        path: a folder that does not hold a run yet; made if missing.

    Raises:
        InputError: it cannot be written to, or holds a run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure: str | None = None
        self._tables: dict[str, TextIO] = {}
        self._flushed = time.monotonic()
        if (path / "config.json").exists():
            raise InputError(f"{path} holds a run already; choose another --output")
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.json").write_text("{}\n")
        except OSError as error:
            raise InputError(
                f"output folder {path} cannot be written to ({error.strerror}); "
                "choose another --output"
            ) from error

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

    def json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file in one move; NaN becomes null."""
        target = self.path / name

        def write() -> None:
            partial = target.with_name(f"{name}.partial")
            partial.write_text(dumps(value, indent=2) + "\n")
            partial.replace(target)

        self.guard(write)

    def rows(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Append rows to a CSV file; what is appended reaches the disk within two seconds."""

        def write() -> None:
            if name not in self._tables:
                self._tables[name] = (self.path / name).open("a", newline="")
                csv.writer(self._tables[name]).writerow(header)
            csv.writer(self._tables[name]).writerows(rows)
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flushed = time.monotonic()
                for table in self._tables.values():
                    table.flush()

        self.guard(write)

    def close(self) -> None:
        """Flush and close every table."""
        for table in self._tables.values():
            self.guard(table.flush)
            with contextlib.suppress(OSError):
                table.close()
        self._tables.clear()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


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


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for ``config.json``."""
    return {
        "versions": {name: metadata.version(name) for name in _MEASURED_WITH},
        "python": platform.python_version(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def default_folder(command: str, model: str) -> Path:
    """``runs/COMMAND-MODEL-DATE-TIME``, with a number behind it where that is taken."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    safe = "".join(ch if ch.isalnum() or ch in "._-" else "_" for ch in model)
    base = Path("runs", f"{command}-{safe}-{stamp}")
    names = (base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 1000)))
    return next(path for path in names if not path.exists())


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder read back: its options, its tables as columns, its summary (None if absent)."""

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    layer_names: tuple[str, ...]
    steps: Mapping[str, list[float]]
    epochs: Mapping[str, list[float]]
    layers: Mapping[str, list[float]]
    profile: Mapping[str, list[float]]
    curve: Mapping[str, list[float]]
    parts: Mapping[str, list[float]]
    distortion: Mapping[str, list[float]]


def read_run(path: Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        InputError: it is no run folder, or a file in it is damaged.
    """
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is no run folder: it has no config.json")
    config = read_json(path / "config.json", CONFIG)
    summary_file = path / "summary.json"
    summary = read_json(summary_file, SUMMARY) if summary_file.is_file() else None
    names = tuple(layer.get("name") for layer in config.get("layers") or ())
    if None in names:
        raise damaged(path / "config.json", f"layers[{names.index(None)}] has no name")
    pointed = {"layers": names, "distortion": names, "parts": config.get("parts") or ()}
    tables = {}
    for name in _TABLES:
        tables[name] = read_columns(path / f"{name}.csv")
        check_table(path / f"{name}.csv", tables[name], pointed.get(name))
    return Run(path, config, summary, names, **tables)
