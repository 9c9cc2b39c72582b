"""What the probe measured, as frozen values."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..shown import Shown
from .sums import LASTS, SUMS, WIDTH

if TYPE_CHECKING:
    from ..layering import Layers
    from ..tables import ByWidth

_KINDS = tuple(one.kind for one in SUMS)
_NAMES = tuple(one.name for one in SUMS)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts and sums over some weights in one step, or in several.

    x is a weight before the step, y after it, d = y − x (theory facts 20 to 23). Over several
    tensors and steps every sum is added up, and what is a ratio is one of these sums; where they
    are of no measured step, or the weights were kept by their signs alone, ratios are NaN.

    Attributes:
        penalized: weights whose penalty is not zero.
        opposing: those of them that the penalty pushed away from zero (Eq. 10).
        flipped: those whose sign the step alone flipped; the other opposing ones lie in the thin
            band 0 ≤ û/θ < c/2 (theory fact 3).
        nonfinite: weights with NaN or infinity, counted nowhere else.
        opposing_penalty: Σ|P| over opposing weights.
        total_penalty: Σ|P| over penalized weights.
        squared: Σx².
        along: Σx·d.
        moved: Σd².
        growth: G, what the step alone added to the squared norm.
        taken: T, what decay took off it; G − T is how it has changed.
        updated: Σ(ηU)², of the step alone.
        decayed: weights under decay, whether or not they are zero, in every step anew.
        shares: Σc over them.
        squared_norm: Σy², after the last step.
        left: Σ of what decay has left of each weight, of 1, over all steps so far.
        held: how many weights that is of.
    """

    penalized: int
    opposing: int
    flipped: int
    nonfinite: int
    opposing_penalty: float
    total_penalty: float
    squared: float = 0.0
    along: float = 0.0
    moved: float = 0.0
    growth: float = 0.0
    taken: float = 0.0
    updated: float = 0.0
    decayed: int = 0
    shares: float = 0.0
    squared_norm: float = 0.0
    left: float = 0.0
    held: int = 0

    @property
    def rate(self) -> float:
        """R_op as a share of weights: opposing / penalized (Eq. 11); NaN if none is penalized."""
        return _share(self.opposing, self.penalized)

    @property
    def mass(self) -> float:
        """R_op as a share of penalty (Eq. 11); NaN if nothing is penalized."""
        return _share(self.opposing_penalty, self.total_penalty)

    @property
    def flip_rate(self) -> float:
        """Share of penalized weights whose sign the step alone flipped; NaN if none is."""
        return _share(self.flipped, self.penalized)

    @property
    def norm(self) -> float:
        """|y|, the Euclidean norm after the last step, of what is a number; NaN if nothing is.

        0 before there was a step.
        """
        lost = self.nonfinite and not self.squared_norm
        return math.nan if lost else math.sqrt(self.squared_norm)

    @property
    def balance(self) -> float:
        """G / T: 1 where the step gives back what decay takes; NaN where nothing is taken."""
        return _share(self.growth, self.taken)

    @property
    def relative_update(self) -> float:
        """|ηU| / |x|, how large the step alone is; NaN where the weights are 0."""
        return math.sqrt(_share(self.updated, self.squared))

    @property
    def angular_update(self) -> float:
        """The angle between x and y, in radians; NaN where the weights are 0."""
        if not self.squared > 0:
            return math.nan
        across = max(self.moved - self.along**2 / self.squared, 0.0)
        return math.atan2(math.sqrt(across), (self.squared + self.along) / math.sqrt(self.squared))

    @property
    def remaining(self) -> float:
        """Π(1 − c) over all steps so far: the share of the weights that decay has left.

        The mean over the weights that decay; 1 where none does.
        """
        return self.left / self.held if self.held else 1.0

    @property
    def timescale(self) -> float:
        """1/c in steps, by the mean of c: how long decay remembers; ∞ where nothing decays."""
        return self.decayed / self.shares if self.shares else math.inf


@dataclass(frozen=True, slots=True)
class LayerTally(Tally):
    """The tally of one layer: `index` (1 to n) and `name` as in :func:`wd_probe.layers`."""

    index: int = 0
    name: str = ""


def fields(row: Iterable[float]) -> list[Any]:
    """A row of numbers as the fields of a :class:`Tally`."""
    return [kind(value) for kind, value in zip(_KINDS, row, strict=True)]


def pooled(tallies: Iterable[Tally]) -> Tally:
    """Several tallies as one."""
    rows = [[getattr(one, name) for name in _NAMES] for one in tallies]
    return Tally(*fields(np.array(rows, dtype=np.float64).reshape(-1, WIDTH).sum(axis=0)))


def since(now: NDArray[np.float64], then: NDArray[np.float64]) -> NDArray[np.float64]:
    """What rows of sums have come to since; what lasts is the present."""
    found: NDArray[np.float64] = np.where(LASTS, now, now - then)
    return found


