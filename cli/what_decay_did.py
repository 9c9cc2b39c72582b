"""The part of a run's summary that says what decay did: in all, and to each layer."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from .console import out, plain_table

#: So many layers are shown.
_MOST = 8


def show(summary: Mapping[str, Any]) -> None:
    """What decay did, in numbers, and the layers with their states."""
    from wd_probe.runs.decay_tables import LAYER_COLUMNS, in_all, layer_table
    from wd_probe.runs.verdict import THRESHOLDS

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for title, told in in_all(summary).items():
        grid.add_row(title, told)
    out.print("\n[bold]What decay did[/]")
    out.print(grid)
    _layers(LAYER_COLUMNS, layer_table(summary["layers"]), len(summary["layers"]))
    out.print(THRESHOLDS, style="dim")


def _layers(columns: tuple[str, ...], rows: list[tuple[str, ...]], count: int) -> None:
    if not rows:
        return
    worst = rows[:_MOST]
    of = f", the worst {len(worst)} of {count}" if len(worst) < count else ""
    table = plain_table(f"Layers by what decay does to them{of}")
    for title in columns:
        if title == "name":
            width = max(16, out.width - 57)
            table.add_column(title, overflow="ellipsis", no_wrap=True, max_width=width)
        else:
            table.add_column(title, justify="left" if title == "state" else "right", no_wrap=True)
    for row in worst:
        table.add_row(*map(escape, row))
    out.print()
    out.print(table)
