"""`wdprobe sweep`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from wd_probe.errors import counted
from wd_probe.tables import plain_table
from wd_probe.training.option import Option
from wd_probe.training.options import TrainOptions
from wd_probe.wording import percent, plus_minus

from . import options as o
from . import where
from .console import err, loading, out, to_stdout

_DEFAULTS = TrainOptions(opt="adam", method="lpwd")
_AXES = {
    "method": "Methods",
    "lr": "Learning rates η",
    "weight_decay": "Decay rates λ",
    "model": "timm models",
    "dataset": "Datasets",
    "opt": "timm optimizers",
}
_FIELDS = o.Fields(
    _DEFAULTS,
    but=("seed", "recovery_interval"),
    axes={name: f"{what}, with commas between." for name, what in _AXES.items()},
    help={
        "every": o.EVERY,
        "output": "Folder of the sweep (default runs/sweep-KEY, the same for the same grid).",
    },
)


@o.command(given=_FIELDS)
def sweep(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="GRID", help="A TOML or YAML file of options; lists are axes."),
    ] = None,
    *,
    given: o.Given[TrainOptions],
    seeds: Annotated[
        int | None, Option("Runs of each setting: seeds 0 to N-1 (default 1).", o.GRID)
    ] = None,
    json: o.Json = False,
    yes: o.Yes = False,
    ray: where.Ray = False,
    ray_address: where.RayAddress = None,
    gpus_per_cell: where.GpusPerCell = None,
    cpus_per_cell: where.CpusPerCell = None,
) -> None:
    """Train every cell of a grid; the same command goes on where it was stopped."""
    from wd_probe.sweeps.grid import Plan, claimed, read_grid

    plan = Plan.of(_values(given, seeds, read_grid(file) if file else {}))
    cells = plan.cells(consent=yes)
    folder = plan.base.output or Path("runs", f"sweep-{plan.key()}")
    with claimed(folder, plan, cells) as ordered:
        with loading():
            from wd_probe.sweeps import cells as runs
            from wd_probe.sweeps import results

            from .progress import SweepProgress
        with (
            where.runner(ray, ray_address, cpus_per_cell, gpus_per_cell) as runner,
            SweepProgress() as progress,
        ):
            summaries = runs.sweep(ordered, folder, progress, runner=runner, consent=yes)
    result = results.result(ordered, summaries, folder)
    if json:
        to_stdout(result)
    else:
        _show(result)
    _show_failures(result)
    if result["counts"]["failed"]:
        raise typer.Exit(1)


def _values(
    given: o.Given[TrainOptions], seeds: int | None, read: dict[str, Any]
) -> dict[str, Any]:
    """What is typed goes before the file, and the file before defaults."""
    typed = dict(given.typed) if seeds is None else {**given.typed, "seeds": seeds}
    defaults = {name: getattr(_DEFAULTS, name) for name in _FIELDS.names() if name not in typed}
    for name in _AXES:
        if defaults.get(name) is not None:
            defaults[name] = (defaults[name],)
    if seeds is None:
        defaults["seed"] = range(1)
    return {**defaults, **read, **typed}  # the last axis turns fastest


def _show(result: dict[str, Any]) -> None:
    """The result of `wdprobe sweep` for a person: a table for each dataset, model and optimizer."""
    ends = ", ".join(f"{count} {status}" for status, count in sorted(result["counts"].items()))
    out.print(f"\n[bold]Sweep[/] · cells: {ends}")
    if result["chosen_by"].startswith("validation"):
        out.print(
            "Best η and λ by mean validation top-1; top-1 is that of the test images,\n"
            "both at each run's best epoch on validation."
        )
    else:
        out.print(
            "Best η and λ by mean test top-1 of each run's ten best epochs;\n"
            "without --val-split the best of many settings is flattered."
        )
    if any(row["seeds"] > 1 for row in result["best"]):
        out.print("±: the 95 % interval over seeds.")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result["best"]:
        groups.setdefault((row["model"], row["dataset"], row["opt"]), []).append(row)
    for (model, dataset, opt), rows in groups.items():
        out.print(f"\n[bold]{escape(model)}[/] on {escape(dataset)} · {escape(opt)}")
        out.print(_best_table(rows))
    if result["lag"]:
        out.print(f"\n{escape(result['lag'])}")
    out.print(f"\nFolder: {escape(result['run'])} (cells.csv has every cell)", soft_wrap=True)


def _best_table(rows: list[dict[str, Any]]) -> Table:
    from wd_probe.runs.decay_tables import taken_off

    usual = ("dataset", "model", "opt", "method", "lr", "weight_decay", "top1", "val_top1", "R_op",
             "state", "remaining", "seeds", "diverged", "tried")  # fmt: skip
    others = [key for key in rows[0] if key not in usual]
    columns = {"η": 8, "λ": 7, "top-1": 15, "R_op": 9}
    if out.width >= 110:
        columns |= {"validation": 10, "decay": 9, "taken off": 9, "seeds": 5, "tried": 5}
    if any(row["diverged"] for row in rows):
        columns["lost"] = 4
    table = plain_table()
    table.add_column("method", no_wrap=True, min_width=8)
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    for name, width in columns.items():
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    top = max((row["top1"]["mean"] for row in rows if row["top1"]["mean"] >= 0), default=None)
    for row in rows:
        cells = {
            "η": f"{row['lr']:g}",
            "λ": "–" if row["method"] == "baseline" else f"{row['weight_decay']:g}",
            "top-1": plus_minus(row["top1"]["mean"], row["top1"]["half_width"], 2),
            "R_op": percent(row["R_op"]),
            "validation": percent(row["val_top1"], 2),
            "seeds": str(row["seeds"]),
            "decay": row["state"] or "–",
            "taken off": taken_off(row["remaining"]),
            "tried": str(row["tried"]),
            "lost": str(row["diverged"] or ""),
        }
        table.add_row(
            *(escape(str(row[name])) for name in ("method", *others)),
            *(cells[name] for name in columns),
            style="bold" if row["top1"]["mean"] == top else "",
        )
    return table


def _show_failures(result: dict[str, Any], shown: int = 10) -> None:
    """The cells that failed, on stderr."""
    failed = [row for row in result["cells"] if row["status"] == "failed"]
    if not failed:
        return
    err.print(
        f"{len(failed)} of {counted(len(result['cells']), 'cell')} failed; the same command tries "
        "again:"
    )
    for row in failed[:shown]:
        err.print(f"  {escape(row['cell'])}: {escape(row['error'])}", soft_wrap=True)
    if len(failed) > shown:
        err.print(f"  and {len(failed) - shown} more in cells.csv")
