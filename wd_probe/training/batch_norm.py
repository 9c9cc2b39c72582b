"""Batch norm's running statistics, by which models are evaluated: how far they lag, and anew."""

import contextlib
import itertools
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from .. import ranks
from ..errors import InputError, WdProbeWarning
from ..runs.findings import LITTLE
from ..wording import percent

if TYPE_CHECKING:
    from .data import Batch

#: So many training images are enough to take statistics from.
ENOUGH = 10_000
#: So many are asked how far the running ones lag.
ASKED = 512
_ADVICE = "`--update-bn` evaluates by statistics taken anew."

Autocast = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Lag:
    """How far running statistics are behind the weights.

    Attributes:
        images: of the training set, that were asked.
        running: share of them that is right with the running statistics.
        updated: the same with statistics taken anew from these images.
        variance: a running variance by one taken anew, median over all channels; above 1 where the
            weights have shrunk since.
    """

    images: int
    running: float
    updated: float
    variance: float

    def findings(self, *, decays: bool, updated: bool) -> list[str]:
        """What is to be told of it: a sentence or two, or nothing.

        Args:
            decays: whether the run has weight decay.
            updated: whether its own scores are by statistics taken anew.
        """
        if not self.updated - self.running > LITTLE:
            return []
        why = "The weights move faster than they follow."
        if self.variance > 1.01:
            what = "Decay shrinks the weights" if decays else "The weights shrink"
            why = (
                f"{what} faster than they follow: their variances are {self.variance:.2f} times "
                "too large, layer upon layer."
            )
        advice = "" if updated else f" {_ADVICE}"
        return [
            "Batch norm's running statistics lag behind the weights: by them "
            f"{percent(self.running, 1)} of {self.images:,} training images are right, by "
            f"statistics taken anew {percent(self.updated, 1)}. {why}{advice}"
        ]


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers that keep running statistics."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and layer.running_var is not None
    ]


def check_batch_norms(model: nn.Module, name: str) -> None:
    """Warn where there are no statistics that ``--update-bn`` could take anew."""
    if not batch_norms(model):
        warnings.warn(
            f"{name} has no batch norm with running statistics, so --update-bn changes nothing",
            WdProbeWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def updated(model: nn.Module, batches: Iterable["Batch"], autocast: Autocast) -> Iterator[None]:
    """Statistics as torch's ``update_bn`` takes them, within; after it those that stood.

    Args:
        model: whose statistics.
        batches: on its device; of several processes each has its part.
        autocast: the precision of the forward passes.

    Raises:
        InputError: no batch has two images.
    """
    held = [buffer for layer in batch_norms(model) for buffer in layer.buffers(recurse=False)]
    stood = [buffer.clone() for buffer in held]
    several = (batch for batch in batches if len(batch[1]) > 1)  # a single one has no variance
    try:
        if held:
            first = next(several, None)
            if first is None:
                raise InputError(
                    "batch norm's statistics are of two images or more, and no batch has as many: "
                    "give a larger --batch-size"
                )
            with autocast():
                update_bn(itertools.chain([first], several), model)
            ranks.settle(model)
        yield
    finally:
        for buffer, was in zip(held, stood, strict=True):
            buffer.copy_(was)


def lag(
    model: nn.Module,
    batches: Sequence["Batch"],
    autocast: Autocast,
    top1: Callable[[Sequence["Batch"]], float],
) -> Lag | None:
    """How far the running statistics of a model lag; None for one that has none.

    Args:
        model: as trained.
        batches: of training images, on its device; of several processes each has its part.
        autocast: the precision of the forward passes.
        top1: scores the model in evaluation mode, over all processes.
    """
    layers = batch_norms(model)
    if not layers or not any(len(labels) > 1 for _, labels in batches):
        return None
    running, stood = top1(batches), _variances(layers)
    with updated(model, batches, autocast):
        anew, taken = top1(batches), _variances(layers)
    alive = taken > 0
    ratios = (stood[alive] / taken[alive]).tolist()
    images = sum(len(labels) for _, labels in batches) * ranks.size()
    return Lag(images, running, anew, statistics.median(ratios) if ratios else 1.0)


def _variances(layers: Iterable[_BatchNorm]) -> Tensor:
    found = [layer.running_var for layer in layers]
    return torch.cat([one.double() for one in found if one is not None])
