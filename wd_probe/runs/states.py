"""What decay did to a run's weights, layer by layer: the numbers that a verdict is told by."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..probe.dynamics import (
    IDLE,
    State,
    decaying,
    equilibrium_angle,
    state,
    state_of_most,
    telling,
    vanished,
)
from ..probe.records import StepRecord, Tally
from .findings import kind_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """Weights that decay: a run's, a layer's, a tensor's.

    Attributes:
        name: of the layer or tensor.
        whole: their tally over all steps.
        late: with balance, angle and timescale of the last quarter of them alone.
        last: of the last measured step.
        kind: of a tensor what sort it is, see :func:`.findings.kind_of`.
        dtype: of a tensor how it is stored.
    """

    name: str
    whole: Tally
    late: Tally
    last: Tally
    kind: str = ""
    dtype: str = ""

    @property
    def telling(self) -> Tally:
        """That by whose balance the state is told."""
        return telling(self.whole, self.late)

    @property
    def balance(self) -> float:
        """That by which the state is told."""
        return self.telling.balance

    @property
    def angle(self) -> float:
        """By which a step turns the weights, over the last quarter of the steps."""
        return self.late.angular_update

    @property
    def state(self) -> State | None:
        """None where nothing decays, and where sizes were not measured that would tell."""
        unknown = math.isnan(self.balance) and self.whole.remaining <= IDLE
        if not self.whole.held or (unknown and not vanished(self.whole, self.late)):
            return None
        return state(self.whole, self.late)

    @property
    def taken_off(self) -> float:
        """The share of what stood at the start that decay took off it."""
        return max(1 - self.whole.remaining, 0.0)

    def turn(self, momentum: float) -> float:
        """The angle a step, as a share of that in equilibrium; NaN where none is known.

        Args:
            momentum: β of the optimizer.
        """
        expected = equilibrium_angle(1 / self.late.timescale, momentum)
        return self.angle / expected if expected else math.nan


@dataclass(frozen=True, slots=True)
class States:
    """A run's weights, all of them, by layer and by tensor; those alone that decay."""

    run: Part
    layers: tuple[Part, ...]
    tensors: tuple[Part, ...]

    @classmethod
    def of(
        cls,
        total: StepRecord,
        late: StepRecord,
        last: StepRecord,
        parameters: Mapping[str, "Tensor"],
    ) -> "States":
        """From the probe's `total`, `late` and parameters, and the last measured step's record."""
        last = replace(last, groups=total.groups)
        total, late, last = map(decaying, (total, late, last))
        layers = zip(total.layers, late.layers, last.layers, strict=True)
        return cls(
            Part("", total.total, late.total, last.total),
            tuple(Part(one[0].name, *one) for one in layers),
            tuple(
                Part(name, *tallies, *_described(name, parameters.get(name)))
                for name, tallies in _by_name(total, late, last)
            ),
        )

    @property
    def state(self) -> State | None:
        """That of most of the weights that decay."""
        known = [(one.state, one.whole.held) for one in self.tensors]
        told = [(state, weights) for state, weights in known if state is not None]
        if told:
            return state_of_most(told)
        return None if self.run.whole.held else "idle"

    def json(self, steps_per_epoch: float, momentum: float) -> dict[str, Any]:
        """The object `dynamics` of ``summary.json``.

        Args:
            steps_per_epoch: NaN where it is not known.
            momentum: β, by which equilibrium is told; NaN where it is not known.
        """
        whole, last = self.run.whole, self.run.last
        names = ("balance", "angular_update", "relative_update")
        both = {n: {"mean": getattr(whole, n), "last": getattr(last, n)} for n in names}
        return {
            "state": self.state,
            "remaining": whole.remaining,
            "timescale_steps": whole.timescale,
            "timescale_epochs": whole.timescale / steps_per_epoch,
            "momentum": momentum,
            **both,
            "balance": both["balance"] | {"late": self.run.balance},
        }

    def layers_json(self) -> list[dict[str, Any]]:
        """Of each layer what ``summary.json`` says of its decay."""
        return [
            {
                "balance": one.balance,
                "angular_update": one.angle,
                "remaining": one.whole.remaining if one.whole.held else math.nan,
                "state": one.state,
            }
            for one in self.layers
        ]


def _by_name(*records: StepRecord) -> Iterator[tuple[str, tuple[Tally, Tally, Tally]]]:
    whole, late, last = (record.tensors for record in records)
    none = Tally(0, 0, 0, 0, 0.0, 0.0)
    return ((name, (whole[name], late[name], last.get(name, none))) for name in whole)


def _described(name: str, p: "Tensor | None") -> tuple[str, str]:
    return ("", "") if p is None else (kind_of(name, p.ndim), str(p.dtype).removeprefix("torch."))
