"""Options that several commands share, named as timm names them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cuda = "cuda"
    mps = "mps"
    cpu = "cpu"


class Method(StrEnum):
    """Whose weight decay."""

    own = "own"
    baseline = "baseline"
    l1 = "l1"
    l2 = "l2"
    wd = "wd"
    rwd = "rwd"
    pwd = "pwd"
    lpwd = "lpwd"


class Convention(StrEnum):
    """What c is."""

    lr_rate = "lr*rate"
    rate = "rate"


class Scale(StrEnum):
    """How layer-wise rates rise."""

    eq9 = "eq9"
    max2 = "max2"
    mean = "mean"


class By(StrEnum):
    """What is decayed one at a time."""

    none = "none"
    layer = "layer"
    kind = "kind"


class AmpDtype(StrEnum):
    """Autocast precision."""

    bfloat16 = "bfloat16"
    float16 = "float16"


_MODEL, _DATA, _TRAINING, _OUTPUT = "Model", "Data", "Training", "Output"


def listed(text: str | None) -> tuple[str, ...]:
    """The parts of a comma-separated option."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def numbers(flag: str, text: str | None) -> tuple[float, ...]:
    """The numbers of a comma-separated option."""
    try:
        return tuple(float(part) for part in listed(text))
    except ValueError as error:
        from wd_probe.errors import InputError

        raise InputError(f"{flag} takes numbers with commas between, got {text!r}") from error


Model = Annotated[str, typer.Option("--model", help="A timm model.", rich_help_panel=_MODEL)]
Pretrained = Annotated[
    bool,
    typer.Option("--pretrained", help="timm's weights from the hub.", rich_help_panel=_MODEL),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Weights from a safetensors or torch file.", rich_help_panel=_MODEL),
]
ImgSize = Annotated[int, typer.Option(help="Side of the square images.", rich_help_panel=_MODEL)]
Dataset = Annotated[
    str,
    typer.Option(help="digits, folder, or a timm name: torch/cifar100 ...", rich_help_panel=_DATA),
]
DataDir = Annotated[
    Path | None, typer.Option(help="Where the dataset lies.", rich_help_panel=_DATA)
]
DatasetDownload = Annotated[
    bool,
    typer.Option("--dataset-download", help="Let timm fetch the dataset.", rich_help_panel=_DATA),
]
Hflip = Annotated[
    float | None,
    typer.Option(
        help="Chance of a horizontal flip (default 0.5; 0 for digits).",
        rich_help_panel=_DATA,
        show_default=False,
    ),
]
ValSplit = Annotated[
    float,
    typer.Option(help="Share of the training images to validate on.", rich_help_panel=_DATA),
]
TrainSamples = Annotated[
    int | None, typer.Option(help="Train on so many images.", rich_help_panel=_DATA)
]
Opt = Annotated[str, typer.Option(help="A timm optimizer.", rich_help_panel=_TRAINING)]
OptKwargs = Annotated[
    list[str] | None,
    typer.Option(
        "--opt-kwargs",
        help="key=value for the optimizer, such as fused=True; repeatable.",
        rich_help_panel=_TRAINING,
        show_default=False,
    ),
]
Lr = Annotated[
    float | None,
    typer.Option(
        help="Learning rate η, constant (default 1e-4; 1e-2 for SGD).",
        rich_help_panel=_TRAINING,
        show_default=False,
    ),
]
WeightDecay = Annotated[float, typer.Option(help="Decay rate λ.", rich_help_panel=_TRAINING)]
Momentum = Annotated[float, typer.Option(help="For SGD and its kin.", rich_help_panel=_TRAINING)]
MethodOption = Annotated[
    Method,
    typer.Option(
        "--method",
        help="own: the optimizer's weight_decay; or a method of the paper, on any optimizer.",
        rich_help_panel=_TRAINING,
    ),
]
ConventionOption = Annotated[
    Convention,
    typer.Option(
        "--convention",
        help="What a step takes off: c = ηλ, or c = λ as Eq. 1 is printed (with --method wd).",
        rich_help_panel=_TRAINING,
    ),
]
_SCALE_HELP = "λ·i/n, 2λ·i/n (the paper's experiments), or 2λ·i/(n+1) whose mean is λ."
ScaleOption = Annotated[Scale, typer.Option("--scale", help=_SCALE_HELP)]
LayerScale = Annotated[
    Scale | None,
    typer.Option(
        "--scale",
        help=f"Layer-wise rates with any --method: {_SCALE_HELP}",
        rich_help_panel=_TRAINING,
        show_default=False,
    ),
]
FilterBiasAndBn = Annotated[
    bool,
    typer.Option(
        "--filter-bias-and-bn",
        help="Spare biases, norms and the model's own list, by timm's rule.",
        rich_help_panel=_TRAINING,
    ),
]
BatchSize = Annotated[int, typer.Option(help="Images in a step.", rich_help_panel=_TRAINING)]
Epochs = Annotated[int, typer.Option(help="Passes over the data.", rich_help_panel=_TRAINING)]
Steps = Annotated[
    int | None,
    typer.Option(help="Stop after so many steps, instead of --epochs.", rich_help_panel=_TRAINING),
]
Seed = Annotated[int, typer.Option(help="Of weights, order and flips.", rich_help_panel=_TRAINING)]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="Where to compute.", rich_help_panel=_TRAINING)
]
Amp = Annotated[bool, typer.Option("--amp", help="Mixed precision.", rich_help_panel=_TRAINING)]
AmpDtypeOption = Annotated[
    AmpDtype, typer.Option("--amp-dtype", help="With --amp.", rich_help_panel=_TRAINING)
]
ChannelsLast = Annotated[
    bool,
    typer.Option("--channels-last", help="Channels-last memory format.", rich_help_panel=_TRAINING),
]
TorchCompile = Annotated[
    bool, typer.Option("--torchcompile", help="torch.compile.", rich_help_panel=_TRAINING)
]
BothMoments = Annotated[
    bool,
    typer.Option(
        "--both-moments",
        help="Evaluate rwd before its decay too, and pwd after it.",
        rich_help_panel=_OUTPUT,
    ),
]
Every = Annotated[int, typer.Option(help="Measure every so-many-th step.", rich_help_panel=_OUTPUT)]
Resume = Annotated[
    Path | None,
    typer.Option(
        help="Go on with this killed or interrupted run, by its own options.",
        rich_help_panel=_OUTPUT,
        show_default=False,
    ),
]
RecoveryInterval = Annotated[
    int | None,
    typer.Option(
        help="Save the run's state every so many steps (default about once a minute); 0: never.",
        rich_help_panel=_OUTPUT,
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="Folder of this run (default under runs/).",
        rich_help_panel=_OUTPUT,
        show_default=False,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="One JSON object on stdout, the rest on stderr.", rich_help_panel=_OUTPUT
    ),
]
