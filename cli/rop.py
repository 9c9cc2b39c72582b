"""`wdprobe rop`."""

import typer

from . import options as o


def rop(
    ctx: typer.Context,
    model: o.Model = "convnext_tiny",
    pretrained: o.Pretrained = False,
    checkpoint: o.Checkpoint = None,
    img_size: o.ImgSize = 32,
    dataset: o.Dataset = "digits",
    data_dir: o.DataDir = None,
    dataset_download: o.DatasetDownload = False,
    hflip: o.Hflip = None,
    opt: o.Opt = "adamw",
    opt_kwargs: o.OptKwargs = None,
    lr: o.Lr = None,
    weight_decay: o.WeightDecay = 0.01,
    momentum: o.Momentum = 0.9,
    method: o.MethodOption = o.Method.own,
    scale: o.LayerScale = None,
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
    torchcompile: o.TorchCompile = False,
    every: o.Every = 1,
    output: o.Output = None,
    recovery_interval: o.RecoveryInterval = None,
    resume: o.Resume = None,
    json: o.Json = False,
) -> None:
    """Train a model and measure how often weight decay pushes the wrong way (R_op, Eq. 10-11)."""
    given = {name: value for name, value in locals().items() if name != "ctx"}
    from . import training

    training.run("rop", ctx, given)
