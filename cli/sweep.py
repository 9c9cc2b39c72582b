"""`wdprobe sweep`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o

_AXES = ("model", "dataset", "opt", "method", "lr", "weight_decay")
_OWN = ("ctx", "file", "yes", "ray", "ray_address", "gpus_per_cell", "cpus_per_cell", "json")


def _axis(flag: str, what: str) -> typer.models.OptionInfo:
    return typer.Option(  # type: ignore[no-any-return]
        flag, help=f"{what}, with commas between.", rich_help_panel="Grid", show_default=True
    )


def _where(text: str, *flags: str) -> typer.models.OptionInfo:
    return typer.Option(*flags, help=text, rich_help_panel="Where", show_default=False)  # type: ignore[no-any-return]


def sweep(
    ctx: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="GRID", help="A TOML or YAML file of options; lists are axes."),
    ] = None,
    method: Annotated[str, _axis("--method", "Methods")] = "lpwd",
    lr: Annotated[str | None, _axis("--lr", "Learning rates η")] = None,
    weight_decay: Annotated[str, _axis("--weight-decay", "Decay rates λ")] = "0.01",
    model: Annotated[str, _axis("--model", "timm models")] = "convnext_tiny",
    dataset: Annotated[str, _axis("--dataset", "Datasets")] = "digits",
    opt: Annotated[str, _axis("--opt", "timm optimizers")] = "adam",
    seeds: Annotated[
        int, typer.Option(help="Runs of each setting: seeds 0 to N-1.", rich_help_panel="Grid")
    ] = 1,
    pretrained: o.Pretrained = False,
    checkpoint: o.Checkpoint = None,
    img_size: o.ImgSize = 32,
    data_dir: o.DataDir = None,
    dataset_download: o.DatasetDownload = False,
    hflip: o.Hflip = None,
    val_split: o.ValSplit = 0.0,
    train_samples: o.TrainSamples = None,
    opt_kwargs: o.OptKwargs = None,
    momentum: o.Momentum = 0.9,
    scale: o.LayerScale = None,
    convention: o.ConventionOption = o.Convention.lr_rate,
    filter_bias_and_bn: o.FilterBiasAndBn = False,
    batch_size: o.BatchSize = 64,
    epochs: o.Epochs = 4,
    steps: o.Steps = None,
    device: o.DeviceOption = o.Device.auto,
    amp: o.Amp = False,
    amp_dtype: o.AmpDtypeOption = o.AmpDtype.bfloat16,
    channels_last: o.ChannelsLast = False,
    torchcompile: o.TorchCompile = False,
    every: Annotated[
        int,
        typer.Option(
            help="Measure R_op at every so-many-th step; 0: never.", rich_help_panel="Output"
        ),
    ] = 0,
    both_moments: o.BothMoments = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the sweep (default runs/sweep-KEY, the same for the same grid).",
            rich_help_panel="Output",
            show_default=False,
        ),
    ] = None,
    json: o.Json = False,
    yes: Annotated[bool, typer.Option("--yes", help="Also more than 10,000 cells.")] = False,
    ray: Annotated[bool, _where("Run cells as Ray tasks, on this machine.", "--ray")] = False,
    ray_address: Annotated[
        str | None,
        _where("Run them on a cluster: HOST:PORT, ray://HOST:PORT or auto.", "--ray-address"),
    ] = None,
    gpus_per_cell: Annotated[
        float | None,
        _where("With Ray; may be a fraction (default 1 if there are any).", "--gpus-per-cell"),
    ] = None,
    cpus_per_cell: Annotated[
        int | None, _where("With Ray; also torch's threads (default 1).", "--cpus-per-cell")
    ] = None,
) -> None:
    """Train every cell of a grid; the same command goes on where it was stopped."""
    given = {name: value for name, value in locals().items() if name not in _OWN}
    from . import console

    console.show_warnings()
    with console.loading():
        from wd_probe.runs.folder import dumps
        from wd_probe.sweeps import grid as gridfile
        from wd_probe.sweeps import results as best
        from wd_probe.sweeps.cells import sweep as run
        from wd_probe.training.options import keywords

    given["opt_kwargs"] = keywords(opt_kwargs or ())
    values = _values(ctx, given, gridfile.read_grid(file) if file else {})
    plan = gridfile.Plan.of(values)
    cells = plan.cells(consent=yes)
    folder = plan.base.output or Path("runs", f"sweep-{plan.key()}")
    with (
        gridfile.Claim(folder, plan, cells),
        _runner(ray, ray_address, cpus_per_cell, gpus_per_cell) as runner,
        console.SweepProgress() as progress,
    ):
        summaries = run(cells, folder, progress, runner=runner, consent=yes)
    result = best.result(cells, summaries, folder)
    if json:
        console.to_stdout(dumps(result))
    else:
        console.sweep_summary(result)
    console.sweep_failures(result)
    if result["counts"]["failed"]:
        raise typer.Exit(1)


def _values(ctx: typer.Context, given: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    """What is typed on the command line goes before the file, and the file before defaults."""
    from wd_probe.sweeps.grid import seeded

    values = {
        name: o.listed(value) if name in _AXES and value is not None else value
        for name, value in given.items()
    }
    sources = {name: ctx.get_parameter_source(name) for name in given}
    typed = {name for name, source in sources.items() if source and source.name != "DEFAULT"}
    defaults = {name: value for name, value in values.items() if name not in typed}
    chosen = {name: values[name] for name in typed}
    return seeded(defaults) | read | seeded(chosen)


def _runner(ray: bool, address: str | None, cpus: int | None, gpus: float | None) -> Any:
    import contextlib

    if ray or address is not None:
        from wd_probe.sweeps.ray import OnRay

        return OnRay(address, cpus=1 if cpus is None else cpus, gpus=gpus)
    if cpus is not None or gpus is not None:
        from wd_probe.errors import InputError

        raise InputError("--cpus-per-cell and --gpus-per-cell need --ray or --ray-address")
    return contextlib.nullcontext()
