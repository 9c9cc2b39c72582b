"""`wdprobe zeroshot`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .processes import process


def zeroshot(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A timm model; may be given several times (default convnext_tiny).",
            rich_help_panel="Model",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(
            help="A run folder: its model, data and weights; may be given several times.",
            rich_help_panel="Model",
        ),
    ] = None,
    pretrained: o.Pretrained = False,
    checkpoint: o.Checkpoint = None,
    reset_head: Annotated[
        bool,
        typer.Option(
            "--reset-head",
            help="Let the classifier be untrained where the checkpoint's does not fit.",
            rich_help_panel="Model",
        ),
    ] = False,
    img_size: Annotated[
        int | None,
        typer.Option(
            help="Side of the square images (default that of the run, else the model's own; 32 "
            "where there are no weights).",
            rich_help_panel="Model",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Unlabelled pictures, instead of --dataset.", rich_help_panel="Data"),
    ] = None,
    dataset: o.Dataset = "digits",
    data_dir: o.DataDir = None,
    dataset_download: o.DatasetDownload = False,
    num_samples: Annotated[
        int | None, typer.Option(help="Evaluate on the first so many.", rich_help_panel="Data")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps from 1 to 0.", rich_help_panel="Scan")] = 100,
    by: Annotated[
        o.By, typer.Option(help="Also one part at a time.", rich_help_panel="Scan")
    ] = o.By.none,
    by_steps: Annotated[
        int, typer.Option(help="Steps from 1 to 0 for each part.", rich_help_panel="Scan")
    ] = 10,
    distortion: Annotated[
        bool, typer.Option(help="Also the layers' feature distortion.", rich_help_panel="Scan")
    ] = True,
    opt: o.Opt = "adam",
    lr: Annotated[float, typer.Option(help="Learning rate η.", rich_help_panel="Training")] = 1e-4,
    epochs: o.Epochs = 4,
    batch_size: o.BatchSize = 64,
    seed: o.Seed = 0,
    device: o.DeviceOption = o.Device.auto,
    amp: o.Amp = False,
    amp_dtype: o.AmpDtypeOption = o.AmpDtype.bfloat16,
    channels_last: o.ChannelsLast = False,
    torchcompile: o.TorchCompile = False,
    output: o.Output = None,
    json: o.Json = False,
) -> None:
    """Scale a trained model's weights to zero without training, and evaluate on the way (Eq. 12).

    Without --run, --checkpoint or --pretrained the paper's Baseline is trained first, briefly.
    """
    given = {
        name: value
        for name, value in locals().items()
        if name not in ("model", "run", "output", "json", "by")
    }
    from . import console

    console.show_warnings()
    with console.loading():
        from wd_probe.errors import InputError
        from wd_probe.runs.folder import default_folder, dumps
        from wd_probe.training.options import ZeroshotOptions
        from wd_probe.training.scan import compare, scan

    if model and run:
        raise InputError("--run brings its own model; give --model or --run")
    if checkpoint is not None and model and len(model) > 1:
        raise InputError("--checkpoint goes with one --model")
    shared = ZeroshotOptions(**given, by=by.value)
    subjects = [replace(shared, run=folder) for folder in run or ()] or [
        replace(shared, model=name) for name in model or ["convnext_tiny"]
    ]
    folder = output
    if folder is None and len(subjects) > 1:
        folder = default_folder("zeroshot", "-".join(model or [one.name for one in run or ()])[:60])
    summaries = []
    for number, subject in enumerate(subjects, start=1):
        own = folder if folder is None or len(subjects) == 1 else folder / f"{number}"
        with console.ScanProgress() as progress:
            summaries.append(scan(replace(subject, output=own), progress))
        if not json:
            console.zeroshot_summary(summaries[-1])
    several = folder if len(summaries) > 1 else None
    if several and not process():
        compare(summaries, several)
    if json:
        all_of_them = {"command": "zeroshot", "models": summaries, "run": str(folder)}
        console.to_stdout(dumps(all_of_them if several else summaries[0]))
    elif several:
        console.zeroshot_comparison(summaries, several)
    if any("write_failure" in summary for summary in summaries):
        raise typer.Exit(1)