def _columns(values: NDArray[np.float64]) -> list[list[Any]]:
    """The same of many rows: of each field all values."""
    return [column.astype(kind).tolist() for kind, column in zip(_KINDS, values.T, strict=True)]


def summed(
    groups: "Layers", names: Sequence[str], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The rows of ``values``, one for each of ``names``, summed over each layer of ``groups``."""
    number = {name: k for k, layer in enumerate(groups) for name in layer.parameters}
    held = [k for k, name in enumerate(names) if name in number]
    result = np.zeros((len(groups), WIDTH))
    np.add.at(result, [number[names[k]] for k in held], values[held])
    return result


@dataclass(frozen=True, repr=False, eq=False)
class StepRecord(Shown):
    """One measured optimizer step.

    Attributes:
        step: which step of the optimizer since the probe was attached; the first is 1.
        values: float64 (tensors, fields of :class:`Tally`), a row for each of ``names``.
        names: the measured tensors' names.
        groups: the model's layers.
    """

    step: int
    values: NDArray[np.float64]
    names: tuple[str, ...]
    groups: "Layers"

    def __eq__(self, other: object) -> bool:
        """Whether it is the same step with the same numbers."""
        if not isinstance(other, StepRecord):
            return NotImplemented
        same = (self.step, self.names, self.groups) == (other.step, other.names, other.groups)
        return same and np.array_equal(self.values, other.values, equal_nan=True)

    def __hash__(self) -> int:
        """By the step."""
        return hash((self.step, self.names))

    def __repr__(self) -> str:
        """The step and its totals."""
        return (
            f"StepRecord(step={self.step}, rate={self.rate:.6g}, mass={self.mass:.6g}, "
            f"flip_rate={self.flip_rate:.6g}, penalized={self.penalized}"
            + (f", nonfinite={self.nonfinite})" if self.nonfinite else ")")
        )

    def __rich__(self) -> "ByWidth":
        """R_op and the ledger of the step, and the layers that oppose most."""
        from .record_tables import record_told

        return record_told(self)

    @cached_property
    def total(self) -> Tally:
        """All tensors together."""
        return Tally(*fields(self.values.sum(axis=0).tolist()))

    @property
    def rate(self) -> float:
        """R_op: opposing weights / penalized weights; NaN if nothing was penalized."""
        return self.total.rate

    @property
    def mass(self) -> float:
        """R_op by size: Σ|P| over opposing weights / Σ|P|; NaN if nothing was penalized."""
        return self.total.mass

    @property
    def flip_rate(self) -> float:
        """Share of penalized weights whose sign the step alone flipped."""
        return self.total.flip_rate

    @property
    def penalized(self) -> int:
        """Number of penalized weights."""
        return self.total.penalized

    @property
    def nonfinite(self) -> int:
        """Number of weights with NaN or infinity, which are counted nowhere else."""
        return self.total.nonfinite

    @property
    def growth(self) -> float:
        """G, what the step alone added to the squared norm."""
        return self.total.growth

    @property
    def taken(self) -> float:
        """T, what decay took off the squared norm."""
        return self.total.taken

    @property
    def balance(self) -> float:
        """G / T; NaN where nothing is taken."""
        return self.total.balance

    @property
    def norm(self) -> float:
        """The Euclidean norm of all measured weights after the step."""
        return self.total.norm

    @property
    def relative_update(self) -> float:
        """|ηU| / |x|, how large the step alone is."""
        return self.total.relative_update

    @property
    def angular_update(self) -> float:
        """The angle between the weights before the step and after it, in radians."""
        return self.total.angular_update

    @property
    def remaining(self) -> float:
        """The share of the weights that decay has left in all steps so far."""
        return self.total.remaining

    @property
    def timescale(self) -> float:
        """1/c in steps; ∞ where nothing decays."""
        return self.total.timescale

    @cached_property
    def tensors(self) -> Mapping[str, Tally]:
        """The tally of each tensor by its name."""
        return dict(zip(self.names, map(Tally, *_columns(self.values)), strict=True))

    @cached_property
    def layers(self) -> tuple[LayerTally, ...]:
        """The tally of each layer, shallow to deep."""
        values = summed(self.groups, self.names, self.values)
        indices, names = ([getattr(x, name) for x in self.groups] for name in ("index", "name"))
        return tuple(map(LayerTally, *_columns(values), indices, names))


@dataclass(frozen=True, slots=True)
class ProfileRecord:
    """R_op at other decay rates, from the û of one step (theory fact 4).

    Attributes:
        step: the optimizer step.
        rates: the decay rates λ asked about.
        opposing: how many weights would have opposed at each.
        penalized: how many weights were penalized.
    """

    step: int
    rates: tuple[float, ...]
    opposing: tuple[int, ...]
    penalized: int

    @property
    def most(self) -> int:
        """The largest of the counts."""
        return max(self.opposing)
