"""What a report page says of one run."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..errors import counted
from ..runs import figures
from ..runs.decay_tables import LAYER_COLUMNS, in_all, layer_table, taken_off
from ..runs.reading import Run
from ..runs.schema import OTHERS
from ..runs.verdict import THRESHOLDS
from ..training.options import TrainOptions
from ..training.recipe_options import defaults, told
from ..wording import percent
from .values import Columns, Figures, number

#: By figure the table behind it, and of that the columns where they are not all.
_TABLES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "rop_over_steps": ("steps", ()),
    "rop_by_layer": ("layers", ("rate", "mass", "flip_rate", "penalized")),
    "rop_by_decay_rate": ("profile", ()),
    "flips_over_steps": ("steps", ()),
    "flips_by_layer": ("layers", ("rate", "mass", "flip_rate", "penalized")),
    "balance_by_layer": ("layers", ("growth", "taken", "balance")),
    "angle_by_layer": ("layers", ("angular_update", "relative_update", "timescale")),
    "remaining": ("layers", ("remaining",)),
    "norm_by_layer": ("layers", ("norm",)),
    "training": ("epochs", ()),
    "zeroshot": ("curve", ()),
    "zeroshot_by_part": ("parts", ()),
    "distortion": ("distortion", ()),
}
_WORST, _LAYERS, _TENSORS = 8, 24, 1000
_TENSOR_COLUMNS = ("tensor", "R_op", "by size", "taken off", "balance", "angle", "norm")


def status(run: Run) -> str:
    """How a run ended; "unfinished" if it has no summary."""
    return "unfinished" if run.summary is None else str(run.summary.get("status", "finished"))


def is_scan(run: Run) -> bool:
    """Whether it is a run of `wdprobe zeroshot`."""
    return run.config.get("command") == "zeroshot"


def section(run: Run) -> dict[str, Any]:
    """What ``run.html`` shows of a run that trained."""
    summary = run.summary or {}
    measured = summary if summary.get("dynamics") else {}
    states = layer_table(measured.get("layers", ()))
    return {
        "config": run.config,
        "rates": _rates(run.config),
        "method": _method(run),
        "steps": steps(run),
        "status": status(run),
        "ending": _ending(run),
        "verdict": [str(sentence) for sentence in summary.get("verdict") or ()],
        "in_all": in_all(measured) if measured else {},
        "thresholds": THRESHOLDS,
        "layer_columns": LAYER_COLUMNS,
        "states": states[:_LAYERS],
        "state_count": len(states),
        "sentences": _findings(run),
        "figures": with_data(run, figures.draw_training(run)),
        "layers": [
            (str(x["index"]), str(x["name"]), percent(x["rate"]), percent(x["mass"]))
            for x in layer_rates(run)[:_WORST]
        ],
        "layer_count": len(run.layer_names),
        "tensors": _tensors(run),
        "tensor_columns": _TENSOR_COLUMNS,
        "tensor_count": len(run.tensor_names),
        "tensor_data": {"name": run.tensor_names, **run.tensors},
        "what_was_run": facts(run),
    }


def _tensors(run: Run) -> list[tuple[str, ...]]:
    """A row for each tensor, over all steps; a dash for what a run of another version lacks."""

    def column(name: str) -> Sequence[float]:
        return run.tensors.get(name) or [math.nan] * len(run.tensor_names)

    columns = map(column, ("rate", "mass", "remaining", "balance", "angular_update", "norm"))
    rows = zip(run.tensor_names, *columns, strict=True)
    return [
        (name, percent(rate), percent(mass), taken_off(left), *map(number, rest))
        for name, rate, mass, left, *rest in itertools.islice(rows, _TENSORS)
    ]


def _rates(config: Mapping[str, Any]) -> str:
    named = (("η", config.get("lr")), ("λ", config.get("weight_decay")))
    return " · ".join(f"{sign} {value:g}" for sign, value in named if value is not None)


def _method(run: Run) -> str:
    method = str(run.config["method"])
    if method != "own":
        return method
    found = (run.summary or {}).get("method")
    return f"its own decay, {found}" if found else "its own decay"


def steps(run: Run) -> int:
    """How many steps are on file."""
    return len(run.steps.get("step", ()))


def with_data(run: Run, drawn: Mapping[str, Figure]) -> Figures:
    """Each figure with the table behind it, which has names where the run's has only indices."""
    return {name: (figure, _data(run, *_TABLES[name])) for name, figure in drawn.items()}


def _data(run: Run, table: str, chosen: Sequence[str]) -> Columns:
    columns: Columns = getattr(run, table)
    if chosen:
        columns = {k: columns[k] for k in ("step", "index", *chosen) if k in columns}
    if "index" not in columns:
        return columns
    names = run.config["parts"] if table == "parts" else run.layer_names
    return {**columns, "name": [names[int(index) - 1] for index in columns["index"]]}


