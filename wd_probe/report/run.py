"""What a report page says of one run, and of several beside each other."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..runs import figures
from ..runs.folder import Run
from . import html as page
from .html import Html, element, number, percent

#: By figure: its title, what it shows, the table behind it.
_FIGURES = {
    "rop_over_steps": (
        "Opposing penalties over the steps",
        "Share of the penalized weights (above) and of all that is taken off (below) where decay "
        "pushed away from zero.",
        "steps",
    ),
    "rop_by_layer": (
        "R_op by layer",
        "A row is a layer, the shallowest on top; the brighter, the more often decay opposes.",
        "layers",
    ),
    "rop_by_decay_rate": (
        "R_op had λ been another",
        "What the same updates would have given at other decay rates; dashed is this run's.",
        "profile",
    ),
    "training": ("Training", "Training loss (above) and top-1 (below) by epoch.", "epochs"),
    "zeroshot": (
        "Zero-shot decay",
        "What is left of the metric as the weights are scaled to zero without training; dashed is "
        "the half-life.",
        "curve",
    ),
    "zeroshot_by_part": (
        "One part decayed at a time",
        "A row is a part, a column a scale; dark is where the metric is lost.",
        "parts",
    ),
    "distortion": (
        "Feature distortion",
        "1 − cos² between each layer's output before and after decay of the whole model; 0 where "
        "decay only rescales it.",
        "distortion",
    ),
}
_WORST = 8


def status(run: Run) -> str:
    """How a run ended; "unfinished" if it has no summary."""
    return "unfinished" if run.summary is None else str(run.summary.get("status", "finished"))


def is_scan(run: Run) -> bool:
    """Whether it is a run of `wdprobe zeroshot`."""
    return run.config.get("command") == "zeroshot"


def section(run: Run) -> Html:
    """All that the page says of one run: what was run, findings, figures, tables."""
    drawn = _drawn(run)
    shown = [page.figure(drawn[name], *_FIGURES[name][:2], _data(run, name)) for name in drawn]
    return page.joined(
        [
            element("p", lead(run), class_="lead"),
            page.findings(_scan_findings(run) if is_scan(run) else _training_findings(run)),
            element("div", *shown, class_="figures"),
            *(_scan_tables(run) if is_scan(run) else _layer_table(run)),
            element("h3", "What was run"),
            page.facts(_facts(run)),
        ]
    )


def _drawn(run: Run) -> dict[str, Figure]:
    """The run's figures, without those of R_op where it is 0 throughout."""
    if is_scan(run):
        return figures.draw_zeroshot([run])
    drawn = figures.draw_training(run)
    if any(_known(run.steps.get("rate", ()))):
        return drawn
    return {name: figure for name, figure in drawn.items() if not name.startswith("rop_")}


def lead(run: Run) -> str:
    """A run in one line."""
    c = run.config
    if is_scan(run):
        return f"Zero-shot decay · {c['model']} · {c['source']} · {status(run)}"
    return (
        f"{c['model']} on {c['dataset']} · {c['opt']} · {_method(run)} · η {c['lr']:g} · "
        f"λ {c['weight_decay']:g} · {_steps(run)} steps · {status(run)}"
    )


def _method(run: Run) -> str:
    method = str(run.config["method"])
    if method != "own":
        return method
    found = (run.summary or {}).get("method")
    return f"its own decay, {found}" if found else "its own decay"


def _steps(run: Run) -> int:
    return len(run.steps.get("step", ()))


def _data(run: Run, name: str) -> tuple[str, dict[str, Sequence[Any]]]:
    """The table behind a figure, with names where it has only indices."""
    table = _FIGURES[name][2]
    columns: dict[str, Sequence[Any]] = dict(getattr(run, table))
    names = run.config["parts"] if table == "parts" else run.layer_names
    if "index" in columns:
        columns["name"] = [names[int(index) - 1] for index in columns["index"]]
    return name, columns


# --- findings -------------------------------------------------------------------------------------


def _training_findings(run: Run) -> list[str]:
    summary = run.summary or {}
    return [
        *_ending(run),
        *_accuracy(run),
        *_opposing(run, summary),
        *map(str, summary.get("findings", ())),
    ]


