"""What stands from step to step: how large the weights are, and what decay has left of them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sums import AT, LASTS, Doubles

_COLUMNS = ("squared_norm", "remaining", "held", "shares")
_NEW = (0.0, 1.0, 0.0, 0.0)


class Standing:
    """Of each parameter, by its row, what its last step has left.

    Columns: Σθ'², Π(1 − c) over its steps, its weights if they have ever decayed (else 0), and the
    share c that the last measured step took off.
    """

    def __init__(self) -> None:
        self._values = np.zeros((0, len(_COLUMNS)))

    def step(
        self, rows: NDArray[np.int64], found: Doubles, elements: NDArray[np.int64], count: int
    ) -> None:
        """Take in a measured step.

        Args:
            rows: of the parameters that stepped.
            found: what :func:`.sums.settle` gives of them.
            elements: of each how many weights it has.
            count: how many parameters there are.
        """
        if count > len(self._values):
            new = np.tile(_NEW, (count - len(self._values), 1))
            self._values = np.concatenate([self._values, new])
        shares = found[:, AT["shares"]] / elements.clip(1)
        self._values[rows, 0] = found[:, AT["squared_norm"]]
        self._values[rows, 1] *= 1 - shares.clip(0, 1)
        self._values[rows, 2] = np.maximum(self._values[rows, 2], found[:, AT["decayed"]])
        self._values[rows, 3] = shares

    def decay(self, rows: NDArray[np.int64], shares: Doubles, are_known: NDArray[np.bool_]) -> None:
        """Take in a step that was not measured: where c does not tell, as the last one."""
        taken = np.where(are_known, shares, self._values[rows, 3])
        self._values[rows, 1] *= 1 - taken.clip(0, 1)

    def renew(self, rows: Iterable[int]) -> None:
        """Begin anew with these, which are of other parameters from now on."""
        for row in rows:
            if row < len(self._values):
                self._values[row] = _NEW

    def into(self, values: Doubles) -> Doubles:
        """A copy of a table of sums, with what lasts put in."""
        found = values.copy()
        norm, remaining, held, _ = self._values[: len(found)].T
        found[: len(norm), LASTS] = np.stack([norm, remaining * held, held], axis=1)
        return found

    def state(self) -> list[list[float]]:
        """Plain values, from which :meth:`load` goes on."""
        found: list[list[float]] = self._values.tolist()
        return found

    def load(self, state: list[Any]) -> None:
        """Go on from there."""
        self._values = np.array(state, dtype=np.float64).reshape(-1, len(_COLUMNS))