# --- findings -------------------------------------------------------------------------------------


def _findings(run: Run) -> list[str]:
    summary = run.summary or {}
    return [
        *_accuracy(run),
        *_opposing(run, summary),
        *map(str, summary.get("findings", ())),
    ]


def _ending(run: Run) -> list[str]:
    done = f"{counted(steps(run), 'step')} on file"
    return {
        "unfinished": [f"The run has not come to its end, or was killed: {done}."],
        "interrupted": [f"The run was interrupted: {done}."],
        "diverged": [f"The run diverged: the loss at step {steps(run)} is not a number."],
    }.get(status(run), [])


def _accuracy(run: Run) -> list[str]:
    scores, is_ours = run.epochs.get("top1", ()), run.config["command"] not in OTHERS
    evaluated = [(epoch, top1) for epoch, top1 in enumerate(scores, 1) if math.isfinite(top1)]
    if not evaluated:
        return ["No epoch was evaluated, so there is no top-1."] if is_ours else []
    count, top1 = evaluated[-1]
    if not is_ours:  # of whose data nothing is known
        return [f"Top-1 was {percent(top1, 1)} when the loop last told it."]
    after = counted(count, "epoch")
    return [f"Top-1 on the test images is {percent(top1, 1)} after {after}."]


def _opposing(run: Run, summary: Mapping[str, Any]) -> list[str]:
    mean, top = mean_rate(run), max(known(run.steps.get("rate", ())), default=math.nan)
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


# --- tables ---------------------------------------------------------------------------------------


def layer_rates(run: Run) -> list[dict[str, Any]]:
    """R_op of each layer over the whole run, the largest first; from the table if need be."""
    if run.summary is not None and "layers" in run.summary:
        found = [dict(layer) for layer in run.summary["layers"]]
    else:
        found = _pooled(run)
    opposing = [layer for layer in found if is_number(layer["rate"]) and layer["rate"] > 0]
    return sorted(opposing, key=lambda layer: -layer["rate"])


def _pooled(run: Run) -> list[dict[str, Any]]:
    table = run.layers
    sums: dict[int, list[float]] = {}
    for index, rate, penalized in zip(
        *(table.get(name, ()) for name in ("index", "rate", "penalized")), strict=True
    ):
        if penalized:
            pair = sums.setdefault(int(index), [0.0, 0.0])
            pair[0] += rate * penalized
            pair[1] += penalized
    return [
        {"index": k, "name": run.layer_names[k - 1], "rate": part / whole, "mass": None}
        for k, (part, whole) in sums.items()
    ]


def facts(run: Run) -> dict[str, object]:
    """What was run, by name."""
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
        "command": c.get("command_line") or f"wdprobe {c['command']}",
        "model": c["model"] + (f", {counted(weights, 'weight')}" if weights else ""),
        "weights from": c.get("source") or c.get("checkpoint"),
        "layers": f"{len(run.layer_names)} ({c.get('layer_definition')})",
        "data": f"{c.get('images') or c.get('dataset')}" + (f": {split} images" if split else ""),
        "seed": c.get("seed"),
        "batch": c.get("batch_size"),
    }
    training = (
        {}
        if is_scan(run)
        else {
            "optimizer": c.get("opt"),
            "method": _method(run),
            "learning rate η": c.get("lr"),
            "decay rate λ": c.get("weight_decay"),
            "a step takes off": c.get("c"),
            "layer-wise rates": c.get("scale"),
            "timm's recipe": recipe(c) or None,
            "seconds": number(summary.get("seconds")) if summary.get("seconds") else None,
        }
    )
    machine = {
        "machine": f"{c.get('device_name')} ({c.get('device')}), threads: {c.get('threads')}",
        "versions": ", ".join(
            f"{name} {version}"
            for name, version in ({"Python": c.get("python")} | versions).items()
        ),
    }
    return shared | training | machine


def recipe(config: Mapping[str, Any]) -> str:
    """What a run takes of timm's recipe, for a person."""
    usual = defaults(TrainOptions)
    return told(
        {name: config[name] for name in usual if config.get(name, usual[name]) != usual[name]}
    )


# --- numbers --------------------------------------------------------------------------------------


def mean_rate(run: Run) -> float:
    """The mean of R_op over the measured steps; NaN if there are none."""
    rates = known(run.steps.get("rate", ()))
    return sum(rates) / len(rates) if rates else math.nan


def last(values: Sequence[float]) -> float:
    """The last value, NaN if there is none."""
    return values[-1] if values else math.nan


def known(values: Sequence[float]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if math.isfinite(value)]


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