def _ending(run: Run) -> list[str]:
    done = f"{_steps(run)} steps are on file"
    return {
        "unfinished": [f"The run has not come to its end, or was killed: {done}."],
        "interrupted": [f"The run was interrupted: {done}."],
        "diverged": [f"The run diverged: the loss at step {_steps(run)} is not a number."],
    }.get(status(run), [])


def _accuracy(run: Run) -> list[str]:
    top1 = last(run.epochs.get("top1", ()))
    if not math.isfinite(top1):
        return ["No epoch was evaluated, so there is no top-1."]
    count = len(run.epochs["epoch"])
    return [
        f"Top-1 on the test images is {percent(top1, 1)} after {count} "
        f"{'epoch' if count == 1 else 'epochs'}."
    ]


def _opposing(run: Run, summary: Mapping[str, Any]) -> list[str]:
    mean, top = mean_rate(run), max(_known(run.steps.get("rate", ())), default=math.nan)
    if not math.isfinite(mean):
        if summary.get("method", run.config["method"]) == "baseline":
            return ["Nothing decays, so R_op is undefined."]
        return ["R_op was not measured."]
    if top == 0:
        told = f"No penalty opposes: {_method(run)} takes its penalty off the weight that stands."
        literal = (summary.get("literal_rate") or {}).get("mean")
        read = f" Eq. 10 read to the letter would count {percent(literal)}." if literal else ""
        return [told + read]
    rates = np.asarray(run.steps["rate"])
    where = int(run.steps["step"][int(np.nanargmax(rates))])
    found = [
        f"Weight decay pushes {percent(mean)} of the weights away from zero (R_op, mean of the "
        f"steps), at most {percent(top)}, at step {where}."
    ]
    worst = next(iter(layer_rates(run)), None)
    if worst is not None and worst["rate"] > 1.5 * mean:
        found.append(
            f"It opposes most in layer {worst['index']}, {worst['name']}: {percent(worst['rate'])},"
            f" {worst['rate'] / mean:.1f} times the mean."
        )
    return found


def _scan_findings(run: Run) -> list[str]:
    summary = run.summary
    if summary is None:
        points = len(run.curve.get("step", ()))
        return [f"The scan has not come to its end, or was killed: {points} points are on file."]
    metric, life = str(summary["metric"]).replace("top1", "top-1"), summary["half_life"]
    start = summary["curve"][0][summary["metric"]]
    found = [f"On {summary['images']:,} images {metric} starts at {percent(start, 1)}."]
    if life:
        found.append(
            f"The half-life is {life:.4f}: {metric} has lost half of what it had above chance when "
            f"the weights are {percent(1 - life)} smaller."
        )
    else:
        found.append(f"There is no half-life: {metric} never loses half of what it had.")
    if summary["parts"] and summary["parts"][0]["half_life"]:
        part = summary["parts"][0]
        found.append(
            f"Decayed alone, {part['name']} is the most fragile part: half-life "
            f"{part['half_life']:.3f}."
        )
    bent = _distorted(summary)
    if bent:
        found.append(
            f"At scale {bent[0]['scale']:g} the output of layer {bent[0]['index']}, "
            f"{bent[0]['name']}, is distorted most: 1 − cos² = {number(bent[0]['distortion'])}."
        )
    return found


# --- tables ---------------------------------------------------------------------------------------


def layer_rates(run: Run) -> list[dict[str, Any]]:
    """R_op of each layer over the whole run, the largest first; from the table if need be."""
    if run.summary is not None and "layers" in run.summary:
        found = [dict(layer) for layer in run.summary["layers"]]
    else:
        found = _pooled(run)
    known = [layer for layer in found if _is_number(layer["rate"]) and layer["rate"] > 0]
    return sorted(known, key=lambda layer: -layer["rate"])


