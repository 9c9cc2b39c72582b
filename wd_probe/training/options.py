"""What decides a run: each option once, for the command line, grid files and ``config.json``."""

import ast
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from ..arguments import check_choice
from ..choices import METHODS, AmpDtype, By, Convention, Device, Scale
from ..errors import InputError, near_names, shown
from . import recipe_options as recipe
from .option import (
    AT_LEAST_0,
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    Option,
    check_options,
    check_probability,
    check_share,
    options_in,
)

#: What does not change a run's result, or only where it lies.
ELSEWHERE = (
    "output", "device", "data_dir", "dataset_download", "recovery_interval", "log_wandb",
)  # fmt: skip
#: The learning rates of the paper's base settings (Table 2).
_SGD_LIKE = ("sgd", "momentum", "sgdp", "nesterov")


def _amp_dtype(value: str, what: str) -> None:
    if value not in get_args(AmpDtype):
        raise InputError(f"{what} must be {' or '.join(get_args(AmpDtype))}, got {shown(value)}")


def _wandb(wanted: bool, what: str) -> None:
    if wanted and importlib.util.find_spec("wandb") is None:
        raise InputError(f"{what} needs wandb, which is not installed: pip install wandb")


def _by(value: str, what: str) -> None:
    if value not in get_args(By):
        raise InputError(f"{what} must be one of {', '.join(get_args(By))}, got {shown(value)}")


