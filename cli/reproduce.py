"""`wdprobe reproduce`."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import options as o


class Name(StrEnum):
    """A table or figure of the paper."""

    table1 = "table1"
    table3 = "table3"
    fig1 = "fig1"
    fig2 = "fig2"
    fig3a = "fig3a"
    fig3b = "fig3b"
    fig4 = "fig4"
    fig5 = "fig5"


def _several(what: str) -> typer.models.OptionInfo:
    return typer.Option(  # type: ignore[no-any-return]
        help=f"{what}, comma-separated (default: the paper's).",
        rich_help_panel="Grid",
        show_default=False,
    )


def reproduce(
    name: Annotated[Name, typer.Argument(help="Which table or figure.")],
    model: Annotated[str, _several("timm models")] = "",
    dataset: Annotated[str, _several("Datasets")] = "",
    opt: Annotated[str, _several("timm optimizers")] = "",
    method: Annotated[str, _several("Methods")] = "",
    lr: Annotated[str, _several("Learning rates η")] = "",
    weight_decay: Annotated[str, _several("Decay rates λ")] = "",
    seeds: Annotated[int, typer.Option(help="Runs of each cell.", rich_help_panel="Grid")] = 3,
    pretrained: Annotated[
        bool, typer.Option(help="timm's weights from the hub.", rich_help_panel="Model")
    ] = True,
    img_size: o.ImgSize = 32,
    data_dir: o.DataDir = None,
    dataset_download: o.DatasetDownload = False,
    val_split: o.ValSplit = 0.1,
    train_samples: o.TrainSamples = None,
    batch_size: o.BatchSize = 512,
    epochs: o.Epochs = 100,
    every: o.Every = 10,
    device: o.DeviceOption = o.Device.auto,
    amp: o.Amp = False,
    channels_last: o.ChannelsLast = False,
    torchcompile: o.TorchCompile = False,
    output: Annotated[
        Path, typer.Option(help="Folder of the cells and tables.", rich_help_panel="Output")
    ] = Path("runs/paper"),
    yes: Annotated[bool, typer.Option("--yes", help="Also more than 10,000 cells.")] = False,
    json: o.Json = False,
) -> None:
    """Run a table or figure of the paper again, in its setting or any smaller one.

    Cells that the output folder has are kept: the same command goes on where it was stopped, and
    experiments share what they have in common.
    """
    given = {
        key: value
        for key, value in locals().items()
        if key in ("pretrained", "img_size", "data_dir", "dataset_download", "val_split",
                   "train_samples", "batch_size", "epochs", "every", "amp", "channels_last",
                   "torchcompile")
    }  # fmt: skip
    from . import console

    console.show_warnings()
    with console.loading():
        from wd_probe.runs.folder import dumps
        from wd_probe.sweeps import paper

    options = paper.PaperOptions(
        datasets=o.listed(dataset),
        models=o.listed(model),
        opts=o.listed(opt),
        methods=o.listed(method),
        lrs=o.numbers("--lr", lr),
        weight_decays=o.numbers("--weight-decay", weight_decay),
        seeds=seeds,
        setting=replace(paper.SETTING, device=device.value, **given),
        output=output,
    )
    with console.SweepProgress() as progress:
        result = paper.reproduce(name.value, options, progress, consent=yes)
    if json:
        console.to_stdout(dumps(result))
    else:
        console.paper_result(result)
    if result["failed"]:
        raise typer.Exit(1)
