"""One optimizer's steps seen from both sides: what stood before, and the counts after."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from ..decay.methods import attached
from ..decay.moments import voided
from ..decay.undecayed import undecayed
from ..errors import Teller, first_line
from ..sharding import Shards, local
from . import formulas
from .copies import Copies, Keep
from .movement import Moved, movements, tells_movement
from .penalties import Effects, Penalized, Penalties, Reading
from .plan import Plan


@dataclass(frozen=True, slots=True)
class Counted:
    """One optimizer's measured step, whose numbers may still be on the device.

    Attributes:
        rows: which of the probe's parameters were penalized.
        penalties: for each the number of what was taken off it.
        sizes: of each penalty Σ|P| in units of the sums counted.
        opposes: of each penalty whether it can oppose.
        sums: gives the float64 (len(rows), sums.WIDTH) sums over the whole parameters.
        profile: gives the float64 (len(rows), rates) counts at other rates, if asked for and
            there are such.
        voided: 1 where `GradScaler` left this step out.
    """

    rows: NDArray[np.int64]
    penalties: NDArray[np.int64]
    sizes: list[float | Tensor]
    opposes: list[bool]
    sums: Callable[[], Tensor]
    profile: Callable[[], Tensor] | None
    voided: Tensor | None


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
        self._rows, self._keep = rows, keep
        self._copies = Copies(keep)
        self._plan: Plan | None = None
        self._live: list[list[Tensor]] = []  # by parameter group
        self._has_closure = False
        self._ungraded: set[Tensor] = set()  # decayed though they have no gradient
        self._moved: set[Tensor] = set()  # recovered from the optimizer's state after the step
        self._u_hat: dict[Tensor, Tensor] = {}
        self._second_step_error = ""

    def held(self) -> list[Tensor]:
        """The optimizer's parameters."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # --- before the step ----------------------------------------------------------------------

    def remember(self, groups: Iterable[Sequence[Tensor]], has_closure: bool) -> None:
        """Copy what this step will move of these parameters, which stand by parameter group."""
        self._has_closure, self._ungraded = has_closure, self.penalties.ungraded()
        self._live = [
            [p for p in params if self._moves(p) or (has_closure and p.requires_grad)]
            for params in groups
        ]
        self._moved = self._recoverable() if self._keep == "nothing" else set()
        self._copy()

    def _moves(self, p: Tensor) -> bool:
        return p.grad is not None or p in self._ungraded

    def _copy(self) -> None:
        live = [p for params in self._live for p in params]
        self._copies.take([p for p in live if p not in self._moved] if self._moved else live)

    def _recoverable(self) -> set[Tensor]:
        """Those of the weights that the optimizer's state will give back, as the penalty is cθ."""
        found = self.penalties.of(self._live)
        told = found.of_each(
            [
                one.way == "beside" and one.c < 1 and tells_movement(self.optimizer, one.group)
                for one in found.penalties
            ]
        )
        return {
            p for p, is_told in zip(found.weights, told, strict=True)
            if is_told and p.dtype == torch.float32
        }  # fmt: skip

    @torch.no_grad()
    def graded(self) -> None:
        """The gradient is there: where a closed rule will not do, step a copy without decay now."""
        self._u_hat = {}
        decay = attached(self.optimizer)
        if self._has_closure and decay is not None and decay.moment == "forward":
            self._copy()  # the closure's forward pass has decayed the weights
        if not any(self._live) or not self.penalties.need_second_step():
            return
        try:
            self._u_hat = undecayed(self.optimizer, self.penalties.rates())
        except Exception as error:  # what a copy cannot do must not end somebody's training
            self._second_step_error = first_line(error)

    # --- after it -----------------------------------------------------------------------------

    def count(self, shards: Shards, profile_rates: Sequence[float]) -> Counted | None:
        """Count what the step did; None if nothing was remembered of it."""
        if not any(self._live):
            return None
        if self._second_step_error:  # and the optimizer itself could
            self.penalties.give_up_second_step(self._second_step_error)
        if self._has_closure:
            self._live = [list(filter(self._moves, params)) for params in self._live]
        found = self.penalties.of(self._live)
        self._live = []
        closed, exact = found.parted(self._u_hat)
        plan = self._planned(closed)
        profile = None
        told = all(one.way == "beside" and one.rate > 0 for one in found.penalties)
        if profile_rates and told:
            profile = shards.sum(closed.weights, plan.profile(closed, profile_rates))
        sums = [plan.tally(closed)] if closed.weights or not exact.weights else []
        for p in exact.weights:
            counted = formulas.tally_exact(self._copies[p], local(self._u_hat[p]), local(p))
            sums.append(counted.unsqueeze(0))
        self._u_hat = {}
        return Counted(
            np.concatenate([plan.rows, self._numbered(exact.weights)]),
            np.array(closed.numbers + exact.numbers, dtype=np.int64),
            [one.size for one in found.penalties],
            [one.opposes for one in found.penalties],
            shards.sum(closed.weights + exact.weights, torch.cat(sums)),
            profile,
            voided(self.optimizer),
        )

    def _planned(self, closed: Penalized) -> Plan:
        """How to count these weights: as the last time, where nothing has changed."""
        if self._plan is not None and self._plan.holds(closed, self._copies.version):
            return self._plan
        rows = self._numbered(closed.weights)
        plan = Plan(closed, self._befores(closed), self._copies.version, rows)
        self._plan = None if self._moved else plan
        return plan

    def _befores(self, closed: Penalized) -> list[Tensor | Moved]:
        """What is known of these weights as they stood before the step."""
        if not self._moved:
            return [self._copies[p] for p in closed.weights]
        penalties = closed.of_each(closed.penalties)
        read = [
            (p, one.group, float(one.c))
            for p, one in zip(closed.weights, penalties, strict=True)
            if p in self._moved
        ]
        moved = iter(movements(self.optimizer, read) if read else ())
        return [next(moved) if p in self._moved else self._copies[p] for p in closed.weights]

    def _numbered(self, weights: Sequence[Tensor]) -> NDArray[np.int64]:
        return np.array([self._rows[p] for p in weights], dtype=np.int64)

    def forget(self) -> None:
        """Drop what was remembered."""
        self._live, self._u_hat, self._second_step_error = [], {}, ""

    def close(self) -> None:
        """Free the copies."""
        self.forget()
        self._plan = None
        self._copies = Copies(self._keep)