# --- keyword arguments of an optimizer ------------------------------------------------------------


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["betas=(0.9, 0.95)", "nesterov=True"]`` as keyword arguments.

    Raises:
        InputError: one that is not ``key=value``.
    """
    parsed = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--opt-kwargs wants key=value, got {shown(pair)}")
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            parsed[key] = value
    return parsed


def keywords(pairs: Sequence[str]) -> str:
    """The same as one text, which ``parse_options(text.split())`` reads."""
    parsed = parse_options(pairs).items()
    return " ".join(f"{key}={value!r}".replace(" ", "") for key, value in parsed)


# --- the options ----------------------------------------------------------------------------------

MODEL, DATA, TRAINING, OUTPUT = "Model", "Data", "Training", "Output"
SCALE_HELP = (
    "λ·i/n, 2λ·i/n (the paper's experiments), 2λ·i/(n+1) whose mean is λ, or 2λ·i/n in reverse."
)

# Those of several commands.
ModelName = Annotated[str, Option("A timm model.", MODEL)]
Pretrained = Annotated[bool, Option("timm's weights from the hub.", MODEL)]
Checkpoint = Annotated[Path | None, Option("Weights from a safetensors or torch file.", MODEL)]
ImgSize = Annotated[int, Option("Side of the square images.", MODEL, AT_LEAST_1)]
Dataset = Annotated[str, Option("digits, folder, or a timm name: torch/cifar100 ...", DATA)]
DataDir = Annotated[Path | None, Option("Where the dataset lies.", DATA)]
DatasetDownload = Annotated[bool, Option("Let timm fetch the dataset.", DATA)]
Opt = Annotated[
    str, Option("A timm optimizer, or the dotted path of a class: torch.optim.SGD.", TRAINING)
]
WeightDecay = Annotated[float, Option("Decay rate λ.", TRAINING, NOT_NEGATIVE)]
FilterBiasAndBn = Annotated[
    bool, Option("Spare biases, norms and the model's own list, by timm's rule.", TRAINING)
]
BatchSize = Annotated[int, Option("Images in a step.", TRAINING, AT_LEAST_1)]
Epochs = Annotated[int, Option("Passes over the data.", TRAINING, AT_LEAST_1)]
Seed = Annotated[int, Option("Of weights, order and flips.", TRAINING)]
DeviceName = Annotated[str, Option("Where to compute.", TRAINING, choices=get_args(Device))]
Amp = Annotated[bool, Option("Mixed precision.", TRAINING)]
AmpDtypeName = Annotated[str, Option("With --amp.", TRAINING, _amp_dtype, get_args(AmpDtype))]
ChannelsLast = Annotated[bool, Option("Channels-last memory format.", TRAINING)]
TorchCompile = Annotated[bool, Option("torch.compile.", TRAINING)]
Output = Annotated[Path | None, Option("Folder of this run (default under runs/).", OUTPUT)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Everything that decides a run of `wdprobe train` or `wdprobe rop`.

    ``method`` is "own" for the optimizer's own ``weight_decay``, else a method of
    :class:`wd_probe.WeightDecay`. ``lr`` None takes the paper's base rate: 0.01 for SGD, else
    0.0001. ``opt_kwargs`` are more of the optimizer's own: ``"fused=True betas=(0.9,0.95)"``.
    ``steps`` None trains ``epochs`` whole epochs. ``every`` 0 measures nothing.
    """

    command: str = "train"
    model: ModelName = "convnext_tiny"
    pretrained: Pretrained = False
    checkpoint: Checkpoint = None
    img_size: ImgSize = 32
    dataset: Dataset = "digits"
    data_dir: DataDir = None
    dataset_download: DatasetDownload = False
    hflip: Annotated[
        float | None,
        Option("Chance of a horizontal flip (default 0.5; 0 for digits).", DATA, check_probability),
    ] = None
    val_split: Annotated[
        float, Option("Share of the training images to validate on.", DATA, check_share)
    ] = 0.0
    train_samples: Annotated[int | None, Option("Train on so many images.", DATA, AT_LEAST_1)] = (
        None
    )
    opt: Opt = "adamw"
    opt_kwargs: Annotated[
        str,
        Option(
            "key=value for the optimizer, such as fused=True; repeatable.",
            TRAINING,
            joined=keywords,
        ),
    ] = ""
    lr: Annotated[
        float | None,
        Option("Learning rate η (default 1e-4; 1e-2 for SGD).", TRAINING, POSITIVE),
    ] = None
    weight_decay: WeightDecay = 0.01
    momentum: Annotated[float, Option("For SGD and its kin.", TRAINING, NOT_NEGATIVE)] = 0.9
    method: Annotated[
        str,
        Option(
            "own: the optimizer's weight_decay; or a method of the paper, on any optimizer.",
            TRAINING,
            choices=("own", *METHODS),
        ),
    ] = "own"
    scale: Annotated[
        Scale | None, Option(f"Layer-wise rates with any --method: {SCALE_HELP}", TRAINING)
    ] = None
    convention: Annotated[
        Convention,
        Option(
            "What a step takes off: c = ηλ, or c = λ as Eq. 1 is printed (with --method wd).",
            TRAINING,
        ),
    ] = "lr*rate"
    filter_bias_and_bn: FilterBiasAndBn = False
    batch_size: BatchSize = 64
    epochs: Epochs = 4
    steps: Annotated[
        int | None,
        Option("Stop after so many steps, instead of --epochs.", TRAINING, AT_LEAST_1),
    ] = None
    val_interval: Annotated[
        int, Option("Evaluate every so many epochs, and after the last.", TRAINING, AT_LEAST_1)
    ] = 1
    update_bn: recipe.UpdateBn = False
    sched: recipe.Sched = "none"
    sched_on_updates: recipe.SchedOnUpdates = False
    warmup_epochs: recipe.WarmupEpochs = None
    warmup_lr: recipe.WarmupLr = None
    min_lr: recipe.MinLr = None
    decay_epochs: recipe.DecayEpochs = None
    decay_rate: recipe.DecayRate = None
    decay_milestones: recipe.DecayMilestones = None
    patience_epochs: recipe.PatienceEpochs = None
    layer_decay: recipe.LayerDecay = None
    clip_grad: recipe.ClipGrad = None
    clip_mode: recipe.ClipMode = "norm"
    grad_accum_steps: recipe.GradAccumSteps = 1
    smoothing: recipe.Smoothing = 0.0
    mixup: recipe.Mixup = 0.0
    cutmix: recipe.Cutmix = 0.0
    mixup_off_epoch: recipe.MixupOffEpoch = 0
    aa: recipe.AutoAugment = None
    model_ema: recipe.ModelEma = False
    model_ema_decay: recipe.ModelEmaDecay = 0.9998
    model_ema_warmup: recipe.ModelEmaWarmup = False
    every: Annotated[int, Option("Measure every so-many-th step.", OUTPUT, AT_LEAST_0)] = 0
    both_moments: Annotated[
        bool, Option("Evaluate rwd before its decay too, and pwd after it.", OUTPUT)
    ] = False
    seed: Seed = 0
    device: DeviceName = "auto"
    amp: Amp = False
    amp_dtype: AmpDtypeName = "bfloat16"
    channels_last: ChannelsLast = False
    torchcompile: TorchCompile = False
    output: Output = None
    recovery_interval: Annotated[
        int | None,
        Option(
            "Save the run's state every so many steps (default about once a minute); 0: never.",
            OUTPUT,
            AT_LEAST_0,
        ),
    ] = None
    log_wandb: Annotated[bool, Option("Log it to Weights & Biases too.", OUTPUT, _wandb)] = False

    def __post_init__(self) -> None:
        check_options(self)
        if self.command == "rop" and self.every == 0:
            raise InputError("--every must be at least 1, got 0")
        parse_options(self.opt_kwargs.split())
        self._check_method()
        recipe.check_recipe(self)

    def _check_method(self) -> None:
        check_choice(self.method, "method", ("own", *METHODS))
        if self.command == "rop" and (self.weight_decay == 0 or self.method == "baseline"):
            raise InputError(
                "nothing would be penalized, so R_op is undefined; give --weight-decay above 0 "
                "and a method that decays"
            )
        if self.method == "own" and (self.convention == "rate" or self.scale is not None):
            raise InputError(
                "an optimizer's own weight_decay takes off lr*rate, the same from every layer; "
                "--convention rate and --scale need a --method"
            )
        taken = self.weight_decay * (1 if self.convention == "rate" else self.learning_rate)
        if taken >= 1 and self.method not in ("baseline", "l1", "l2"):
            raise InputError(
                f"a step would take off {taken:g} times the weight (--weight-decay "
                f"{self.weight_decay:g}, --lr {self.learning_rate:g}); it must be less than 1"
            )

    def check_moments(self, *methods: str) -> None:
        """Refuse to read a trajectory twice that has one moment.

        Args:
            methods: those of the runs, if not this one's.

        Raises:
            InputError: none of the methods is rwd, pwd or lpwd.
        """
        methods = methods or (self.method,)
        if self.both_moments and not {"rwd", "pwd", "lpwd"} & {*methods}:
            raise InputError(
                "--both-moments is for rwd, pwd and lpwd, whose decay can be read as yet to come; "
                f"{', '.join(methods)} has one moment"
            )

    @property
    def learning_rate(self) -> float:
        """``lr``, or the paper's base rate for this optimizer."""
        return self.lr or (0.01 if self.opt.rpartition(".")[2].lower() in _SGD_LIKE else 1e-4)

    def hparams(self) -> dict[str, Any]:
        """What TensorBoard's HParams tab compares runs by."""
        names = ("model", "dataset", "opt", "method", "lr", "weight_decay", "batch_size", "seed")
        found = {name: getattr(self, name) for name in names} | {"lr": self.learning_rate}
        return found | recipe.chosen(self)


