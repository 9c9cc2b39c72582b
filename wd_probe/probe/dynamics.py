"""Whether decay acts: the state of a tensor, a layer or a run (theory fact 26)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from .records import StepRecord, Tally
from .sums import AT

if TYPE_CHECKING:
    from torch.optim import Optimizer

#: What decay does to weights: nothing that shows; they shrink, hold, or grow in spite of it.
State = Literal["idle", "shrinking", "balanced", "growing"]
STATES: tuple[State, ...] = get_args(State)
#: Above so great a share of the weights left, decay is idle: had it been off, they would be larger
#: by a twentieth at most. Conventions, as the bounds of balance are.
IDLE = 0.95
#: Below the first of these balances weights shrink, above the second they grow.
BALANCED = (0.8, 1.25)
#: The share of the steps, the last ones, by whose balance that is told.
LATE = 0.25


def state(whole: Tally, late: Tally) -> State:
    """The state of some weights.

    Args:
        whole: their tally over all steps.
        late: over the last quarter of them, as `late` of :class:`wd_probe.OpposingPenaltyProbe`.
    """
    if whole.remaining <= IDLE and vanished(whole, late):
        return "shrinking"
    balance = telling(whole, late).balance
    if whole.remaining > IDLE or math.isnan(balance):
        return "idle"
    low, high = BALANCED
    if balance < low:
        return "shrinking"
    return "balanced" if balance <= high else "growing"


def telling(whole: Tally, late: Tally) -> Tally:
    """That by whose balance a state is told: the late one, if it has a balance to tell."""
    unknown = math.isnan(late.balance) and not vanished(whole, late)
    return whole if unknown else late


def vanished(whole: Tally, late: Tally) -> bool:
    """Whether weights have decayed until there was nothing left of them: see :func:`state`."""
    return whole.squared > 0 and late.decayed > 0 and late.squared == 0


def state_of_most(states: Sequence[tuple[State, int]]) -> State:
    """The state of most weights.

    Args:
        states: of tensors or layers, each with the number of its decayed weights.
    """
    counts = {one: sum(n for found, n in states if found == one) for one in STATES}
    return max(STATES, key=lambda one: counts[one])


def timescale(c: float) -> float:
    """In how many steps c adds up to 1; ∞ where nothing is taken off (theory fact 23)."""
    return 1 / c if c else math.inf


def remaining(c: float, steps: float) -> float:
    """The share of the weights that so many steps leave, which all take c off."""
    return float(max(1 - c, 0.0) ** steps)


def decaying(record: StepRecord) -> StepRecord:
    """The same of those tensors alone that have ever decayed; of all where none has."""
    has = record.values[:, AT["held"]] > 0
    if has.all() or not has.any():
        return record
    return replace(record, values=np.where(has[:, None], record.values, 0.0))


def equilibrium_angle(c: float, momentum: float) -> float:
    """What weights whose scale the loss does not see turn by in a step, in balance (fact 24).

    Args:
        c: the share taken off in a step.
        momentum: β; NaN where it is not known.
    """
    return math.sqrt(2 * c * (1 - momentum) / (1 + momentum))


def momentum(optimizers: Iterable["Optimizer"]) -> float:
    """β of plain momentum, as Adam's and SGD's; NaN of any other kind, or where groups differ."""
    found = {_momentum(one, group) for one in optimizers for group in one.param_groups}
    beta = found.pop() if len(found) == 1 else math.nan
    return beta if 0 <= beta < 1 else math.nan


def _momentum(optimizer: "Optimizer", group: dict[str, object]) -> float:
    import torch

    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        return float(group["betas"][0])  # type: ignore[index]
    if type(optimizer) is torch.optim.SGD and not group["nesterov"]:
        return float(group["momentum"])  # type: ignore[arg-type]
    return math.nan
