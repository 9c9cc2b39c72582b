"""Training and evaluation of one model: a plain loop that the probe is attached to."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .. import ranks
from ..errors import InputError, WdProbeError, first_line, shown
from ..hooks import hooked
from ..probe.records import StepRecord
from .checkpoint import random_state, set_random_state
from .data import Batch, Batches, Data
from .recipe import Recipe

_HELD_BACK = 16  # steps whose numbers may wait on a device that runs ahead of the host


@dataclass(frozen=True, slots=True)
class Step:
    """One training step.

    Attributes:
        step: its number, from 1.
        epoch: from 1.
        loss: of its batch, or the mean of those that are gathered for it.
        lr: the live learning rate, the largest of all parameter groups.
        update: which call of ``optimizer.step()`` it made; None where `GradScaler` left it out.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    update: int | None


@dataclass(frozen=True, slots=True)
class Score:
    """An evaluation: share of right answers, in [0, 1], and mean cross-entropy."""

    top1: float
    loss: float


class Listener(Protocol):
    """Is told how a run goes."""

    def started(
        self, total_steps: int, folder: Path, data: Data, layer_count: int, done: int
    ) -> None:
        """Everything is ready; training begins, or continues after ``done`` steps."""

    def stepped(self, step: Step, record: StepRecord | None) -> None:
        """A step was trained, and measured unless ``record`` is None."""

    def scored(self, epoch: int, score: Score) -> None:
        """An epoch ended and was evaluated."""


