"""A run's summary as a person reads it: what decay did, first."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import counted, printable
from ..probe.record_tables import worst_layers
from ..shown import Shown
from ..tables import ByWidth, RenderableType, Table, Text, escape, plain_table
from ..wording import percent
from .decay_tables import LAYER_COLUMNS, in_all, layer_table
from .verdict import THRESHOLDS

#: So many layers are shown.
_MOST = 8


@dataclass(frozen=True, slots=True, repr=False)
class Summary(Shown):
    """A run's summary: printed, it is what the command line shows when a run ends.

    Attributes:
        numbers: those of ``summary.json``.
    """

    numbers: Mapping[str, Any]

    def __rich__(self) -> ByWidth:
        """All of it."""
        return summary_told(self.numbers)

    def __repr__(self) -> str:
        """What it is of."""
        steps, model = self.numbers["steps"], self.numbers["model"]
        return f"Summary({counted(steps, 'step')} of {printable(model)})"


def summary_told(summary: Mapping[str, Any]) -> ByWidth:
    """All of it, from what was run to the findings."""
    return ByWidth(lambda width: _told(summary, width))


def _told(summary: Mapping[str, Any], width: int) -> Iterator[RenderableType]:
    title = "Training" if summary["command"] == "train" else "Opposing-penalty rate"
    scale = "" if summary.get("scale") is None else f" ({summary['scale']})"
    eta = f"η {summary['lr']:g}" + (f" {summary['sched']}" if "sched" in summary else "")
    status = "" if summary["status"] == "finished" else f" ({summary['status']})"
    yield (
        f"[bold]{title}[/] · {escape(summary['model'])} on {escape(summary['dataset'])} · "
        f"{counted(summary['steps'], 'step')}{status}\n"
        f"{escape(summary['optimizer'])} · {summary['method']}{scale} · {eta} · "
        f"λ {summary['weight_decay']:g}"
    )
    yield from _scores(summary)
    told = summary.get("verdict") or ()
    if told:
        yield f"\n[bold]{escape(told[0])}[/]"
    if "dynamics" in summary:
        yield from what_decay_did(summary, width)
    if "rate" in summary:
        yield from _rates(summary)
        yield from worst_layers(summary["layers"], summary["layer_definition"])
    items = (*told[1:], *summary["findings"])
    if items:
        yield ""
        yield from map(_item, items)


def _item(text: str) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_row("•", escape(text))
    return grid


def _scores(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    of = " of the averaged weights" if summary.get("model_ema") else ""
    found = [(f"top-1{of}", summary["top1"])]
    if summary["epochs"] > 1:
        best = summary["best10"]
        chosen = "the best " if best["epochs"] < summary["epochs"] else ""
        found.append((f"mean of {chosen}{counted(best['epochs'], 'epoch')}", best["mean"]))
    found.append(("at the other moment", summary["other_top1"]))
    found.append(("by running statistics of batch norm", summary.get("running_top1")))
    if summary["chosen"] is not None:
        where = f"at epoch {summary['chosen']['epoch']}, the best on validation"
        found.append((where, summary["chosen"]["top1"]))
    known = [(name, value) for name, value in found if value is not None and value == value]
    if known:
        yield " · ".join(f"{name} {percent(value, 1)}" for name, value in known)


def _rates(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    table = plain_table()
    for title in ("", "mean", "max", "last"):
        table.add_column(title, justify="left" if not title else "right")
    for title, key in (
        ("R_op, share of weights", "rate"),
        ("R_op by size, share of Σ|P|", "mass"),
        ("sign flips by the step alone", "flip_rate"),
        ("R_op, Eq. 10 read literally", "literal_rate"),
    ):
        if key in summary:
            table.add_row(title, *(percent(summary[key][k]) for k in ("mean", "max", "last")))
    yield ""
    yield table
    if "literal_rate" in summary:
        yield (
            f"{summary['method']} decays the weight that the step then moves, so that no penalty "
            "opposes; read literally, Eq. 10 compares it with a step from the undecayed weight."
        )


# --- what decay did -------------------------------------------------------------------------------


def what_decay_did(summary: Mapping[str, Any], width: int) -> Iterator[RenderableType]:
    """What decay did, in numbers, and the layers with their states."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for title, told in in_all(summary).items():
        grid.add_row(title, told)
    yield "\n[bold]What decay did[/]"
    yield grid
    yield from _layers(layer_table(summary["layers"]), len(summary["layers"]), width)
    yield Text(THRESHOLDS, style="dim")


def _layers(rows: list[tuple[str, ...]], count: int, width: int) -> Iterator[RenderableType]:
    if not rows:
        return
    worst = rows[:_MOST]
    of = f", the worst {len(worst)} of {count}" if len(worst) < count else ""
    table = plain_table(f"Layers by what decay does to them{of}")
    for title in LAYER_COLUMNS:
        if title == "name":
            most = max(16, width - 57)
            table.add_column(title, overflow="ellipsis", no_wrap=True, max_width=most)
        else:
            table.add_column(title, justify="left" if title == "state" else "right", no_wrap=True)
    for row in worst:
        table.add_row(*map(escape, row))
    yield ""
    yield table
