"""A measured step as a table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import counted
from ..tables import ByWidth, RenderableType, Table, escape, plain_table
from ..wording import percent

if TYPE_CHECKING:
    from .records import StepRecord

#: So many layers are shown.
_MOST = 5


def record_told(record: "StepRecord") -> ByWidth:
    """R_op and the ledger of a step, and the layers that oppose most."""
    return ByWidth(lambda _: _told(record))


def _told(record: "StepRecord") -> Iterator[RenderableType]:
    total = record.total
    yield f"[bold]Step {record.step:,}[/] · {counted(total.penalized, 'penalized weight')}"
    grid = Table.grid(padding=(0, 2))
    for title, told in {
        "R_op, share of weights": percent(total.rate),
        "R_op by size, share of Σ|P|": percent(total.mass),
        "sign flips by the step alone": percent(total.flip_rate),
        "balance": _number(total.balance),
        "angle": _number(total.angular_update),
        "norm": _number(total.norm),
        "left of the start": percent(total.remaining),
        "weights that are not finite": f"{total.nonfinite:,}" if total.nonfinite else "",
    }.items():
        if told:
            grid.add_row(title, told)
    yield grid
    names = ("index", "name", "rate", "mass")
    layers = [{name: getattr(layer, name) for name in names} for layer in record.layers]
    yield from worst_layers(layers, record.groups.definition)


def worst_layers(layers: Sequence[Mapping[str, Any]], definition: str) -> Iterator[RenderableType]:
    """The layers whose penalties oppose most; nothing where none does.

    Args:
        layers: of each its index, name, rate and mass.
        definition: how they were found.
    """
    known = [layer for layer in layers if layer["rate"] is not None and layer["rate"] > 0]
    if not known:
        return
    worst = sorted(known, key=lambda layer: -layer["rate"])[:_MOST]
    table = plain_table(f"Layers that oppose most, of {len(layers)} ({definition})")
    table.add_column("layer", justify="right")
    table.add_column("name", overflow="ellipsis", no_wrap=True, max_width=48)
    table.add_column("R_op", justify="right")
    table.add_column("by size", justify="right")
    table.add_column("")
    for layer in worst:
        bar = "█" * max(1, round(20 * layer["rate"] / worst[0]["rate"]))
        table.add_row(
            str(layer["index"]),
            escape(layer["name"]),
            percent(layer["rate"]),
            percent(layer["mass"]),
            f"[blue]{bar}[/]",
        )
    yield ""
    yield table


def _number(value: float) -> str:
    return f"{value:.3g}" if value == value else "–"
