"""What `wdprobe train` and `wdprobe rop` share."""

from typing import Any

import typer


def run(command: str, given: dict[str, Any], json: bool) -> None:
    """Train by the given options and show the summary; exit code 1 unless the run finished."""
    from . import render

    render.show_warnings()
    with render.loading():
        from wd_probe.experiments.options import TrainOptions
        from wd_probe.experiments.runs import dumps
        from wd_probe.experiments.train import train

    chosen = {name: value for name, value in given.items() if name not in ("json", "training")}
    with render.TrainingProgress() as progress:
        summary = train(TrainOptions(command=command, **chosen), progress)
    if json:
        render.to_stdout(dumps(summary))
    else:
        render.training_summary(summary)
    if summary["status"] == "interrupted":
        render.err.print(f"interrupted after step {summary['steps']}; what was measured is kept")
    if summary["status"] == "diverged":
        render.err.print(
            f"the loss is no longer finite at step {summary['steps']}; the run ends there: "
            "try a smaller --lr or --weight-decay",
            soft_wrap=True,
        )
    if summary["status"] != "finished" or "write_failure" in summary:
        raise typer.Exit(1)
