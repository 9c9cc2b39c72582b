"""A CSV file that is rewritten in one move whenever a row changes."""

import csv
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import WdProbeWarning
from ..runs.folder import write_whole


class Ledger:
    """Rows by number; readers see the file as it was before a change or after it.

    A file that cannot be written is told once and holds nothing up.

    Args:
        path: of the file.
        rows: all of one shape.
    """

    def __init__(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        self._path, self._rows = path, [dict(row) for row in rows]
        self._lines = [_line(row.values()) for row in self._rows]
        self._header = _line(self._rows[0] if self._rows else ())
        self._writable = True
        self._write()

    def update(self, number: int, values: Mapping[str, Any]) -> None:
        """Change some columns of a row."""
        self._rows[number] |= values
        self._lines[number] = _line(self._rows[number].values())
        self._write()

    def _write(self) -> None:
        if not self._writable:
            return
        try:
            write_whole(self._path, "".join([self._header, *self._lines]))
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"{self._path} is not written ({error.strerror or error}); the runs go on",
                WdProbeWarning,
                stacklevel=3,
            )


def _line(values: Any) -> str:
    text = io.StringIO()
    csv.writer(text).writerow(
        ["" if isinstance(v, float) and not math.isfinite(v) else v for v in values]
    )
    return text.getvalue()
