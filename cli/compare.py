"""`wdprobe compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from wd_probe.tables import plain_table

from . import options as o
from .console import loading, out, to_stdout

#: So many runs stand beside each other, more below each other.
_BESIDE = 4


@o.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Two run folders or more, or a folder of them.")
    ],
    json: o.Json = False,
) -> None:
    """Set runs beside each other: the options that differ, what decay did, R_op, top-1."""
    with loading():
        from wd_probe.report import comparison

    result = comparison.compare(runs)
    if json:
        to_stdout({key: value for key, value in result.items() if key not in ("columns", "rows")})
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    """The result of `wdprobe compare` for a person."""
    lines = [result["columns"], *result["rows"]]
    if len(result["rows"]) <= _BESIDE:
        lines = [list(line) for line in zip(*lines, strict=True)]
    table = plain_table()
    for place, title in enumerate(lines[0]):
        table.add_column(
            escape("" if title == "run" else title), justify="right" if place else "left"
        )
    for line in lines[1:]:
        table.add_row(*map(escape, line))
    out.print(table)
    verdicts = [f"{run['label']}: {run['verdict'][0]}" for run in result["runs"] if run["verdict"]]
    for sentence in (*verdicts, *result["sentences"]):
        out.print(f"• {escape(sentence)}", soft_wrap=True)
