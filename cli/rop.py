"""`wdprobe rop`."""

import typer

from . import options as o


def rop(
    model: o.Model = "convnext_tiny",
    pretrained: o.Pretrained = False,
    checkpoint: o.Checkpoint = None,
    img_size: o.ImgSize = 32,
    dataset: o.Dataset = "digits",
    data_dir: o.DataDir = None,
    dataset_download: o.DatasetDownload = False,
    hflip: o.Hflip = None,
    opt: o.Opt = "adamw",
    lr: o.Lr = None,
    weight_decay: o.WeightDecay = 0.01,
    momentum: o.Momentum = 0.9,
    method: o.MethodOption = o.Method.own,
    convention: o.ConventionOption = o.Convention.lr_rate,
    filter_bias_and_bn: o.FilterBiasAndBn = False,
    batch_size: o.BatchSize = 64,
    epochs: o.Epochs = 4,
    steps: o.Steps = None,
    seed: o.Seed = 0,
    device: o.DeviceOption = o.Device.auto,
    amp: o.Amp = False,
    amp_dtype: o.AmpDtypeOption = o.AmpDtype.bfloat16,
    channels_last: o.ChannelsLast = False,
    every: o.Every = 1,
    output: o.Output = None,
    json: o.Json = False,
) -> None:
    """Train a model and measure how often weight decay pushes the wrong way (R_op, Eq. 10-11)."""
    given = {name: value for name, value in locals().items() if name != "json"}
    from . import render

    render.show_warnings()
    with render.loading():
        from wd_probe.experiments.rop import RopOptions, measure
        from wd_probe.experiments.runs import dumps

    with render.TrainingProgress() as progress:
        summary = measure(RopOptions(**given), progress)
    if json:
        render.to_stdout(dumps(summary))
    else:
        render.rop_summary(summary)
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
