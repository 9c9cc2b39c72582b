"""`wdprobe report`."""

from pathlib import Path
from typing import Annotated

import typer

from . import options as o


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, a sweep's folder, or a folder of runs.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file (default report.html in the folder, or under runs/ for several).",
            show_default=False,
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """Put one run, several or a sweep on one HTML page: findings, figures, tables, data."""
    from . import console

    console.show_warnings()
    with console.loading():
        from wd_probe.report import page as reports
        from wd_probe.runs.folder import dumps

    result = reports.report(runs, output)
    if json:
        console.to_stdout(dumps(result))
    else:
        console.report_written(result)