def _pooled(run: Run) -> list[dict[str, Any]]:
    table = run.layers
    sums: dict[int, list[float]] = {}
    for index, rate, penalized in zip(
        *(table.get(name, ()) for name in ("index", "rate", "penalized")), strict=True
    ):
        if penalized:
            known = sums.setdefault(int(index), [0.0, 0.0])
            known[0] += rate * penalized
            known[1] += penalized
    return [
        {"index": k, "name": run.layer_names[k - 1], "rate": part / whole, "mass": None}
        for k, (part, whole) in sums.items()
    ]


def _layer_table(run: Run) -> list[Html]:
    worst = layer_rates(run)[:_WORST]
    if not worst:
        return []
    rows = [
        (str(x["index"]), str(x["name"]), percent(x["rate"]), percent(x["mass"])) for x in worst
    ]
    return [
        element("h3", f"Layers that oppose most, of {len(run.layer_names)}"),
        page.table(("layer", "name", "R_op", "by size"), rows),
    ]


def _distorted(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    known = [layer for layer in summary["distortion"] if _is_number(layer["distortion"])]
    return sorted(known, key=lambda layer: -layer["distortion"])


def _scan_tables(run: Run) -> list[Html]:
    if run.summary is None:
        return []
    found = []
    if run.summary["parts"]:
        parts = [
            (str(part["name"]), number(part["half_life"]), f"{part['weights']:,}")
            for part in run.summary["parts"]
        ]
        found += [
            element("h3", "Decayed alone, most fragile first"),
            page.table(("part", "half-life", "weights"), parts),
        ]
    bent = [
        (str(x["index"]), str(x["name"]), number(x["distortion"]), number(x["norm_ratio"]))
        for x in _distorted(run.summary)[:_WORST]
    ]
    if bent:
        found += [
            element("h3", "Output distorted most"),
            page.table(("layer", "name", "1 − cos²", "norm ratio"), bent),
        ]
    return found


def _facts(run: Run) -> dict[str, object]:
    c, summary = run.config, run.summary or {}
    versions = c.get("versions", {})
    sizes = {
        "training": c.get("train_size"),
        "validation": c.get("validation_size"),
        "test": c.get("test_size"),
    }
    split = ", ".join(f"{count:,} {name}" for name, count in sizes.items() if count)
    weights = c.get("weights")
    shared = {
        "folder": run.path,
        "command": f"wdprobe {c['command']}",
        "model": c["model"] + (f", {weights:,} weights" if weights else ""),
        "weights from": c.get("source") or c.get("checkpoint"),
        "layers": f"{len(run.layer_names)} ({c.get('layer_definition')})",
        "data": f"{c.get('images') or c.get('dataset')}" + (f": {split} images" if split else ""),
        "seed": c.get("seed"),
        "batch": c.get("batch_size"),
    }
    training = {
        "optimizer": c.get("opt"),
        "method": None if is_scan(run) else _method(run),
        "learning rate η": c.get("lr"),
        "decay rate λ": c.get("weight_decay"),
        "a step takes off": c.get("c"),
        "layer-wise rates": c.get("scale"),
        "seconds": number(summary.get("seconds")) if summary.get("seconds") else None,
    }
    machine = {
        "machine": f"{c.get('device_name')} ({c.get('device')}), threads: {c.get('threads')}",
        "versions": ", ".join(
            f"{name} {version}"
            for name, version in ({"Python": c.get("python")} | versions).items()
        ),
    }
    return shared | ({} if is_scan(run) else training) | machine


# --- several --------------------------------------------------------------------------------------

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


def labels(runs: Sequence[Run]) -> list[str]:
    """A label for each run: its folder's name, with a number where two have the same."""
    names = [run.path.resolve().name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: k + 1].count(name)})"
        for k, name in enumerate(names)
    ]


def comparison(runs: Mapping[str, Run]) -> Html:
    """Several runs in one table, and in one figure each of what they have in common.

    Args:
        runs: by label.
    """
    differing = {
        key: title
        for key, title in _COMPARED.items()
        if len({str(_chosen(run, key)) for run in runs.values()}) > 1
    }
    rows = [
        (label, *(_option(_chosen(run, key)) for key in differing), *results(run))
        for label, run in runs.items()
    ]
    return page.joined(
        [
            page.findings(_ranked(runs)),
            page.table(("run", *differing.values(), *_RESULTS), rows),
            element("div", *_overlays(runs), class_="figures"),
        ]
    )


