"""What `wdprobe rop` and `wdprobe train` share: a run, begun or resumed, and its summary."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from wd_probe.errors import InputError, RunError
from wd_probe.training.option import Option
from wd_probe.training.options import OUTPUT, TrainOptions

from .ahead import check_ahead
from .console import err, loading, out, to_stdout
from .options import Given
from .processes import INTERRUPTED

Resume = Annotated[
    Path | None,
    Option("Go on with this killed or interrupted run, by its own options.", OUTPUT),
]
#: What may stand beside --resume: it changes no result.
_BESIDE = ("device", "recovery_interval", "log_wandb")


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


def _show(summary: dict[str, Any]) -> None:
    """The result of `wdprobe train` and `wdprobe rop` for a person."""
    from wd_probe.runs.summary_tables import summary_told

    out.print()
    out.print(summary_told(summary))
    out.print(f"\nRun folder: {escape(summary['run'])}", soft_wrap=True)
