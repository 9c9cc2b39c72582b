"""timm's training recipe, by timm's own code: what it adds to a plain loop."""

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import model_parameters
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..errors import InputError, WdProbeWarning, first_line
from .data import Batch
from .options import TrainOptions
from .recipe_options import milestones

#: Of timm's own training script; its epochs of a decline are those of its factory.
_FALLS = {"step": 90.0, "wsd": 0.2, "rsqrt": 0.2}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a training step is, beyond a plain one.

    Attributes:
        loss: of outputs and targets.
        mix: images and labels as they are trained on in an epoch, from 1; the labels soft.
        clip: the gradients, in place.
        accumulate: batches whose gradients make one step.
        schedule: is told the epochs and steps that are done, and sets the rates of the next step.
        plateau: is told the epochs that are done and what the last one scored, and sets the rates.
        average: of the weights.
    """

    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    mix: Callable[[Tensor, Tensor, int], Batch] | None = None
    clip: Callable[[], None] | None = None
    accumulate: int = 1
    schedule: Callable[[int, int], None] | None = None
    plateau: PlateauLRScheduler | None = None
    average: ModelEmaV3 | None = None


def average_of(options: TrainOptions, model: nn.Module) -> ModelEmaV3 | None:
    """A moving average of the weights, if one is asked for; take it before hooks are on them."""
    if not options.model_ema:
        return None
    return ModelEmaV3(model, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)


def recipe(
    options: TrainOptions,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    classes: int,
    updates: int,
    total: int,
    average: ModelEmaV3 | None,
) -> Recipe:
    """The recipe of a run.

    Args:
        options: of the run.
        model: that is trained, as it is, without what wraps it.
        optimizer: whose rates the schedule sets.
        classes: of the labels.
        updates: steps in an epoch.
        total: steps in the run.
        average: see :func:`average_of`.

    Raises:
        InputError: timm has no such schedule, or refuses its options.
    """
    made = _scheduler(options, optimizer, updates, total)
    plateau = made if isinstance(made, PlateauLRScheduler) else None
    return Recipe(
        _loss(options),
        _mix(options, classes),
        _clip(options, model),
        options.grad_accum_steps,
        None if made is None or plateau is not None else partial(_rates_after, made),
        plateau,
        average,
    )


def seed_augmentations(seed: int) -> None:
    """Seed what timm's augmentations draw from, as a module may too when it is imported."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


def scale_rates(optimizer: Optimizer) -> None:
    """Give every parameter group its own η, where timm's layer decay has set an ``lr_scale``."""
    for group in optimizer.param_groups:
        if "lr_scale" in group:
            group["initial_lr"] = group["lr"]  # from which timm's schedules take their own
            group["lr"] = group["lr"] * group["lr_scale"]


def _loss(options: TrainOptions) -> Callable[[Tensor, Tensor], Tensor]:
    found: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    if options.mixup or options.cutmix:
        found = SoftTargetCrossEntropy()
    elif options.smoothing:
        found = LabelSmoothingCrossEntropy(options.smoothing)
    return found


def _mix(options: TrainOptions, classes: int) -> Callable[[Tensor, Tensor, int], Batch] | None:
    if not (options.mixup or options.cutmix):
        return None
    from timm.data import Mixup

    mixed = Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        label_smoothing=options.smoothing,
        num_classes=classes,
    )

    def mix(images: Tensor, labels: Tensor, epoch: int) -> Batch:
        if len(images) % 2:
            raise InputError(
                f"--mixup and --cutmix mix pairs of images; a process has {len(images)} in a batch"
            )
        mixed.mixup_enabled = not options.mixup_off_epoch or epoch <= options.mixup_off_epoch
        found: Batch = mixed(images, labels)
        return found

    return mix


def _clip(options: TrainOptions, model: nn.Module) -> Callable[[], None] | None:
    if options.clip_grad is None:
        return None
    parameters = list(model_parameters(model, exclude_head=options.clip_mode == "agc"))
    return partial(dispatch_clip_grad, parameters, options.clip_grad, mode=options.clip_mode)


def _scheduler(
    options: TrainOptions, optimizer: Optimizer, updates: int, total: int
) -> Scheduler | None:
    if options.sched == "none":
        return None
    is_constant = options.sched == "constant"  # as newer timm makes it
    epochs = total / updates
    warmup_lr = min(1e-5, options.learning_rate) if options.warmup_lr is None else options.warmup_lr
    given: dict[str, Any] = {
        "sched": "step" if is_constant else options.sched,
        "num_epochs": epochs if options.sched_on_updates else -(-total // updates),
        "warmup_epochs": options.warmup_epochs or 0,
        "warmup_lr": warmup_lr,
        "min_lr": options.min_lr or 0.0,
        "decay_epochs": options.decay_epochs or _FALLS.get(options.sched, 90.0),
        "decay_milestones": milestones(options.decay_milestones),
        "patience_epochs": 10 if options.patience_epochs is None else options.patience_epochs,
        "decay_rate": 1.0 if is_constant else options.decay_rate or 0.1,
        "step_on_epochs": not options.sched_on_updates,
        "updates_per_epoch": updates,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of plateau, whose state is kept here
            made, _ = create_scheduler_v2(optimizer, **given)
    except Exception as error:
        raise InputError(f"--sched {options.sched}: {first_line(error)}") from error
    if made is None:
        raise InputError(f"--sched {options.sched} is not in this version of timm; update it")

    if total <= updates and not options.sched_on_updates:
        warnings.warn(
            f"--sched {options.sched} moves the learning rate from epoch to epoch, and the run has "
            "only one"
            + (
                ""
                if options.sched == "plateau"
                else "; --sched-on-updates moves it from step to step"
            ),
            WdProbeWarning,
            stacklevel=2,
        )
    return made


def _rates_after(made: Scheduler, epochs: int, steps: int) -> None:
    if epochs:  # timm's script steps it after the first, which goes by the rates it begins with
        made.step(epochs)
    if steps:
        made.step_update(steps)
