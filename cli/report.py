"""`wdprobe report`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from wd_probe.training.option import Option

from . import options as o
from .console import loading, out, to_stdout


@o.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, a sweep's folder, or a folder of runs.")
    ],
    output: Annotated[
        Path | None,
        Option("The HTML file (default report.html in the folder, or under runs/ for several)."),
    ] = None,
    json: o.Json = False,
) -> None:
    """Put one run, several or a sweep on one HTML page: findings, figures, tables, data."""
    with loading():
        from wd_probe.report import page

    result = page.report(runs, output)
    if json:
        to_stdout(result)
    else:
        out.print(f"Report: {escape(result['page'])}", soft_wrap=True)
