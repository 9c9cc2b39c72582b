"""Whether decay acts: the state of a tensor, a layer or a run (theory fact 26)."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from .records import Tally

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
    balance = whole.balance if math.isnan(late.balance) else late.balance
    if whole.remaining > IDLE or math.isnan(balance):
        return "idle"
    low, high = BALANCED
    if balance < low:
        return "shrinking"
    return "balanced" if balance <= high else "growing"


def state_of_most(states: Sequence[tuple[State, int]]) -> State:
    """The state of most weights.

    Args:
        states: of tensors or layers, each with the number of its decayed weights.
    """
    counts = {one: sum(n for found, n in states if found == one) for one in STATES}
    return max(STATES, key=lambda one: counts[one])
