"""The options of timm's training recipe, by timm's names; as they stand, none of it is at work."""

import itertools
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, get_args

from ..choices import ClipMode as ClipModeName
from ..choices import Schedule
from ..errors import InputError, near_names, shown, shown_line
from .option import AT_LEAST_0, AT_LEAST_1, NOT_NEGATIVE, POSITIVE, Option, check_share

SCHEDULE, RECIPE = "Schedule", "Recipe"


def _schedule(value: str, what: str) -> None:
    known = get_args(Schedule)
    if value not in known:
        near = near_names(value, known)
        raise InputError(f"{what} must be one of {', '.join(known)}, got {shown(value)}{near}")


def milestones(text: str | None) -> tuple[float, ...]:
    """``"30,60"`` as numbers.

    Raises:
        InputError: they are none, or do not rise.
    """
    try:
        found = tuple(float(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        found = (0.0,)
    if not all(a < b for a, b in itertools.pairwise((0.0, *found))):
        raise InputError(
            f"--decay-milestones takes rising epochs with commas between, got {shown(text)}"
        )
    return found


Sched = Annotated[
    str, Option(f"Of η, after timm: {', '.join(get_args(Schedule))}.", SCHEDULE, _schedule)
]
SchedOnUpdates = Annotated[bool, Option("Move η at every step, not every epoch.", SCHEDULE)]
WarmupEpochs = Annotated[
    float | None,
    Option("Epochs in which η first rises from --warmup-lr (default 0).", SCHEDULE, NOT_NEGATIVE),
]
WarmupLr = Annotated[
    float | None, Option("Where warm-up begins (default 1e-5).", SCHEDULE, NOT_NEGATIVE)
]
MinLr = Annotated[
    float | None,
    Option("The least of cosine, tanh, poly, wsd, rsqrt, plateau (default 0).", SCHEDULE,
           NOT_NEGATIVE),
]  # fmt: skip
DecayEpochs = Annotated[
    float | None,
    Option(
        "step: epochs from fall to fall (default 90). wsd, rsqrt: those of the decline, or their "
        "share (default 0.2).",
        SCHEDULE,
        POSITIVE,
    ),
]
DecayRate = Annotated[
    float | None,
    Option("What a fall leaves of η; with poly the power (default 0.1).", SCHEDULE, POSITIVE),
]
DecayMilestones = Annotated[
    str | None, Option("multistep: the epochs of its falls, such as 30,60.", SCHEDULE)
]
PatienceEpochs = Annotated[
    int | None,
    Option("plateau: epochs without a better top-1 ahead of a fall (default 10).", SCHEDULE,
           AT_LEAST_0),
]  # fmt: skip
LayerDecay = Annotated[
    float | None,
    Option("η of a layer is so much smaller than that of the next.", RECIPE, POSITIVE),
]
ClipGrad = Annotated[float | None, Option("Clip gradients to it.", RECIPE, POSITIVE)]
ClipMode = Annotated[
    str,
    Option(
        "By their norm, each by value, or adaptively (agc).", RECIPE, choices=get_args(ClipModeName)
    ),
]
GradAccumSteps = Annotated[
    int, Option("Batches whose gradients make one step.", RECIPE, AT_LEAST_1)
]
Smoothing = Annotated[float, Option("Of labels.", RECIPE, check_share)]
Mixup = Annotated[float, Option("α of mixup; 0: none.", RECIPE, NOT_NEGATIVE)]
Cutmix = Annotated[float, Option("α of cutmix; 0: none.", RECIPE, NOT_NEGATIVE)]
MixupOffEpoch = Annotated[
    int, Option("Mix in so many first epochs alone; 0: in all.", RECIPE, AT_LEAST_0)
]
AutoAugment = Annotated[
    str | None, Option("A policy of timm's: rand-m9-mstd0.5-inc1, augmix-m3-w3, 3a ...", RECIPE)
]
UpdateBn = Annotated[
    bool,
    Option(
        "Evaluate by batch norm statistics taken anew from training images, as torch's update_bn.",
        RECIPE,
    ),
]
ModelEma = Annotated[
    bool, Option("Keep a moving average of the weights, and evaluate that.", RECIPE)
]
ModelEmaDecay = Annotated[float, Option("What a step leaves of it.", RECIPE, check_share)]
ModelEmaWarmup = Annotated[bool, Option("Let --model-ema-decay rise from 0.", RECIPE)]

_OF_A_SCHEDULE = (
    "sched_on_updates", "warmup_epochs", "warmup_lr", "min_lr", "decay_epochs", "decay_rate",
    "decay_milestones", "patience_epochs",
)  # fmt: skip
#: What has no meaning without another option.
NEEDS = {
    **dict.fromkeys(_OF_A_SCHEDULE, "sched"),
    "clip_mode": "clip_grad",
    "model_ema_decay": "model_ema",
    "model_ema_warmup": "model_ema",
}
#: The options of a recipe.
NAMES = (
    "update_bn", "sched", *_OF_A_SCHEDULE, "layer_decay", "clip_grad", "clip_mode",
    "grad_accum_steps", "smoothing", "mixup", "cutmix", "mixup_off_epoch", "aa", "model_ema",
    "model_ema_decay", "model_ema_warmup",
)  # fmt: skip


def defaults(options: Any) -> dict[str, Any]:
    """Of the recipe, by name: that of a run which has none."""
    return {field.name: field.default for field in fields(options) if field.name in NAMES}


def chosen(options: Any) -> dict[str, Any]:
    """What of the recipe is at work, by name."""
    found = defaults(options)
    return {
        name: value for name, usual in found.items() if (value := getattr(options, name)) != usual
    }


def told(found: Mapping[str, Any]) -> str:
    """What is :func:`chosen`, for a person."""
    return ", ".join(
        name.replace("_", " ") + ("" if value is True else f" {shown_line(value, 40)}")
        for name, value in found.items()
    )


def check_recipe(options: Any) -> None:
    """Refuse a recipe whose parts do not fit each other.

    Raises:
        InputError: they do not.
    """
    found = chosen(options)
    for name in found:
        needed = NEEDS.get(name)
        if needed is not None and needed not in found:
            such = " other than none" if needed == "sched" else ""
            raise InputError(f"{_flag(name)} needs {_flag(needed)}{such}")
    _check_rates(options)
    if (options.mixup or options.cutmix) and options.batch_size % 2:
        raise InputError(
            f"--mixup and --cutmix mix pairs of images; --batch-size {options.batch_size} is odd"
        )
    if options.mixup_off_epoch and not (options.mixup or options.cutmix):
        raise InputError("--mixup-off-epoch needs --mixup or --cutmix")
    if options.sched == "plateau" and options.both_moments:
        raise InputError(
            "--both-moments needs the next step's η, which --sched plateau tells after it alone; "
            "leave one out"
        )
    if options.model_ema and options.both_moments:
        raise InputError(
            "--both-moments evaluates the trained weights, --model-ema their average; leave one out"
        )


def _check_rates(options: Any) -> None:
    for name in ("warmup_lr", "min_lr"):
        value = getattr(options, name)
        if value is not None and value > options.learning_rate:
            raise InputError(f"{_flag(name)} {value:g} is above --lr {options.learning_rate:g}")
    if options.layer_decay is not None and options.layer_decay > 1:
        raise InputError(f"--layer-decay must be at most 1, got {options.layer_decay:g}")
    if options.warmup_epochs and options.steps is None and options.warmup_epochs >= options.epochs:
        raise InputError(
            f"--warmup-epochs {options.warmup_epochs:g} leaves nothing of --epochs {options.epochs}"
        )
    if options.sched == "rsqrt" and not options.warmup_epochs:
        raise InputError("--sched rsqrt needs --warmup-epochs, by which it falls")
    if (options.sched == "multistep") != bool(milestones(options.decay_milestones)):
        raise InputError("--sched multistep and --decay-milestones need each other")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
