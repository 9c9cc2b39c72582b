"""``cells.csv``: a row for each cell of a grid, rewritten in one move whenever one changes."""

import csv
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import WdProbeWarning
from ..runs.folder import write_whole
from .grid import AXES, Cell, Summary, other_axes


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


def rows(cells: Sequence[Cell], summaries: Sequence[Summary | None]) -> list[dict[str, Any]]:
    """What ``cells.csv`` says of each cell: its place in the grid, status and main figures.

    Args:
        cells: of a grid.
        summaries: of each; None for a cell that is not finished.
    """
    others = other_axes(cells)
    return [
        {
            "cell": cell.name,
            **{name: getattr(cell.options, name) for name in (*AXES, *others)},
            "lr": cell.options.learning_rate,
            **figures(summary),
        }
        for cell, summary in zip(cells, summaries, strict=True)
    ]


def figures(summary: Summary | None) -> dict[str, Any]:
    """Status and main figures of a run; None where it has none."""
    of = summary or {"status": "waiting"}
    return {
        "status": of["status"],
        "top1": of.get("top1"),
        "best10": (of.get("best10") or {}).get("mean"),
        "val_top1": of.get("val_top1"),
        "running_top1": of.get("running_top1"),
        "running_val_top1": of.get("running_val_top1"),
        "R_op": (of.get("rate") or {}).get("mean"),
        **_what_decay_did(of.get("dynamics") or {}),
        "seconds": of.get("seconds"),
        "error": of.get("error"),
    }


def _what_decay_did(dynamics: Mapping[str, Any]) -> dict[str, Any]:
    means = {name: (dynamics.get(name) or {}).get("mean") for name in ("balance", "angular_update")}
    return {"state": dynamics.get("state"), "remaining": dynamics.get("remaining"), **means}
