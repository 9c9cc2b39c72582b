"""The sums taken over a tensor's weights in one pass, and what is recorded of them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Doubles = NDArray[np.float64]

#: How a tensor's penalty P is found. By a closed rule from x, before the step, and d, the way to
#: where it ends: P = cx beside the step; P = cû after it, or û/(1 + c); P = cθ ahead of the
#: gradient, so that the step begins at x = (1 − c)θ, read as paired or literally (theory fact 9);
#: P = cx of weights that the step alone does not move away from zero ("cautious"). Or against the
#: same step without it ("exact"). "none": nothing is taken off.
Way = Literal["beside", "after", "proximal", "ahead", "literal", "cautious", "exact", "none"]

#: What a pass adds up: counts, Σ of sizes of which P is a multiple, over opposing and over all, and
#: the three sums of theory fact 20. Where P has no closed rule, what follows from û itself: T, the
#: squared step and Σ P·x; these three are 0 elsewhere.
RAW = ("penalized", "opposing", "flipped", "nonfinite", "opposing_size", "size",
       "xx", "xd", "dd", "taken", "updated", "px")  # fmt: skip
#: How many of these a compiled pass fills: no exact ones.
PASSED = RAW.index("taken")


class Sum(NamedTuple):
    """One of the numbers recorded.

    Attributes:
        name: as in :class:`wd_probe.Tally`.
        kind: int where weights are counted, float where their sizes are added up.
        lasts: whether it stands until the next step, rather than being a step's own: over several
            steps it is the last one's.
    """

    name: str
    kind: type[int | float] = float
    lasts: bool = False


SUMS = (
    Sum("penalized", int),
    Sum("opposing", int),
    Sum("flipped", int),
    Sum("nonfinite", int),
    Sum("opposing_penalty"),
    Sum("total_penalty"),
    Sum("squared"),
    Sum("along"),
    Sum("moved"),
    Sum("growth"),
    Sum("taken"),
    Sum("updated"),
    Sum("decayed", int),
    Sum("shares"),
    Sum("squared_norm", lasts=True),
    Sum("left", lasts=True),
    Sum("held", int, lasts=True),
)
#: How many there are: the columns of every table of sums.
WIDTH = len(SUMS)
#: The column of each.
AT = {one.name: k for k, one in enumerate(SUMS)}
#: Whether each lasts.
LASTS = np.array([one.lasts for one in SUMS])


class Factors(NamedTuple):
    """By what tensors are counted.

    Attributes:
        numbers: of each tensor the number of its kind.
        c: of each kind the share taken off.
        of_stepped: of each kind whether what stands is weighed (see :func:`.formulas.tally`).
    """

    numbers: NDArray[np.int64]
    c: "Sequence[float | Tensor]"
    of_stepped: Sequence[bool]


class Taken(NamedTuple):
    """What was taken off a tensor: how that is found, and the share c."""

    way: Way
    c: float


_AFTER, _AHEAD = ("after", "proximal"), ("ahead", "literal")
_SOME = tuple(way for way in get_args(Way) if way != "none")
_OPPOSING = ("beside", "literal", "cautious", "exact")


def _size(way: Way, c: float) -> float:
    """Σ|P| in units of what the pass has added up."""
    if way == "exact":
        return 1.0
    # (1 − c) of what was penalized stands: P is c / (1 − c) of that
    stands = way in ("after", *_AHEAD)
    return c / (1 - c) if stands and c != 1 else np.inf if stands else c


def share_of(way: Way, c: float) -> float:
    """Which share of a weight that stands a penalty takes off; 0 where c does not tell."""
    found = c / (1 + c) if way == "proximal" else c
    return found if way not in ("none", "exact") and found > 0 and np.isfinite(found) else 0.0


def settle(
    raw: Doubles,
    kinds: Sequence[Taken],
    numbers: NDArray[np.int64],
    is_told: NDArray[np.bool_],
    elements: NDArray[np.int64],
) -> Doubles:
    """What is recorded, from what passes have added up (theory facts 20 to 23).

    Args:
        raw: (tensors, len(RAW)).
        kinds: what was taken off.
        numbers: of each tensor which of these.
        is_told: of each whether that was added up by itself, and not only what it is a multiple of.
        elements: of each how many weights it has.

    Returns:
        (tensors, WIDTH), but for what lasts: `left` and `held` are told by all steps together.
    """

    def of_each(values: Iterable[float], dtype: type) -> NDArray[Any]:
        """Every tensor's, of values that stand by kind."""
        return np.array(list(values), dtype=dtype)[numbers]

    is_after, is_ahead, can_oppose, is_some = (
        of_each((one.way in ways for one in kinds), bool)
        for ways in (_AFTER, _AHEAD, _OPPOSING, _SOME)
    )
    size = of_each((_size(*one) for one in kinds), np.float64)
    xx, xd, dd, told_off, told_step, px = raw[:, RAW.index("xx") :].T
    with np.errstate(all="ignore"):
        # where it is no number above 0 nothing was taken off that could be told (η = 0, say)
        is_taken = (size > 0) & np.isfinite(size) & is_some
        size = np.where(is_taken, size, 0.0)
        # P = a·x + b·d, but for what is taken off ahead of the step
        a = np.where(is_ahead, 0.0, size)
        b = np.where(is_after, size, 0.0)
        squared = a * a * xx + 2 * a * b * xd + b * b * dd
        off = np.where(
            is_ahead,
            (2 + size) * size * xx,
            2 * (a * xx + (a + b) * xd + b * dd) + squared,
        )
        step = dd + 2 * (a * xd + b * dd) + squared
        share = of_each((share_of(*one) for one in kinds), np.float64)
        share = np.where(is_told, np.where(xx > 0, px / xx, 0.0), share)
    off = np.where(is_told, told_off, off)
    step = np.where(is_told, told_step, step)
    share = np.where(is_taken & np.isfinite(share), share, 0.0)
    found = np.zeros((len(raw), WIDTH))
    found[:, :6] = raw[:, :6]
    found[:, 4:6] *= np.where(is_told, 1.0 * is_taken, size)[:, None]
    for names, counts in (
        (("opposing", "opposing_penalty"), can_oppose & is_taken),
        (("penalized", "flipped"), is_taken),
    ):
        for name in names:
            found[:, AT[name]] = np.where(counts, found[:, AT[name]], 0.0)
    change = 2 * xd + dd
    found[:, AT["squared"] : AT["growth"]] = raw[:, RAW.index("xx") : PASSED]
    found[:, AT["taken"]] = np.where(is_taken, off, 0.0)
    found[:, AT["growth"]] = np.where(is_ahead, 0.0, found[:, AT["taken"]]) + change
    found[:, AT["updated"]] = np.maximum(step, 0.0)
    found[:, AT["decayed"]] = elements * is_some
    found[:, AT["shares"]] = share * found[:, AT["decayed"]]
    found[:, AT["squared_norm"]] = np.maximum(xx + change, 0.0)
    return found
