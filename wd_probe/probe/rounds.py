"""Measured steps of one or several optimizers, gathered into a record for each round."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..layering import Layers
from .history import Growing, Thinned
from .records import ProfileRecord, StepRecord
from .standing import Standing
from .step import Counted
from .sums import AT, LASTS, WIDTH, Doubles, Taken, settle, share_of

#: The columns that tell how weights move, and what decay does to that.
DYNAMICS = [AT[name] for name in
            ("squared", "along", "moved", "growth", "taken", "decayed", "shares")]  # fmt: skip


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
        self._standing = Standing()
        self._past: Growing[Doubles] = Growing()  # DYNAMICS of the total
        self._records: Thinned[StepRecord] = Thinned(history, attrgetter("rate"))
        self._profiles: Thinned[ProfileRecord] = Thinned(history, attrgetter("most"))
        self._new: list[StepRecord] | None = None

    def add(self, counted: Counted, step: int, names: tuple[str, ...], layers: Layers) -> None:
        """Take in one optimizer's step.

        Args:
            counted: its counts, perhaps still on the device.
            step: the round that it belongs to.
            names: of the parameters, by their rows.
            layers: the model's.
        """
        self._pending.append((counted, step, names, layers))

    def renew(self, rows: Iterable[int]) -> None:
        """Let these rows be of parameters that nothing has been taken off yet."""
        self.flush()
        self._standing.renew(rows)

    def waiting(self, step: int) -> int:
        """For how many steps the first of what is still on the device has been there."""
        return step - self._pending[0][1] if self._pending else 0

    def flush(self) -> None:
        """Read what is still on the device: one transfer for all pending steps."""
        pending, self._pending = self._pending, []
        settled = iter(_settled([counted for counted, *_ in pending if counted.sums is not None]))
        for counted, step, names, layers in pending:
            found = None if counted.sums is None else next(settled)
            if counted.voided is not None and float(counted.voided):
                continue
            if self._open is not None and self._open.step != step:
                self.finish()
            if found is None:
                self._standing.decay(counted.rows, *_shares(counted))
                continue
            if self._open is None:
                self._open = _Round(step)
            self._standing.step(counted.rows, found, counted.elements, len(names))
            self._open.add(counted, found, names, layers)

    def finish(self) -> None:
        """End the round that is open."""
        if self._open is None:
            return
        done, self._open = self._open, None
        self._total = _added(self._total, done.values)
        self._past.append(self._total[:, DYNAMICS])
        record = done.record(self._standing)
        self._records.append(record)
        if self._new is not None:
            self._new.append(record)
        for profile in done.profile(self._rates):
            self._profiles.append(profile)

    # --- reading ------------------------------------------------------------------------------

    def records(self) -> tuple[StepRecord, ...]:
        """Of every round, the open one as far as it has come."""
        self.flush()
        last = () if self._open is None else (self._open.record(self._standing),)
        return (*self._records, *last)

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
        self._end(step, has_ended)
        taken = tuple(self._records)
        self._records = Thinned(self._records.limit, attrgetter("rate"))
        return taken

    def new(self, step: int, has_ended: bool) -> tuple[StepRecord, ...]:
        """Those since the last call, which stay; the first call gives none.

        Args:
            step: the present round.
            has_ended: whether it has.
        """
        self._end(step, has_ended)
        new, self._new = self._new or (), []
        return tuple(new)

    def _end(self, step: int, has_ended: bool) -> None:
        """End the open round if nothing more will come to it."""
        self.flush()
        if has_ended or (self._open is not None and self._open.step < step):
            self.finish()

    def total(self, rows: int) -> Doubles:
        """The sums over all rounds, for so many parameters, and what stands after them."""
        self.flush()
        own = self._total if self._open is None else _added(self._total, self._open.values)
        return self._standing.into(_grown(own, rows))

    def late(self, rows: int, share: float) -> Doubles:
        """As :meth:`total`, but DYNAMICS are of so great a share of the rounds, the last ones."""
        found = self.total(rows)
        before = self._noted().before(share)
        if before is not None:
            found[: len(before), DYNAMICS] -= before
        return found

    # --- state --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What :meth:`restart` goes on from, beside the total, as plain values."""
        stride, count, kept = self._noted().state()
        past = [stride, count, [(at, value.tolist()) for at, value in kept]]
        return {"standing": self._standing.state(), "past": past}

    def _noted(self) -> Growing[Doubles]:
        """What is noted of the rounds, the open one as far as it has come."""
        if self._open is None:
            return self._past
        noted = copy.deepcopy(self._past)
        noted.append(self.total(0)[:, DYNAMICS])
        return noted

    def restart(self, values: Sequence[Sequence[float]], state: Mapping[str, Any]) -> None:
        """Go on from these sums; a state of before there was a ledger has fewer."""
        self.flush()
        table = np.array(values, dtype=np.float64).reshape(len(values), -1)
        self._open, self._total = None, _no_sums(len(table))
        self._total[:, : table.shape[1]] = table
        self._total[:, LASTS] = 0
        self._standing, self._past = Standing(), Growing()
        if "past" in state:
            self._standing.load(state["standing"])
            stride, count, kept = state["past"]
            kept = [(at, np.array(value).reshape(-1, len(DYNAMICS))) for at, value in kept]
            self._past.load([stride, count, kept])


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
        self.values = _grown(self.values, len(names))
        self.values[counted.rows] += found
        profile = None
        if counted.profile is not None:
            profile = counted.profile()[found[:, AT["total_penalty"]] > 0].sum(0).numpy()
        self._profiles.append(profile)

    def record(self, standing: Standing) -> StepRecord:
        """The round as it stands."""
        assert self._layers is not None
        return StepRecord(self.step, standing.into(self.values), self._names, self._layers)

    def profile(self, rates: tuple[float, ...]) -> tuple[ProfileRecord, ...]:
        """Its profile, if every step of it was asked about these rates and could tell."""
        told = [rows for rows in self._profiles if rows is not None]
        if len(told) < len(self._profiles):
            return ()
        opposing = tuple(map(int, np.sum(told, axis=0)))
        return (ProfileRecord(self.step, rates, opposing, int(self.values[:, 0].sum())),)


