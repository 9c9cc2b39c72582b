"""Files from elsewhere are data: read within bounds, or refused in one line that names the file."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, printable, shown, shown_line
from .schema import LARGEST, TABLES, Contents, RunConfig, RunSummary

#: Bytes of a JSON file; read, it takes some 25 times as much.
JSON_BYTES = 32 << 20
#: Bytes of a table, cells in it, characters in a line of it and columns.
TABLE_BYTES, TABLE_CELLS, LINE, COLUMNS = 1 << 30, 24_000_000, 1 << 16, 256


def damaged(path: Path, reason: object) -> InputError:
    """The error for a file that cannot be read as what it should be."""
    text = " ".join(str(reason).split())
    return InputError(f"{printable(path)} is damaged: {shown_line(text)}")


def read_text(path: Path, most: int) -> str:
    """A whole UTF-8 file of at most so many bytes.

    Raises:
        InputError: it is larger, or no such text, or a pipe or the like.
        OSError: it cannot be opened.
    """
    if path.exists() and not path.is_file():
        raise damaged(path, "it is not a plain file")
    with path.open("rb") as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise InputError(f"{printable(path)} is larger than {most >> 10:,} KiB and is not read")
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, error) from error


# --- JSON -----------------------------------------------------------------------------------------


def read_json(path: Path, contents: type[Contents]) -> dict[str, Any]:
    """A JSON object whose known keys hold what they should; names in it are made printable.

    Args:
        path: of the file.
        contents: its known keys. Each may be absent, and every value may be null; so is NaN.

    Raises:
        InputError: it cannot be read, is too large or damaged, or a key holds something else.
    """
    try:
        found = _printable(json.loads(read_text(path, JSON_BYTES), parse_constant=lambda _: None))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(found, dict):
        raise damaged(path, f"it must hold an object, not {shown(found)}")
    if fault := contents.fault(found):
        raise damaged(path, fault)
    return found


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value


# --- tables ---------------------------------------------------------------------------------------


def read_columns(path: Path) -> dict[str, list[float]]:
    """The numeric columns of a CSV file, NaN for an empty cell; the column ``name`` is left out.

    A last line cut short by a kill is left out, as is one with too few or too many cells.

    Raises:
        InputError: it cannot be read, is too large, or holds something else.
    """
    return _read(path)[1]


def _read(path: Path) -> tuple[list[str], dict[str, list[float]]]:
    """The column ``name``, and the numeric ones."""
    if not path.is_file():
        return [], {}
    try:
        if path.stat().st_size > TABLE_BYTES:
            raise InputError(f"{printable(path)} is larger than {TABLE_BYTES >> 30} GiB")
        with path.open(encoding="utf-8", newline="") as file:
            return _columns(path, _lines(path, file))
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise damaged(path, error) from error


def _lines(path: Path, file: Any) -> Iterator[list[str]]:
    """The cells of each whole line; every line for itself, so that no quote can join many."""
    while line := file.readline(LINE):
        if line[-1] not in "\r\n":
            if len(line) == LINE:
                raise damaged(path, f"a line in it is longer than {LINE:,} characters")
            return
        yield next(csv.reader((line,)), [])


def _columns(path: Path, lines: Iterator[list[str]]) -> tuple[list[str], dict[str, list[float]]]:
    header, names = next(lines, []), []
    if len(header) > COLUMNS:
        raise damaged(path, f"it has more than {COLUMNS} columns")
    columns: list[list[float]] = [[] for _ in header]
    numeric = [(k, columns[k]) for k, name in enumerate(header) if name != "name"]
    named = header.index("name") if "name" in header else None
    most = TABLE_CELLS // max(1, len(header))
    for count, row in enumerate((row for row in lines if len(row) == len(header)), start=1):
        if count > most:
            raise InputError(f"{printable(path)} has more than {TABLE_CELLS:,} cells; not read")
        if named is not None:
            names.append(printable(row[named]))
        for k, column in numeric:
            value = float(row[k]) if row[k] else math.nan
            if LARGEST < abs(value) < math.inf:
                raise damaged(path, f"it holds {value}")
            column.append(value)
    return names, {printable(header[k]): column for k, column in numeric}


# --- a run ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder read back: its options, its tables as columns, its summary (None if absent).

    ``tensors`` has a row for each of ``tensor_names``.
    """

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
    tensor_names: Sequence[str] = ()
    tensors: Mapping[str, list[float]] = field(default_factory=dict)


def read_run(path: Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        InputError: it is no run folder, or a file in it is damaged.
    """
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is no run folder: it has no config.json")
    config = read_json(path / "config.json", RunConfig)
    summary_file = path / "summary.json"
    summary = read_json(summary_file, RunSummary) if summary_file.is_file() else None
    names = tuple(layer.get("name") for layer in config.get("layers") or ())
    if None in names:
        raise damaged(path / "config.json", f"layers[{names.index(None)}] has no name")
    pointed = {"layers": names, "distortion": names, "parts": config.get("parts") or ()}
    tables = {}
    for name in TABLES:
        tables[name] = read_columns(path / f"{name}.csv")
        _check_table(path / f"{name}.csv", tables[name], pointed.get(name))
    tensor_names, tensors = _read(path / "tensors.csv")
    return Run(path, config, summary, names, **tables, tensor_names=tensor_names, tensors=tensors)


def _check_table(
    path: Path, columns: Mapping[str, Sequence[float]], names: Sequence[str] | None
) -> None:
    """See that a table has its columns, and counts that are counts.

    Args:
        path: of the file, named after its table.
        columns: as read; none where there is no file.
        names: what the column ``index`` points into, from 1; None where there is no such column.

    Raises:
        InputError: it does not.
    """
    if not columns:
        return
    for name in TABLES[path.stem]:
        if name not in columns:
            raise damaged(path, f"it has no column {name}")
        counts = columns[name] if name in ("step", "epoch") else ()
        if not all(value >= 0 and value.is_integer() for value in counts):
            raise damaged(path, f"the column {name} must hold whole numbers")
    if names is not None:
        for value in columns["index"]:
            if not (1 <= value <= len(names) and value.is_integer()):
                raise damaged(
                    path, f"index {value:g} is none of the {len(names)} names in config.json"
                )
