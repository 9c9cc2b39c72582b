"""`wdprobe train`."""

from typing import Annotated

import typer

from . import options as o


def train(
    ctx: typer.Context,
    model: o.Model = "convnext_tiny",
    pretrained: o.Pretrained = False,
    checkpoint: o.Checkpoint = None,
    img_size: o.ImgSize = 32,
    dataset: o.Dataset = "digits",
    data_dir: o.DataDir = None,
    dataset_download: o.DatasetDownload = False,
    hflip: o.Hflip = None,
    val_split: o.ValSplit = 0.0,
    train_samples: o.TrainSamples = None,
    opt: o.Opt = "adam",
    opt_kwargs: o.OptKwargs = None,
    lr: o.Lr = None,
    weight_decay: o.WeightDecay = 0.01,
    momentum: o.Momentum = 0.9,
    method: o.MethodOption = o.Method.lpwd,
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
    every: Annotated[
        int,
        typer.Option(
            help="Measure R_op at every so-many-th step; 0: never.", rich_help_panel="Output"
        ),
    ] = 0,
    both_moments: o.BothMoments = False,
    output: o.Output = None,
    recovery_interval: o.RecoveryInterval = None,
    resume: o.Resume = None,
    json: o.Json = False,
) -> None:
    """Train a model with a decay method of the paper (Algorithms 1-3) and keep the checkpoint."""
    given = {name: value for name, value in locals().items() if name != "ctx"}
    from . import training

    training.run("train", ctx, given)
