"""The part of a run's summary that says what decay did: in all, and to each layer."""

import math
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from wd_probe.errors import counted
from wd_probe.wording import percent

from .console import out, plain_table

#: So many layers are shown.
_MOST = 8


def show(summary: Mapping[str, Any]) -> None:
    """What decay did, in numbers, and the layers with their states."""
    from wd_probe.probe.dynamics import STATES
    from wd_probe.runs.verdict import THRESHOLDS

    found, layers = summary["dynamics"], summary["layers"]
    states = [layer["state"] for layer in layers]
    scale, run = _lengths(summary["steps"], found)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    how = ", by each penalty's own step" if summary["method"] in ("l1", "l2") else ""
    off = percent(max(1 - found["remaining"], 0.0))
    grid.add_row("taken off", f"{off} of what stood at the start{how}")
    grid.add_row("timescale 1/c", scale)
    grid.add_row("the run", run)
    for title, key in (("balance", "balance"), ("angle per step", "angular_update")):
        mean, last = (_number(found[key][which]) for which in ("mean", "last"))
        grid.add_row(title, f"{mean} over all steps, {last} at the last")
    grid.add_row("layers", " · ".join(f"{states.count(one)} {one}" for one in STATES))
    out.print("\n[bold]What decay did[/]")
    out.print(grid)
    _layers(layers)
    out.print(THRESHOLDS, style="dim")


def _lengths(steps: int, found: Mapping[str, Any]) -> tuple[str, str]:
    """The timescale, and the run's length beside it."""
    scale, epochs = found["timescale_steps"], found["timescale_epochs"]
    if not _is_known(scale):
        return "none: nothing is taken off", counted(steps, "step")
    told = _rough(scale, "step"), counted(steps, "step")
    if not _is_known(epochs):
        return told
    return (
        f"{told[0]}, {_rough(epochs, 'epoch')}",
        f"{told[1]}, {_rough(steps * epochs / scale, 'epoch')}",
    )


def _layers(layers: list[dict[str, Any]]) -> None:
    known = [layer for layer in layers if layer["state"] is not None]
    if not known:
        return
    worst = sorted(known, key=_goodness)[:_MOST]
    of = f", the worst {len(worst)} of {len(layers)}" if len(worst) < len(layers) else ""
    table = plain_table(f"Layers by what decay does to them{of}")
    table.add_column("layer", justify="right")
    table.add_column("name", overflow="ellipsis", no_wrap=True, max_width=max(16, out.width - 57))
    table.add_column("state")
    for title in ("balance", "taken off", "angle", "norm"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in worst:
        table.add_row(
            str(layer["index"]),
            escape(layer["name"]),
            layer["state"],
            _number(layer["balance"]),
            percent(1 - layer["remaining"]),
            _number(layer["angular_update"]),
            _number(layer["norm"]),
        )
    out.print()
    out.print(table)


def _goodness(layer: Mapping[str, Any]) -> tuple[bool, float]:
    """Balanced ones last, others by how far from 1 their balance is."""
    balance = layer["balance"]
    is_positive = _is_known(balance) and balance > 0
    return layer["state"] == "balanced", -abs(math.log(balance)) if is_positive else -math.inf


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _rough(value: float, what: str) -> str:
    return counted(float(f"{value:.3g}"), what)
