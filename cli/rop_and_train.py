"""What `wdprobe rop` and `wdprobe train` share: a run, begun or resumed, and its summary."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from wd_probe.errors import InputError, RunError, counted
from wd_probe.training.options import OUTPUT, Option, TrainOptions
from wd_probe.wording import percent

from . import what_decay_did
from .ahead import check_ahead
from .console import err, loading, out, plain_table, to_stdout
from .options import Given
from .processes import INTERRUPTED

Resume = Annotated[
    Path | None,
    Option("Go on with this killed or interrupted run, by its own options.", OUTPUT),
]
#: What may stand beside --resume: it changes no result.
_BESIDE = ("device", "recovery_interval")


def run(given: Given[TrainOptions], resume: Path | None, json: bool) -> None:
    """Train by the given options and show the summary; exit code 1 unless the run finished."""
    if resume is None:
        options = given.options()
        options.check_moments()
        check_ahead(options)
    else:
        options = _resumed(given, resume)
    with loading():
        from wd_probe.training.train import train

        from .progress import TrainingProgress
    with TrainingProgress(resume is not None) as progress:
        summary = train(options, progress, resume=resume is not None)
    if json:
        to_stdout(summary)
    else:
        _show(summary)
    _tell_end(options.command, summary)


def _resumed(given: Given[TrainOptions], run: Path) -> TrainOptions:
    beyond = [given.flag(name) for name in given.typed if name not in _BESIDE]
    if beyond:
        raise InputError(
            f"--resume takes every option from {run / 'config.json'}; leave out {', '.join(beyond)}"
        )
    from wd_probe.training.resume import options_of

    return replace(options_of(run, given.defaults.command), **given.typed)


def _tell_end(command: str, summary: dict[str, Any]) -> None:
    """Say why a run ended early, and how it is resumed."""
    from wd_probe.ranks import FAILED
    from wd_probe.training.checkpoint import RECOVERY

    saved = Path(summary["run"], RECOVERY).is_file()
    since = "from its last save" if saved else "from its start: it was not saved yet"
    again = ["wdprobe", command, "--resume", summary["run"]]
    if summary["status"] == "interrupted":
        err.print(
            f"interrupted after step {summary['steps']}; what was measured is kept, and this goes "
            f"on {since}:",
            soft_wrap=True,
        )
        err.print(escape(shlex.join(again)), soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    if summary["status"] == "diverged":
        err.print(
            f"the loss is no longer finite at step {summary['steps']}; the run ends there: "
            "try a smaller --lr or --weight-decay",
            soft_wrap=True,
        )
    if summary["status"] == "failed":
        raise RunError(
            f"{FAILED}, after step {summary['steps']} ({summary['reason']}); what was measured is "
            f"kept until `{shlex.join(again)}` goes on {since}; under "
            "torchrun too"
        )
    if summary["status"] != "finished" or "write_failure" in summary:
        raise typer.Exit(1)


# --- the summary ----------------------------------------------------------------------------------


def _show(summary: dict[str, Any]) -> None:
    """The result of `wdprobe train` and `wdprobe rop` for a person."""
    title = "Opposing-penalty rate" if summary["command"] == "rop" else "Training"
    scale = "" if summary["scale"] is None else f" ({summary['scale']})"
    status = "" if summary["status"] == "finished" else f" ({summary['status']})"
    out.print(
        f"\n[bold]{title}[/] · {escape(summary['model'])} on {escape(summary['dataset'])} · "
        f"{counted(summary['steps'], 'step')}{status}\n"
        f"{escape(summary['optimizer'])} · {summary['method']}{scale} · η {summary['lr']:g} · "
        f"λ {summary['weight_decay']:g}"
    )
    _scores(summary)
    told = summary.get("verdict") or ()
    if told:
        out.print(f"\n[bold]{escape(told[0])}[/]")
    if "dynamics" in summary:
        what_decay_did.show(summary)
    if "rate" in summary:
        _rates(summary)
        _worst_layers(summary["layers"], summary["layer_definition"])
        for finding in (*told[1:], *summary["findings"]):
            _item(finding)
    out.print(f"\nRun folder: {escape(summary['run'])}", soft_wrap=True)


def _item(text: str) -> None:
    grid = Table.grid(padding=(0, 1))
    grid.add_row("•", escape(text))
    out.print(grid)


def _scores(summary: dict[str, Any]) -> None:
    found = [("top-1", summary["top1"])]
    if summary["epochs"] > 1:
        best = summary["best10"]
        chosen = "the best " if best["epochs"] < summary["epochs"] else ""
        found.append((f"mean of {chosen}{counted(best['epochs'], 'epoch')}", best["mean"]))
    found.append(("at the other moment", summary["other_top1"]))
    if summary["chosen"] is not None:
        where = f"at epoch {summary['chosen']['epoch']}, the best on validation"
        found.append((where, summary["chosen"]["top1"]))
    known = [(name, value) for name, value in found if value is not None and value == value]
    if known:
        out.print(" · ".join(f"{name} {percent(value, 1)}" for name, value in known))


def _rates(summary: dict[str, Any]) -> None:
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
    out.print()
    out.print(table)
    if "literal_rate" in summary:
        out.print(
            f"{summary['method']} decays the weight that the step then moves, so that no penalty "
            "opposes; read literally, Eq. 10 compares it with a step from the undecayed weight."
        )


def _worst_layers(layers: list[dict[str, Any]], definition: str) -> None:
    known = [layer for layer in layers if layer["rate"] is not None and layer["rate"] > 0]
    if not known:
        return
    worst = sorted(known, key=lambda layer: -layer["rate"])[:5]
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
    out.print()
    out.print(table)
    out.print()
