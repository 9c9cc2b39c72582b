"""What `wdprobe train` and `wdprobe rop` share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

#: What may stand beside --resume: it changes no result.
_BESIDE = ("resume", "device", "recovery_interval", "json")


def run(command: str, ctx: typer.Context, given: dict[str, Any]) -> None:
    """Train by the given options and show the summary; exit code 1 unless the run finished."""
    from . import console

    console.show_warnings()
    with console.loading():
        from wd_probe.errors import RunError
        from wd_probe.ranks import FAILED
        from wd_probe.runs.folder import dumps
        from wd_probe.training.checkpoint import RECOVERY
        from wd_probe.training.train import train

    options = _options(command, ctx, given)
    resume, json = given["resume"] is not None, given["json"]
    with console.TrainingProgress(resume) as progress:
        summary = train(options, progress, resume=resume)
    if json:
        console.to_stdout(dumps(summary))
    else:
        console.training_summary(summary)
    saved = Path(summary["run"], RECOVERY).is_file()
    since = "from its last save" if saved else "from its start: it was not saved yet"
    if summary["status"] == "interrupted":
        console.err.print(
            f"interrupted after step {summary['steps']}; what was measured is kept until "
            f"`wdprobe {command} --resume {escape(summary['run'])}` goes on {since}",
            soft_wrap=True,
        )
    if summary["status"] == "diverged":
        console.err.print(
            f"the loss is no longer finite at step {summary['steps']}; the run ends there: "
            "try a smaller --lr or --weight-decay",
            soft_wrap=True,
        )
    if summary["status"] == "failed":
        raise RunError(
            f"{FAILED}, after step {summary['steps']} ({summary['reason']}); what was measured is "
            f"kept until `wdprobe {command} --resume {summary['run']}` goes on {since}; under "
            "torchrun too"
        )
    if summary["status"] != "finished" or "write_failure" in summary:
        raise typer.Exit(1)


def _options(command: str, ctx: typer.Context, given: dict[str, Any]) -> Any:
    from wd_probe.errors import InputError
    from wd_probe.training.options import TrainOptions, keywords

    run: Path | None = given["resume"]
    if run is None:
        chosen = {name: value for name, value in given.items() if name not in ("resume", "json")}
        chosen["opt_kwargs"] = keywords(chosen["opt_kwargs"] or ())
        return TrainOptions(command=command, **chosen)
    from wd_probe.training.resume import options_of

    sources = {name: ctx.get_parameter_source(name) for name in given}
    typed = [name for name, source in sources.items() if source and source.name != "DEFAULT"]
    beyond = [f"--{name.replace('_', '-')}" for name in typed if name not in _BESIDE]
    if beyond:
        raise InputError(
            f"--resume takes every option from {run / 'config.json'}; leave out {', '.join(beyond)}"
        )
    changed = {name: given[name] for name in ("device", "recovery_interval") if name in typed}
    return replace(options_of(run, command), **changed)
