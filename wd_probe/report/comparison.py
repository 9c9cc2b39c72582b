"""What a report page says of several runs beside each other."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..runs import figures
from ..runs.decay_tables import number
from ..runs.reading import Run
from ..wording import half_life_cells, half_life_told, percent
from .run import is_number, is_scan, known, last, mean_rate, status, steps
from .values import Columns, Figures

_NONE = "–"  # a column of nothing else is left out
_COMPARED = {
    "model": "model",
    "dataset": "data",
    "source": "weights from",
    "opt": "optimizer",
    "method": "method",
    "scale": "layer-wise rates",
    "lr": "η",
    "weight_decay": "λ",
    "batch_size": "batch",
    "seed": "seed",
}


def section(runs: Sequence[Run]) -> dict[str, Any]:
    """What ``comparison.html`` shows: a table, and a figure of each thing they have in common."""
    labelled = dict(zip(_labels(runs), runs, strict=True))
    differing = {
        key: title
        for key, title in _COMPARED.items()
        if len({str(_chosen(run, key)) for run in runs}) > 1
    }
    rows = [
        {"run": label}
        | {title: _option(_chosen(run, key)) for key, title in differing.items()}
        | results(run)
        for label, run in labelled.items()
    ]
    shown = [title for title in rows[0] if any(row[title] != _NONE for row in rows)]
    return {
        "sentences": _ranked(labelled),
        "columns": shown,
        "rows": [[row[title] for title in shown] for row in rows],
        "figures": _overlays(labelled),
    }


def _labels(runs: Sequence[Run]) -> list[str]:
    """A label for each run: its folder's name, with a number where two have the same."""
    names = [run.path.resolve().name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: k + 1].count(name)})"
        for k, name in enumerate(names)
    ]


def _chosen(run: Run, key: str) -> object:
    """An option of a run; a scan has none of training."""
    return (
        None if is_scan(run) and key not in ("model", "dataset", "source") else run.config.get(key)
    )


def results(run: Run) -> dict[str, str]:
    """A run's results by their headings."""
    scan, summary = is_scan(run), run.summary or {}
    first = (run.curve.get("top1") or [math.nan])[0]
    dynamics = summary.get("dynamics") or {}
    life, off = half_life_cells(summary.get("half_life"), 4)
    return {
        "steps": _NONE if scan else str(steps(run)),
        "top-1": percent(first if scan else last(run.epochs.get("top1", ())), 1),
        "mean R_op": percent(mean_rate(run)),
        "decay": dynamics.get("state") or _NONE,
        "left": percent(dynamics.get("remaining")),
        "balance": number(_balance(summary)),
        "half-life": life,
        "taken off": off,
        "status": status(run),
    }


def _balance(summary: Mapping[str, Any]) -> float:
    """That of the median layer, over the last quarter of the steps."""
    found = [layer.get("balance") for layer in summary.get("layers") or () if layer.get("state")]
    return statistics.median([float(value) for value in found if is_number(value)] or [math.nan])


def _option(value: object) -> str:
    if value is None:
        return _NONE
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ranked(runs: Mapping[str, Run]) -> list[str]:
    top1 = {label: last(run.epochs.get("top1", ())) for label, run in runs.items()}
    rates = {label: mean_rate(run) for label, run in runs.items()}
    lives = {label: (run.summary or {}).get("half_life") or math.nan for label, run in runs.items()}
    found = []
    match _ends(top1, lambda value: percent(value, 1)):
        case [(low, lowest), (high, highest)]:
            found.append(
                f"Top-1 after the last epoch is highest in {highest} ({high}) and lowest in "
                f"{lowest} ({low})."
            )
        case [(same, _)]:
            found.append(f"Top-1 after the last epoch is highest in none: it is {same} in all.")
    match _ends(rates, percent):
        case [(low, lowest), (high, highest)]:
            found.append(f"Mean R_op goes from {low} ({lowest}) to {high} ({highest}).")
        case [(same, _)]:
            found.append(f"Mean R_op is {same} in all.")
    match _ends(lives, half_life_told):
        case [(low, lowest), _]:
            found.append(f"The most robust to shrinking is {lowest}: half-life {low}.")
        case [(same, _)]:
            found.append(f"None is the most robust to shrinking: the half-life is {same} in all.")
    return found


def _ends(values: Mapping[str, float], told: Callable[[float], str]) -> list[tuple[str, str]]:
    """The lowest and the highest value, each as told and with the names of all that have it.

    One where the two are told alike; none of fewer than two values that are numbers.
    """
    shown = {label: told(value) for label, value in values.items() if math.isfinite(value)}
    if len(shown) < 2:
        return []
    finite = known(list(values.values()))
    ends = dict.fromkeys((told(min(finite)), told(max(finite))))
    return [(end, ", ".join(k for k, text in shown.items() if text == end)) for end in ends]


#: Table, column, the axis' label, and whether it is a share of 1.
_OVERLAYS = (
    ("steps", "rate", "opposing penalties", True),
    ("epochs", "train_loss", "training loss", False),
    ("epochs", "top1", "top-1", True),
)


def _overlays(runs: Mapping[str, Run]) -> Figures:
    drawn: Figures = {}
    for table, column, label, share in _OVERLAYS:
        having = {k: run for k, run in runs.items() if known(getattr(run, table).get(column, ()))}
        if len(having) > 1 and any(
            any(known(getattr(run, table)[column])) for run in having.values()
        ):
            lines = dict(zip(_shortened(list(having)), having.values(), strict=True))
            drawn[f"{column}_by_run"] = (
                figures.overlay(lines, table, column, "", label, share=share),
                _stacked(having, table, table[:-1], column),
            )
    scans = {label: run for label, run in runs.items() if run.curve.get("step")}
    if len(scans) > 1:
        drawn["zeroshot_by_run"] = (
            figures.zero_shot(list(scans.values())),
            _stacked(scans, "curve", "scale", "top1", "agreement"),
        )
    return drawn


def _shortened(labels: Sequence[str], most: int = 40) -> Sequence[str]:
    """Labels short enough for a legend, by their two ends; whole where that makes two the same."""
    half = most // 2
    cut = [k if len(k) <= most else f"{k[: half - 1]}…{k[-half:]}" for k in labels]
    return cut if len(set(cut)) == len(cut) else labels


def _stacked(runs: Mapping[str, Run], table: str, *columns: str) -> Columns:
    """The same columns of several runs below each other, in long form."""
    stacked: dict[str, list[Any]] = {name: [] for name in (*columns, "run")}
    for label, run in runs.items():
        found = getattr(run, table)
        for name in columns:
            stacked[name] += found[name]
        stacked["run"] += [label] * len(found[columns[0]])
    return stacked
