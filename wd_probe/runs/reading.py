"""Files from elsewhere are data: read within bounds, or refused in one line that names the file."""

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, printable, shown, shown_line

#: Bytes of a JSON file; read, it takes some 25 times as much.
JSON_BYTES = 32 << 20
#: Bytes of a table, cells in it, characters in a line of it and columns.
TABLE_BYTES, TABLE_CELLS, LINE, COLUMNS = 1 << 30, 24_000_000, 1 << 16, 256
#: Beyond this a figure's axes overflow.
LARGEST = 1e300

NUMBER = (int, float)
_KINDS = {
    str: "a text", int: "a whole number", NUMBER: "a number", dict: "an object", list: "a list",
}  # fmt: skip


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


def read_json(path: Path, shape: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object whose known keys hold what they should; names in it are made printable.

    Args:
        path: of the file.
        shape: by key a type, ``NUMBER``, a list of one shape, or a mapping like this one. Keys may
            be absent, and every value may be null; so is NaN.

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
    _check(path, found, shape, "")
    return found


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value


def _check(path: Path, value: Any, shape: Any, where: str) -> None:
    if value is None:
        return
    kind: Any = next((k for k in (dict, list) if isinstance(shape, k)), shape)
    fits = isinstance(value, kind) and (not isinstance(value, bool) or kind is bool)
    if fits and kind in (int, NUMBER):
        fits = abs(value) <= (2**63 - 1 if isinstance(value, int) else LARGEST)
    if not fits:
        raise damaged(path, f"{where} must be {_KINDS[kind]}, got {shown(value)}")
    if isinstance(shape, list):
        for number, item in enumerate(value):
            _check(path, _there(path, item, f"{where}[{number}]"), shape[0], f"{where}[{number}]")
    elif isinstance(shape, dict):
        for key in shape.keys() & value.keys():
            _check(path, value[key], shape[key], f"{where}.{key}" if where else key)


def _there(path: Path, item: Any, where: str) -> Any:
    if item is None:
        raise damaged(path, f"{where} is null")
    return item


# --- tables ---------------------------------------------------------------------------------------


def read_columns(path: Path) -> dict[str, list[float]]:
    """The numeric columns of a CSV file, NaN for an empty cell; the column ``name`` is left out.

    A last line cut short by a kill is left out, as is one with too few or too many cells.

    Raises:
        InputError: it cannot be read, is too large, or holds something else.
    """
    if not path.is_file():
        return {}
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


def _columns(path: Path, lines: Iterator[list[str]]) -> dict[str, list[float]]:
    header = next(lines, [])
    if len(header) > COLUMNS:
        raise damaged(path, f"it has more than {COLUMNS} columns")
    columns: list[list[float]] = [[] for _ in header]
    numeric = [(k, columns[k]) for k, name in enumerate(header) if name != "name"]
    most = TABLE_CELLS // max(1, len(header))
    for count, row in enumerate((row for row in lines if len(row) == len(header)), start=1):
        if count > most:
            raise InputError(f"{printable(path)} has more than {TABLE_CELLS:,} cells; not read")
        for k, column in numeric:
            value = float(row[k]) if row[k] else math.nan
            if LARGEST < abs(value) < math.inf:
                raise damaged(path, f"it holds {value}")
            column.append(value)
    return {printable(header[k]): column for k, column in numeric}


# --- writing --------------------------------------------------------------------------------------


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
