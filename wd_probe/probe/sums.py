"""The sums taken over a tensor's weights in one pass, from which all that is recorded follows."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


class Sum(NamedTuple):
    """One of them.

    Attributes:
        name: as in :class:`wd_probe.Tally`.
        kind: int where weights are counted, float where their sizes are added up.
        of_penalty: whether it is a sum of |P|; passes add up what P is a multiple of.
        of_opposing: whether it is 0 where the rule says that no penalty opposes.
        always: whether it holds for weights that nothing is taken off, too.
    """

    name: str
    kind: type[int | float]
    of_penalty: bool = False
    of_opposing: bool = False
    always: bool = False


SUMS = (
    Sum("penalized", int),
    Sum("opposing", int, of_opposing=True),
    Sum("flipped", int),
    Sum("nonfinite", int, always=True),
    Sum("opposing_penalty", float, of_penalty=True, of_opposing=True),
    Sum("total_penalty", float, of_penalty=True),
)
#: How many there are: the columns of every table of sums.
WIDTH = len(SUMS)

_OF_PENALTY = np.flatnonzero([one.of_penalty for one in SUMS])
_OF_OPPOSING = np.flatnonzero([one.of_opposing for one in SUMS])
_NOT_ALWAYS = np.flatnonzero([not one.always for one in SUMS])


def settle(found: Doubles, sizes: Doubles, opposes: NDArray[np.bool_]) -> None:
    """Turn what a pass has summed into what is recorded.

    Args:
        found: (tensors, WIDTH), changed in place.
        sizes: of each tensor Σ|P| in units of what the pass has added up; where it is no number
            above 0 nothing was taken off that could be told (η = 0, say, or NaN).
        opposes: of each whether its penalty can oppose.
    """
    is_taken = (sizes > 0) & np.isfinite(sizes)
    found[:, _OF_PENALTY] *= np.where(is_taken, sizes, 0.0)[:, None]
    found[np.ix_(~opposes, _OF_OPPOSING)] = 0
    found[np.ix_(~is_taken, _NOT_ALWAYS)] = 0