def pick_device(name: str) -> torch.device:
    """The device for ``auto``, ``cuda``, ``cuda:1``, ``mps`` or ``cpu``.

    Raises:
        InputError: this machine does not have it.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in has.items() if there)
    if name == "cuda":
        name = ranks.own_gpu()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {shown(name)}; use auto, cuda, mps or cpu") from error
    if not has.get(device.type, False):
        raise InputError(f"device {name} is asked for, and this machine has none; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name} is asked for; there are {torch.cuda.device_count()} GPUs")
    return device


def autocast_dtype(amp: bool, name: str) -> torch.dtype | None:
    """What ``--amp`` and ``--amp-dtype`` compute in; None for full precision."""
    return getattr(torch, name) if amp else None


class Trainer:
    """Trains a model, one step after another.

    Args:
        model: on its device.
        optimizer: steps it.
        data: training batches, on the same device.
        amp_dtype: autocast to this dtype, or None for full precision; float16 scales the loss.
        recipe: what a step is beyond a plain one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        data: Batches,
        *,
        amp_dtype: torch.dtype | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.model, self.optimizer, self.data = model, optimizer, data
        self.amp_dtype, self.recipe = amp_dtype, recipe or Recipe()
        self.device = next(model.parameters()).device
        self.updates = 0
        self.steps = 0  # trained; the numbers of the last ones may not have been yielded
        self._epoch, self._batches = 0, 0  # the epoch begun last, and its batches trained
        self._start = self._now()
        self._resumed: dict[str, Any] | None = None
        hooked(optimizer).register_step_post_hook(self._count)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype is torch.float16)

    def _count(self, *_: Any) -> None:
        self.updates += 1

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that forward passes run in."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.amp_dtype)

    def epoch(self, number: int, first_step: int, max_steps: int) -> Iterator[Step]:
        """Train one epoch, or until step ``max_steps``; yields each step's numbers.

        On a device that runs ahead of the host, numbers are read some steps late and in one go.
        """
        held: list[tuple[Tensor, Step]] = []
        hold = 1 if self.device.type == "cpu" else _HELD_BACK
        self.model.train()
        batches = self._begin(number)
        for step in range(first_step, max_steps + 1):
            self.set_rates()
            loss = self._gathered(batches)
            if loss is None:
                break
            before = self.updates
            self._step()
            self.scaler.update()
            self.optimizer.zero_grad()
            self.steps = step
            if self.recipe.average is not None:
                self.recipe.average.update(self.model, step=step)
            update = self.updates if self.updates > before else None
            lr = max(float(group["lr"]) for group in self.optimizer.param_groups)
            held.append((loss, Step(step, number, math.nan, lr, update)))
            if len(held) >= hold:
                yield from self._read(held)
                held = []
        yield from self._read(held)

    def set_rates(self) -> None:
        """Set the learning rates of the next step."""
        if self.recipe.schedule is not None:
            whole = self._batches >= len(self.data)
            self.recipe.schedule(self._epoch if whole else self._epoch - 1, self.steps)

    def _gathered(self, batches: Iterator[Batch]) -> Tensor | None:
        """The mean loss of the batches of a step, their gradients taken; None if none is left."""
        count = max(1, min(self.recipe.accumulate, len(self.data) - self._batches))
        losses: list[Tensor] = []
        for images, labels in itertools.islice(batches, count):
            last = len(losses) + 1 == count
            with contextlib.nullcontext() if last else self._apart():
                losses.append(self._backward(images, labels, count))
            self._batches += 1
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0] if losses else None

    def _apart(self) -> contextlib.AbstractContextManager[Any]:
        """Gradients that need not be those of all processes yet."""
        return getattr(self.model, "no_sync", contextlib.nullcontext)()

    def _backward(self, images: Tensor, labels: Tensor, count: int) -> Tensor:
        recipe = self.recipe
        if recipe.mix is not None:
            images, labels = recipe.mix(images, labels, self._epoch)
        with self.autocast():
            loss = recipe.loss(self.model(images), labels)
        self.scaler.scale(loss / count if count > 1 else loss).backward()
        return loss.detach()

    def _step(self) -> None:
        """One step of the optimizer, whose first shows whether it takes gradients as they are."""
        if self.recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.recipe.clip()
        try:
            self.scaler.step(self.optimizer)
        except (WdProbeError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self.updates or ranks.size() > 1:
                raise
            raise InputError(
                f"{type(self.optimizer).__name__} cannot step here ({first_line(error)}): it is "
                "given dense gradients without a graph, and no closure; choose another --opt"
            ) from error

    def _begin(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch, or those that are left of it in a resumed run."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None and number == self._epoch:
            self._set(self._start)
            batches = self.data.batches(self._batches)
            set_random_state(resumed["random"])
            ranks.draw_apart()
            return batches
        if resumed is not None:
            self._set(resumed)
            ranks.draw_apart()
        self._epoch, self._batches = number, 0
        self._start = self._now()
        return self.data.batches()

    @contextlib.contextmanager
    def ahead(self, images: int) -> Iterator[Iterator[Batch]]:
        """So many training images or a few more, in batches; the next epoch is drawn as ever."""
        where = self._now()
        try:
            yield self._first(images)
        finally:
            self._set(where)

    def _first(self, images: int) -> Iterator[Batch]:
        for batch in self.data.batches():
            yield batch
            images -= len(batch[1]) * ranks.size()
            if images <= 0:
                return

    def _now(self) -> dict[str, Any]:
        return {"random": random_state(), "data": self.data.state_dict()}

    def _set(self, state: dict[str, Any]) -> None:
        self.data.load_state_dict(state["data"])
        set_random_state(state["random"])

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: random state, data order, place in the epoch, loss scale, updates.

        Of use where the step last trained is the one last yielded. Model and optimizer have states
        of their own.
        """
        return {
            "updates": self.updates,
            "steps": self.steps,
            "epoch": self._epoch,
            "batches": self._batches,
            "start": self._start,
            "now": self._now(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken: the same epoch's :meth:`epoch` trains what is left."""
        self.updates, self.steps = int(state["updates"]), int(state["steps"])
        self._epoch, self._batches = int(state["epoch"]), int(state["batches"])
        self._start, self._resumed = state["start"], state["now"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        for where in (self._start, self._resumed):  # found out here, if it cannot be
            self._set(where)

    @staticmethod
    def _read(held: list[tuple[Tensor, Step]]) -> Iterator[Step]:
        if held:
            losses = ranks.total(torch.stack([loss.float() for loss, _ in held])) / ranks.size()
            for (_, step), loss in zip(held, losses.tolist(), strict=True):
                yield replace(step, loss=loss)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Iterable[Batch],
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Score:
    """Top-1 and loss over the data, in evaluation mode; the model's mode is put back.

    Every process evaluates its part of each batch, and all have the score of the whole.
    """
    was_training = model.training
    model.eval()
    sums = []  # of each batch: right answers, loss, images
    try:
        for images, labels in data:
            with autocast():
                logits = model(images).float()
            right = (logits.argmax(1) == labels).sum()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums.append(torch.stack([right, loss, torch.full_like(loss, len(labels))]))
    finally:
        model.train(was_training)
    whole = torch.stack(sums).cpu().double().sum(0) if sums else torch.zeros(3).double()
    right, loss, count = ranks.total(whole).tolist()
    return Score(right / count, loss / count) if count else Score(math.nan, math.nan)
