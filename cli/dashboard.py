"""`wdprobe dashboard`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from wd_probe.training.option import Option

from . import options as o
from .console import err


@o.command()
def dashboard(
    runs: Annotated[Path, typer.Argument(help="A run folder, or a folder of them.")] = Path("runs"),
    port: Annotated[int, Option("0 picks a free one.")] = 6006,
) -> None:
    """Open TensorBoard on localhost over one run or many, until Ctrl-C."""
    from wd_probe.runs.tensorboard import serve

    address = serve(runs, port)
    err.print(f"TensorBoard is at {address} (Ctrl-C ends it)", soft_wrap=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
