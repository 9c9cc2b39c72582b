"""`wdprobe reproduce`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from wd_probe.sweeps.options import SETTING, Name, PaperOptions
from wd_probe.tables import plain_table
from wd_probe.training.option import Option
from wd_probe.training.options import OUTPUT, TrainOptions
from wd_probe.training.recipe_options import NAMES as RECIPE

from . import options as o
from . import where
from .console import loading, out, to_stdout


@o.command(
    grid=o.Fields(PaperOptions()),
    setting=o.Fields(
        SETTING,
        only=("pretrained", "checkpoint", "img_size", "data_dir", "dataset_download", "val_split",
              "train_samples", "batch_size", "epochs", "val_interval", "every", "device", "amp",
              "channels_last", "torchcompile",
              *(name for name in RECIPE if not name.startswith("model_ema"))),
    ),
)  # fmt: skip
def reproduce(
    name: Annotated[Name, typer.Argument(help="Which table or figure.")],
    *,
    grid: o.Given[PaperOptions],
    setting: o.Given[TrainOptions],
    output: Annotated[Path, Option("Folder of the cells and tables.", OUTPUT)] = Path("runs/paper"),
    yes: o.Yes = False,
    json: o.Json = False,
    ray: where.Ray = False,
    ray_address: where.RayAddress = None,
    gpus_per_cell: where.GpusPerCell = None,
    cpus_per_cell: where.CpusPerCell = None,
) -> None:
    """Run a table or figure of the paper again, in its setting or any smaller one.

    Cells that the output folder has are kept: the same command goes on where it was stopped, and
    experiments share what they have in common.
    """
    shared = setting.options()
    if shared.checkpoint is not None:
        shared = replace(shared, pretrained=False)
    options = grid.options(setting=shared, output=output)
    with loading():
        from wd_probe.sweeps import paper

        from .progress import SweepProgress
    with (
        where.runner(ray, ray_address, cpus_per_cell, gpus_per_cell) as runner,
        SweepProgress() as progress,
    ):
        result = paper.reproduce(name, options, progress, runner=runner, consent=yes)
    if json:
        to_stdout(result)
    else:
        _show(result)
    if result["failed"]:
        raise typer.Exit(1)


def _show(result: dict[str, Any]) -> None:
    """The result of `wdprobe reproduce` for a person."""
    columns, rows = list(result["columns"]), [list(row) for row in result["rows"]]
    same = [k for k in range(len(columns)) if len(rows) > 1 and len({row[k] for row in rows}) == 1]
    about = {"dataset": "{}", "model": "{}", "optimizer": "{}", "η": "η {}", "λ": "λ {}"}
    told = " · ".join(about[columns[k]].format(rows[0][k]) for k in same if columns[k] in about)
    out.print(f"\n[bold]{escape(result['title'])}[/]" + (f"\n{escape(told)}" if told else ""))
    shown = [k for k in range(len(columns)) if k not in same or columns[k] == "method"]
    table = plain_table()
    room, left_out = out.width, 0
    for k in shown:
        cells = [row[k] for row in rows]
        body, title = max(map(len, cells), default=0), max(map(len, columns[k].split()))
        room -= max(body, title) + 2
        if room < 0:
            left_out += 1  # and all that follow: room only shrinks
            continue
        numeric = all(cell[:1] in "+-–0123456789" for cell in cells)
        table.add_column(columns[k], justify="right" if numeric else "left")
    kept = len(table.columns)
    for row in rows:
        table.add_row(*(escape(row[k]) for k in shown[:kept]))
    out.print(table)
    if left_out:
        out.print(f"{left_out} more columns in {escape(result['files'][0])}", soft_wrap=True)
    for note in result["notes"]:
        out.print(f"• {escape(note)}")
    for path in result["failed"]:
        out.print(f"failed: {escape(path)}", soft_wrap=True)
    out.print(f"\nWritten: {escape(', '.join(result['files']))}", soft_wrap=True)