#: Options younger than the first runs on disk.
_YOUNGER = ("val_interval", *recipe.NAMES, "log_wandb")


def assumed() -> dict[str, Any]:
    """What runs were told by versions that did not have these options, as their defaults say."""
    return {f.name: f.default for f in fields(TrainOptions) if f.name in _YOUNGER}


_SCAN = "Scan"


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroshotOptions:
    """Everything that decides a scan of `wdprobe zeroshot`.

    The model and its weights come from ``run``, ``checkpoint`` or ``pretrained``; without any of
    them the paper's Baseline (no decay) is trained first. ``img_size`` None is the run's own size,
    the model's own for a checkpoint, else 32. ``torchcompile`` is of the training and of passes of
    the whole model; those by parts and those that measure distortion hook into the model and are
    not compiled.
    """

    model: str = "convnext_tiny"
    run: Path | None = None
    pretrained: Pretrained = False
    checkpoint: Checkpoint = None
    reset_head: Annotated[
        bool, Option("Let the classifier be untrained where the checkpoint's does not fit.", MODEL)
    ] = False
    img_size: Annotated[
        int | None,
        Option(
            "Side of the square images (default that of the run, else the model's own; 32 where "
            "there are no weights).",
            MODEL,
            AT_LEAST_1,
        ),
    ] = None
    images: Annotated[Path | None, Option("Unlabelled pictures, instead of --dataset.", DATA)] = (
        None
    )
    dataset: Dataset = "digits"
    data_dir: DataDir = None
    dataset_download: DatasetDownload = False
    num_samples: Annotated[
        int | None, Option("Evaluate on the first so many.", DATA, AT_LEAST_1)
    ] = None
    steps: Annotated[int, Option("Steps from 1 to 0.", _SCAN, AT_LEAST_1)] = 100
    by: Annotated[By, Option("Also one part at a time.", _SCAN, _by)] = "none"
    by_steps: Annotated[int, Option("Steps from 1 to 0 for each part.", _SCAN, AT_LEAST_1)] = 10
    distortion: Annotated[bool, Option("Also the layers' feature distortion.", _SCAN)] = True
    update_bn: Annotated[
        bool, Option("At each scale take batch norm's statistics anew from these images.", _SCAN)
    ] = False
    opt: Opt = "adam"
    lr: Annotated[float, Option("Learning rate η.", TRAINING, POSITIVE)] = 1e-4
    epochs: Epochs = 4
    batch_size: BatchSize = 64
    seed: Seed = 0
    device: DeviceName = "auto"
    amp: Amp = False
    amp_dtype: AmpDtypeName = "bfloat16"
    channels_last: ChannelsLast = False
    torchcompile: TorchCompile = False
    output: Output = None

    def __post_init__(self) -> None:
        check_options(self)
        given = [self.run is not None, self.checkpoint is not None, self.pretrained]
        if sum(given) > 1:
            raise InputError("--run, --checkpoint and --pretrained exclude each other")
        if self.update_bn and self.by != "none":
            raise InputError("--update-bn is for the model as a whole; leave out --by")


