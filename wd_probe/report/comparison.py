"""Several runs beside each other: for a report page, and for the terminal."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..runs import figures
from ..runs.decay_tables import number
from ..runs.reading import Run, damaged, read_run
from ..training.option import options_in
from ..training.options import ELSEWHERE, TrainOptions, assumed
from ..wording import half_life_cells, half_life_told, percent
from .folders import DAMAGE, expanded, is_sweep
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
#: Options that other columns tell of, or that decide no result.
_BESIDE = ("pretrained", "checkpoint", "steps", *ELSEWHERE)


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """What differs between runs, in options and in results, without a page.

    Args:
        folders: of runs, or of several runs.

    Returns:
        ``command``; ``options``, the names of those that differ; ``runs``: of each its ``run``,
        ``label``, the values of these ``options``, and what was :func:`measured`; ``columns`` and
        ``rows``, the same as a table of texts; ``sentences`` that rank the runs.

    Raises:
        InputError: fewer than two runs, one that cannot be read, or a sweep.
    """
    runs = [_read(path) for path in expanded(folders)]
    if len(runs) < 2:
        raise InputError(f"{runs[0].path} is one run; give two or more")
    labelled, options = dict(zip(_labels(runs), runs, strict=True)), _differing(runs)
    columns, rows = _table(labelled, options)
    return {
        "command": "compare",
        "options": list(options),
        "runs": [
            {
                "run": str(run.path),
                "label": label,
                "options": {key: _chosen(run, key) for key in options},
                **measured(run),
            }
            for label, run in labelled.items()
        ],
        "columns": columns,
        "rows": rows,
        "sentences": _ranked(labelled),
    }


def _read(path: Path) -> Run:
    if is_sweep(path):
        raise InputError(
            f"{path} is a sweep: give its cells ({path / 'cells'}), or take `wdprobe report`"
        )
    run = read_run(path)
    try:
        measured(run)
    except DAMAGE as error:
        raise damaged(path, f"{type(error).__name__} {error}") from error
    return run


def section(runs: Sequence[Run]) -> dict[str, Any]:
    """What ``comparison.html`` shows: a table, and a figure of each thing they have in common."""
    labelled = dict(zip(_labels(runs), runs, strict=True))
    columns, rows = _table(labelled, _differing(runs))
    return {
        "sentences": _ranked(labelled),
        "columns": columns,
        "rows": rows,
        "figures": _overlays(labelled),
    }


def _table(
    runs: Mapping[str, Run], options: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Headings and a row for each run, without columns that no run fills."""
    rows = [
        {"run": label}
        | {title: _option(_chosen(run, key)) for key, title in options.items()}
        | results(run)
        for label, run in runs.items()
    ]
    shown = [title for title in rows[0] if any(row[title] != _NONE for row in rows)]
    return shown, [[row[title] for title in shown] for row in rows]


def _differing(runs: Sequence[Run]) -> dict[str, str]:
    """The options that differ, with their headings."""
    more = [name for name in options_in(TrainOptions) if name not in (*_COMPARED, *_BESIDE)]
    trained = [run for run in runs if not is_scan(run)]
    found = {
        key: title
        for key, title in _COMPARED.items()
        if len({str(_chosen(run, key)) for run in runs}) > 1
    }
    for name in more:  # not each is known of runs of other versions, and of watched scripts
        if len({str(told[name]) for run in trained if name in (told := _options(run))}) > 1:
            found[name] = name.replace("_", " ")
    return found


def _options(run: Run) -> Mapping[str, Any]:
    """What a run was told; an older version told it what is the default since."""
    trained = run.config.get("command") in ("train", "rop")
    return {**assumed(), **run.config} if trained else run.config


def _labels(runs: Sequence[Run]) -> list[str]:
    """A label for each run: its folder's name, with a number where two have the same."""
    names = [run.path.resolve().name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: k + 1].count(name)})"
        for k, name in enumerate(names)
    ]


def _chosen(run: Run, key: str) -> object:
    """An option of a run; a scan has none of training."""
    if is_scan(run) and key not in ("model", "dataset", "source"):
        return None
    return _options(run).get(key)


def measured(run: Run) -> dict[str, Any]:
    """A run's results by name: None or NaN of what it does not have."""
    scan, summary = is_scan(run), run.summary or {}
    first = (run.curve.get("top1") or [math.nan])[0]
    dynamics = summary.get("dynamics") or {}
    return {
        "steps": None if scan else steps(run),
        "top1": first if scan else last(known(run.epochs.get("top1", ()))),
        "rate": mean_rate(run),
        "state": dynamics.get("state"),
        "remaining": dynamics.get("remaining"),
        "balance": _balance(summary),
        "half_life": summary.get("half_life"),
        "status": status(run),
        "verdict": list(summary.get("verdict") or ()),
    }


def results(run: Run) -> dict[str, str]:
    """The same as texts, by their headings."""
    found = measured(run)
    life, off = half_life_cells(found["half_life"], 4)
    return {
        "steps": _option(found["steps"]),
        "top-1": percent(found["top1"], 1),
        "mean R_op": percent(found["rate"]),
        "decay": found["state"] or _NONE,
        "left": percent(found["remaining"]),
        "balance": number(found["balance"]),
        "half-life": life,
        "taken off": off,
        "status": found["status"],
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
    top1 = {label: last(known(run.epochs.get("top1", ()))) for label, run in runs.items()}
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