def _settled(steps: Sequence[Counted]) -> list[Doubles]:
    """What is recorded of each of some measured steps: all of them at once."""
    if not steps:
        return []
    parts = [step.sums() for step in steps if step.sums is not None]
    raw = torch.cat([part.to(parts[0].device) for part in parts]).cpu().numpy()
    kinds: list[Taken] = []
    numbers = []
    for step in steps:
        numbers.append(step.penalized.numbers + len(kinds))
        kinds += [Taken(one.way, float(one.c)) for one in step.penalized.penalties]
    found = settle(
        raw,
        kinds,
        np.concatenate(numbers),
        np.concatenate([step.is_told for step in steps]),
        np.concatenate([step.elements for step in steps]),
    )
    ends = np.cumsum([len(step.rows) for step in steps])
    return np.split(found, ends[:-1])


def _shares(counted: Counted) -> tuple[Doubles, NDArray[np.bool_]]:
    """Of each weight what a step that was not measured took off, and whether c tells."""
    numbers, penalties = counted.penalized
    shares = np.array([share_of(one.way, float(one.c)) for one in penalties])
    exact = np.array([one.way == "exact" for one in penalties])
    return shares[numbers], ~(exact[numbers] | counted.is_told)


def _no_sums(rows: int) -> Doubles:
    return np.zeros((rows, WIDTH))


def _added(one: Doubles, other: Doubles) -> Doubles:
    found = _grown(one, len(other))
    found[: len(other)] += other
    return found


def _grown(values: Doubles, rows: int) -> Doubles:
    """A copy with rows of zeros added up to so many."""
    return np.concatenate([values, _no_sums(max(0, rows - len(values)))])