# --- values from files ----------------------------------------------------------------------------

_KINDS: Mapping[type, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path",
}  # fmt: skip


def typed(name: str, value: Any) -> Any:
    """A value from a file as :class:`TrainOptions` hold it; a list becomes a tuple of such.

    Raises:
        InputError: an unknown name, or a value of the wrong kind.
    """
    known = options_in(TrainOptions)
    if name not in known:
        raise InputError(f"unknown key {shown(name)}{near_names(name, [*known, 'seeds'])}")
    if isinstance(value, range):
        return value
    if isinstance(value, list | tuple):
        return tuple(fitted(name, item, known[name][0]) for item in value)
    return fitted(name, value, known[name][0])


def fitted(name: str, value: Any, hint: Any) -> Any:
    """A value as its type holds it; a text may stand for a number.

    Raises:
        InputError: it is of another kind.
    """
    kind, *nothing = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and nothing:
        return None
    try:
        if isinstance(value, bool | bytes) and kind is not bool:
            raise ValueError("pydantic takes them for numbers")
        return _adapter(kind).validate_python(value)
    except ValueError as error:
        must = _KINDS.get(kind) or f"one of {', '.join(get_args(kind))}"
        raise InputError(f"{name} must be {must}, got {shown(value)}") from error


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import Field, TypeAdapter  # not loaded where nothing is read

    exact = Field(strict=True)
    more = {int: Field(gt=-(2**63), lt=2**63), bool: exact, str: exact}.get(kind)
    return TypeAdapter(kind if more is None else Annotated[kind, more])