def _chosen(run: Run, key: str) -> object:
    """An option of a run; a scan has none of training."""
    return (
        None if is_scan(run) and key not in ("model", "dataset", "source") else run.config.get(key)
    )


_RESULTS = ("steps", "top-1", "mean R_op", "half-life", "status")


def results(run: Run) -> tuple[str, ...]:
    """What a run came to: steps, top-1, mean R_op, half-life, status."""
    scan = is_scan(run)
    first = (run.curve.get("top1") or [math.nan])[0]
    return (
        "–" if scan else str(_steps(run)),
        percent(first if scan else last(run.epochs.get("top1", ())), 1),
        percent(mean_rate(run)),
        number((run.summary or {}).get("half_life")),
        status(run),
    )


def _option(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ranked(runs: Mapping[str, Run]) -> list[str]:
    found = []
    top1 = {label: last(run.epochs.get("top1", ())) for label, run in runs.items()}
    top1 = {label: value for label, value in top1.items() if math.isfinite(value)}
    if len(top1) > 1:
        best, worst = (pick(top1, key=lambda label: top1[label]) for pick in (max, min))
        found.append(
            f"Top-1 after the last epoch is highest in {best} ({percent(top1[best], 1)}) and "
            f"lowest in {worst} ({percent(top1[worst], 1)})."
        )
    rates = {label: rate for label, run in runs.items() if math.isfinite(rate := mean_rate(run))}
    if len(rates) > 1:
        most, least = (pick(rates, key=lambda label: rates[label]) for pick in (max, min))
        found.append(
            f"Mean R_op goes from {percent(rates[least])} ({least}) to {percent(rates[most])} "
            f"({most})."
        )
    lives = {label: (run.summary or {}).get("half_life") for label, run in runs.items()}
    known = {label: life for label, life in lives.items() if life}
    if len(known) > 1:
        tough = min(known, key=lambda label: known[label])
        found.append(f"The most robust to shrinking is {tough}: half-life {known[tough]:.3f}.")
    return found


_OVERLAYS = (
    ("steps", "rate", "R_op over the steps", "opposing penalties", True),
    ("epochs", "train_loss", "Training loss", "training loss", False),
    ("epochs", "top1", "Top-1 on the test images", "top-1", True),
)


def _overlays(runs: Mapping[str, Run]) -> list[Html]:
    drawn = []
    for table, column, title, label, share in _OVERLAYS:
        having = {k: run for k, run in runs.items() if _known(getattr(run, table).get(column, ()))}
        if len(having) > 1:
            figure = figures.overlay(having, table, column, title, label, share=share)
            data = f"{column}_by_run", _stacked(having, table, table[:-1], column)
            drawn.append(page.figure(figure, title, "A line for each run.", data))
    scans = {label: run for label, run in runs.items() if run.curve.get("step")}
    if len(scans) > 1:
        title, about, _ = _FIGURES["zeroshot"]
        data = "zeroshot_by_run", _stacked(scans, "curve", "scale", "top1", "agreement")
        drawn.append(page.figure(figures.zero_shot(list(scans.values())), title, about, data))
    return drawn


def _stacked(runs: Mapping[str, Run], table: str, *columns: str) -> dict[str, Sequence[Any]]:
    """The same columns of several runs below each other, in long form."""
    stacked: dict[str, list[Any]] = {name: [] for name in (*columns, "run")}
    for label, run in runs.items():
        found = getattr(run, table)
        for name in columns:
            stacked[name] += found[name]
        stacked["run"] += [label] * len(found[columns[0]])
    return dict(stacked)


# --- numbers --------------------------------------------------------------------------------------


def mean_rate(run: Run) -> float:
    """The mean of R_op over the measured steps; NaN if there are none."""
    known = _known(run.steps.get("rate", ()))
    return sum(known) / len(known) if known else math.nan


def last(values: Sequence[float]) -> float:
    """The last value, NaN if there is none."""
    return values[-1] if values else math.nan


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
