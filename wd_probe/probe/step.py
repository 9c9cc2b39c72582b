"""One optimizer's steps seen from both sides: what stood before, and the counts after."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from ..decay.methods import WeightDecay, attached
from ..decay.moments import voided
from ..decay.undecayed import undecayed
from ..errors import InputError, Teller, first_line
from ..sharding import Shards, local
from . import formulas
from .copies import Copies, Keep, same
from .penalties import NOTHING, Effects, Kinds, Penalized, Penalties, Penalty, Reading
from .sums import Factors

#: The largest c at which signs alone will do: of what opposes they take about c/2 too many.
MOST_BY_SIGNS = 2e-3
_BY_SIGNS = (
    f"keep='signs' counts what crosses zero, and so is right for c up to {MOST_BY_SIGNS:g} alone"
)


@dataclass(frozen=True, slots=True)
class Counted:
    """One optimizer's measured step, whose numbers may still be on the device.

    Attributes:
        rows: which of the probe's parameters have stepped.
        elements: of each how many weights it has.
        is_told: of each whether its penalty was added up by itself (see :class:`.sums.Taken`).
        penalized: what was taken off each.
        sums: gives the float64 (len(rows), len(sums.RAW)) sums over the whole parameters; None of a
            step that was not measured.
        profile: gives the float64 (len(rows), rates) counts at other rates, if asked for and
            there are such.
        voided: 1 where `GradScaler` left this step out.
    """

    rows: NDArray[np.int64]
    elements: NDArray[np.int64]
    is_told: NDArray[np.bool_]
    penalized: Penalized
    sums: Callable[[], Tensor] | None
    profile: Callable[[], Tensor] | None
    voided: Tensor | None


class _Live(NamedTuple):
    """The weights that a step moves, and what stays as long as they are the same.

    Attributes:
        weights: parameters, by group.
        sizes: how many there are of each group.
        decay: what is attached to the optimizer.
        kinds: which are penalized alike.
        rows: which of the probe's parameters they are.
        elements: how many weights each has.
        has_coarse: whether any is of two bytes a number.
    """

    weights: list[Tensor]
    sizes: list[int]
    decay: WeightDecay | None
    kinds: Kinds
    rows: NDArray[np.int64]
    elements: NDArray[np.int64]
    has_coarse: bool


_NOTHING = np.zeros(0, dtype=np.int64)
_NONE = _Live([], [], None, Kinds(_NOTHING, []), _NOTHING, _NOTHING, False)


class WatchedOptimizer:
    """Remembers an optimizer's weights before its step, and counts after it.

    Args:
        optimizer: one whose hooks fire.
        rows: the number of each parameter that is measured; others are left alone.
        exact: see :class:`wd_probe.OpposingPenaltyProbe`.
        reading: likewise.
        keep: likewise.
        effects: rules found so far, shared between the optimizers of a probe.
        tell: says what cannot be measured.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rows: Mapping[Tensor, int],
        *,
        exact: bool | None,
        reading: Reading,
        keep: Keep,
        effects: Effects,
        tell: Teller,
    ) -> None:
        self.optimizer = optimizer
        self.penalties = Penalties(
            optimizer, exact=exact, reading=reading, effects=effects, tell=tell
        )
        self._rows, self._by_signs, self._tell = rows, keep == "signs", tell
        self._copies = Copies()
        self._live, self._is_kept = _NONE, False
        self._has_closure = False
        self._ungraded: set[Tensor] = set()  # decayed though they have no gradient
        self._last: Counted | None = None
        self._u_hat: dict[Tensor, Tensor] = {}
        self._second_step_error = ""

    def held(self) -> list[Tensor]:
        """The optimizer's parameters."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # --- before the step ----------------------------------------------------------------------

    def remember(self, groups: Iterable[Sequence[Tensor]], has_closure: bool) -> None:
        """Keep what this step will move of these parameters, which stand by parameter group."""
        self._has_closure, self._ungraded = has_closure, self.penalties.ungraded()
        if has_closure or self._ungraded:
            live = [
                [p for p in ps if self._moves(p) or (has_closure and p.requires_grad)]
                for ps in groups
            ]
        else:
            live = [[p for p in params if p.grad is not None] for params in groups]
        weights, sizes = list(chain.from_iterable(live)), list(map(len, live))
        decay, last = attached(self.optimizer), self._live
        is_same = (decay, sizes) == (last.decay, last.sizes) and same(weights, last.weights)
        if not is_same:
            self._live = self._seen(weights, live)
        if self._copy() and is_same:  # they lie otherwise
            self._live = self._seen(weights, live)

    def _moves(self, p: Tensor) -> bool:
        return p.grad is not None or p in self._ungraded

    def _seen(self, weights: list[Tensor], live: list[list[Tensor]]) -> "_Live":
        return _Live(
            weights,
            list(map(len, live)),
            attached(self.optimizer),
            self.penalties.kinds(live),
            np.array([self._rows[p] for p in weights], dtype=np.int64),
            np.array([p.numel() for p in weights], dtype=np.int64),
            any(p.dtype.itemsize == 2 for p in weights),
        )

    def _copy(self) -> bool:
        """Keep the weights; whether they are others than before, or lie otherwise."""
        by_signs = self._by_signs and not self.penalties.need_weights(self._live.kinds)
        self._is_kept = True
        return self._copies.take(self._live.weights, signs=by_signs)

    @torch.no_grad()
    def graded(self) -> None:
        """The gradient is there: where a closed rule will not do, step a copy without decay now."""
        self._u_hat = {}
        decay = attached(self.optimizer)
        if self._has_closure and decay is not None and decay.moment == "forward":
            self._copy()  # the closure's forward pass has decayed the weights
        if not (self._is_kept and self.steps_twice()):
            return
        try:
            self._u_hat = undecayed(self.optimizer, self.penalties.rates())
        except Exception as error:  # what a copy cannot do must not end somebody's training
            self._second_step_error = first_line(error)

    def steps_twice(self) -> bool:
        """Whether any weight is measured against a second step."""
        return self.penalties.need_second_step(self._live.kinds)

    # --- after it -----------------------------------------------------------------------------

    def count(self, shards: Shards, profile_rates: Sequence[float]) -> Counted | None:
        """Count what the step did; None if nothing was remembered of it."""
        if not (self._is_kept and self._live.weights):
            return None
        self._is_kept = False
        if self._second_step_error:  # and the optimizer itself could
            self.penalties.give_up_second_step(self._second_step_error)
        live = self._live
        found, told = self._counted_alone(live, self.penalties.of(live.kinds))
        if self._by_signs:
            self._check_signs(found)
        profile = None
        if profile_rates and _have_profile(found.penalties):
            counts = self._profile(live.weights, found, profile_rates)
            profile = shards.sum(live.weights, counts)
        c = [one.factor for one in found.penalties]
        falls_after = [one.falls_after for one in found.penalties]
        raw = self._copies.count(Factors(found.numbers, c, falls_after))
        for k, row in told.items():
            raw[k] = row
        self._u_hat = {}
        is_told = np.zeros(len(live.weights), dtype=bool)
        is_told[list(told)] = True
        sums = shards.sum(live.weights, raw)
        self._last = Counted(
            live.rows, live.elements, is_told, found, sums, profile, voided(self.optimizer)
        )
        return self._last

    def passed(self, groups: Iterable[Sequence[Tensor]]) -> Counted:
        """A step that is not measured: what it took off, as far as that follows from η and λ."""
        if self._last is None:  # of a resumed run, whose last measured step another process saw
            moved = [[p for p in params if self._moves(p)] for params in groups]
            live = self._live = self._seen(list(chain.from_iterable(moved)), moved)
            is_told = np.zeros(len(live.weights), dtype=bool)
            found = self.penalties.of(live.kinds)
            self._last = Counted(live.rows, live.elements, is_told, found, None, None, None)
        penalized = self.penalties.of(self._live.kinds)
        return replace(
            self._last, penalized=penalized, sums=None, profile=None, voided=voided(self.optimizer)
        )

    def _counted_alone(
        self, live: "_Live", found: Penalized
    ) -> tuple[Penalized, dict[int, Tensor]]:
        """The sums of those that no pass over all counts, by number, before the copies go."""
        alone = any(one.way in ("exact", "cautious") for one in found.penalties)
        if not (self._has_closure or alone or live.has_coarse):
            return found, {}
        told: dict[int, Tensor] = {}
        untold = []
        for k, (p, one) in enumerate(zip(live.weights, found.each(), strict=True)):
            if (self._has_closure and not self._moves(p)) or (
                one.way == "exact" and p not in self._u_hat
            ):
                untold.append(k)
            elif one.way == "exact":
                u_hat = local(self._u_hat[p])
                told[k] = formulas.tally_exact(self._copies[p], u_hat, local(p))
            elif one.way == "cautious" or (
                p.dtype.itemsize == 2 and one.is_stored and one.way != "none"
            ):
                told[k] = formulas.tally_parted(self._copies[p], local(p), one.c, one.way)
        return found.without(untold), told

    def _check_signs(self, found: Penalized) -> None:
        for k, one in enumerate(found.penalties):
            if one.way in ("beside", "literal") and float(one.c) > MOST_BY_SIGNS:
                self._tell(f"{_BY_SIGNS}; c is {float(one.c):.2g}, so R_op is not measured there")
                found.penalties[k] = NOTHING

    def refuse_signs(self) -> None:
        """Refuse what signs alone would count wrongly.

        Raises:
            InputError: c is too large.
        """
        if not self._by_signs:
            return
        kinds = self.penalties.kinds([group["params"] for group in self.optimizer.param_groups])
        most = max((float(one.c) for one in self.penalties.of(kinds).penalties), default=0.0)
        if most > MOST_BY_SIGNS:
            raise InputError(f"{_BY_SIGNS}; c = ηλ is {most:.2g} here: take keep='whole'")

    def _profile(
        self, weights: Sequence[Tensor], found: Penalized, rates: Sequence[float]
    ) -> Tensor:
        """The float64 (weights, rates) counts at other decay rates; for decay beside a step."""
        rows = []
        for p, one in zip(weights, found.each(), strict=True):
            if one.way == "none":
                rows.append(torch.zeros(len(rates), dtype=torch.float64))
                continue
            c = float(one.c)
            factors = [c * wanted / one.rate for wanted in rates]
            counts = formulas.profile(self._copies[p], local(p), c, factors)
            rows.append(counts.double().cpu())
        return torch.stack(rows)

    def forget(self) -> None:
        """Drop what was remembered."""
        self._is_kept, self._u_hat, self._second_step_error = False, {}, ""

    def close(self) -> None:
        """Free the copies."""
        self.forget()
        self._live, self._last = _NONE, None
        self._copies = Copies()


def _have_profile(penalties: Sequence[Penalty]) -> bool:
    """Whether other rates can be asked about: what is taken off falls beside the step."""
    ways = {one.way for one in penalties if one.way != "none"}
    return ways == {"beside"} and all(one.rate > 0 for one in penalties if one.way != "none")
