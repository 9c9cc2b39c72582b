"""Measured steps of one or several optimizers, gathered into a record for each round."""

from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray

from ..layering import Layers
from .history import Thinned
from .records import ProfileRecord, StepRecord
from .step import Counted
from .sums import WIDTH, Doubles, settle


class Rounds:
    """Holds what was counted: on the device until it is asked for, then as records.

    Args:
        rates: decay rates that the profile is asked about.
        history: how many records to keep.
    """

    def __init__(self, rates: tuple[float, ...], history: int) -> None:
        self._rates = rates
        self._pending: list[tuple[Counted, int, tuple[str, ...], Layers]] = []
        self._open: _Round | None = None
        self._total = _no_sums(0)
        self._records: Thinned[StepRecord] = Thinned(history, attrgetter("rate"))
        self._profiles: Thinned[ProfileRecord] = Thinned(history, attrgetter("most"))

    def add(self, counted: Counted, step: int, names: tuple[str, ...], layers: Layers) -> None:
        """Take in one optimizer's step.

        Args:
            counted: its counts, perhaps still on the device.
            step: the round that it belongs to.
            names: of the parameters, by their rows.
            layers: the model's.
        """
        self._pending.append((counted, step, names, layers))

    def waiting(self, step: int) -> int:
        """For how many steps the first of what is still on the device has been there."""
        return step - self._pending[0][1] if self._pending else 0

    def flush(self) -> None:
        """Read what is still on the device: one transfer for all pending steps."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        parts = [counted.sums() for counted, *_ in pending]
        sums = torch.cat([part.to(parts[0].device) for part in parts]).cpu().numpy()
        start = 0
        for counted, step, names, layers in pending:
            found = sums[start : start + len(counted.rows)]
            start += len(counted.rows)
            if counted.voided is not None and float(counted.voided):
                continue
            if self._open is None or self._open.step != step:
                self.finish()
                self._open = _Round(step)
            self._open.add(counted, found, names, layers)

    def finish(self) -> None:
        """End the round that is open."""
        if self._open is None:
            return
        done, self._open = self._open, None
        self._total = _grown(self._total, len(done.values))
        self._total[: len(done.values)] += done.values
        self._records.append(done.record())
        for profile in done.profile(self._rates):
            self._profiles.append(profile)

    # --- reading ------------------------------------------------------------------------------

    def records(self) -> tuple[StepRecord, ...]:
        """Of every round, the open one as far as it has come."""
        self.flush()
        return (*self._records, *(() if self._open is None else (self._open.record(),)))

    def profiles(self) -> tuple[ProfileRecord, ...]:
        """Of the rounds that have one."""
        self.flush()
        return (*self._profiles, *(() if self._open is None else self._open.profile(self._rates)))

    def drain(self, step: int, has_ended: bool) -> tuple[StepRecord, ...]:
        """The records of rounds that have ended, which are then forgotten.

        Args:
            step: the present round.
            has_ended: whether it has.
        """
        self.flush()
        if has_ended or (self._open is not None and self._open.step < step):
            self.finish()
        taken = tuple(self._records)
        self._records = Thinned(self._records.limit, attrgetter("rate"))
        return taken

    def total(self, rows: int) -> Doubles:
        """The sums over all rounds, for so many parameters."""
        self.flush()
        total = _grown(self._total, rows)
        if self._open is not None:
            total[: len(self._open.values)] += self._open.values
        return total

    def restart(self, total: Doubles) -> None:
        """Go on from these sums."""
        self.flush()
        self._open, self._total = None, total


class _Round:
    """A step of every optimizer, as far as it has come."""

    def __init__(self, step: int) -> None:
        self.step, self.values = step, _no_sums(0)
        self._names: tuple[str, ...] = ()
        self._layers: Layers | None = None
        self._profiles: list[NDArray[np.float64] | None] = []

    def add(self, counted: Counted, found: Doubles, names: tuple[str, ...], layers: Layers) -> None:
        """Add one optimizer's step."""
        self._names, self._layers = names, layers
        sizes = np.array([float(size) for size in counted.sizes])[counted.penalties]
        settle(found, sizes, np.array(counted.opposes, dtype=bool)[counted.penalties])
        self.values = _grown(self.values, len(names))
        self.values[counted.rows] += found
        profile = None if counted.profile is None else counted.profile()[sizes != 0].sum(0)
        self._profiles.append(None if profile is None else profile.numpy())

    def record(self) -> StepRecord:
        """The round as it stands."""
        assert self._layers is not None
        return StepRecord(self.step, self.values, self._names, self._layers)

    def profile(self, rates: tuple[float, ...]) -> tuple[ProfileRecord, ...]:
        """Its profile, if every step of it was asked about these rates and could tell."""
        told = [rows for rows in self._profiles if rows is not None]
        if len(told) < len(self._profiles):
            return ()
        opposing = tuple(map(int, np.sum(told, axis=0)))
        return (ProfileRecord(self.step, rates, opposing, int(self.values[:, 0].sum())),)


def _no_sums(rows: int) -> Doubles:
    return np.zeros((rows, WIDTH))


def _grown(values: Doubles, rows: int) -> Doubles:
    """A copy with rows of zeros added up to so many."""
    return np.concatenate([values, _no_sums(max(0, rows - len(values)))])
