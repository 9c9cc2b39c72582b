"""Writes down a training run of any loop, and keeps what its end needs in little room."""

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError, WdProbeWarning
from ..layering import Layers
from ..probe.dynamics import decaying, momentum
from ..probe.probe import OpposingPenaltyProbe
from ..probe.records import ProfileRecord, StepRecord, Tally
from ..probe.sums import WIDTH
from ..wording import decimal
from .findings import findings
from .folder import RunFolder, Unwritten
from .reading import read_run
from .states import States
from .tensorboard import Dashboard
from .verdict import Setting, verdict

_SHARES = ("rate", "mass", "flip_rate")
_COUNTS = ("penalized", "opposing", "flipped", "nonfinite")
_LEDGER = (
    "norm", "relative_update", "angular_update", "growth", "taken", "balance", "remaining",
    "timescale",
)  # fmt: skip
_NO_LEDGER = "What decay did is not told: a version that did not measure it began the run."


class Running:
    """Count, mean, largest and last of numbers that come one by one; NaN counts as last only."""

    def __init__(self) -> None:
        self.count, self.total, self.top, self.last = 0, 0.0, math.nan, math.nan

    def add(self, value: float) -> None:
        """One more."""
        self.last = value
        if math.isfinite(value):
            self.count += 1
            self.total += value
            self.top = value if math.isnan(self.top) else max(self.top, value)

    @property
    def mean(self) -> float:
        """Of those that are numbers; NaN if none is."""
        return self.total / self.count if self.count else math.nan

    def statistics(self) -> dict[str, float]:
        """Mean, largest and last; all NaN if none is a number."""
        last = self.last if self.count else math.nan
        return {"mean": self.mean, "max": self.top, "last": last}

    def state_dict(self) -> dict[str, Any]:
        """Its four numbers."""
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.count, self.total = int(state["count"]), float(state["total"])
        self.top, self.last = float(state["top"]), float(state["last"])


class Stretches:
    """Cuts a run's steps into stretches: of one step for the first 2,000, then ever longer.

    A stretch is a thousandth of the steps before it, so that their number grows with the logarithm
    of the run's length: 6,178 for 100,000 steps, 10,791 for ten million.
    """

    def __init__(self) -> None:
        self.count, self.end = 0, 0

    def ends(self) -> bool:
        """Count a step; whether it is the last of its stretch."""
        if self.count == self.end:
            self.end += max(1, self.count // 1000)
        self.count += 1
        return self.count == self.end

    def state_dict(self) -> dict[str, Any]:
        """Its two numbers."""
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.count, self.end = int(state["count"]), int(state["end"])


@dataclass(frozen=True, slots=True)
class Epoch:
    """The result of an epoch, a row of ``epochs.csv``; NaN where nothing was evaluated.

    Attributes:
        epoch: its number, from 1; 0 is an evaluation ahead of training.
        step: its last step.
        train_loss: the mean over its steps.
        top1: on the test images, as a share of 1.
        loss: likewise, mean cross-entropy.
        other_top1: of rwd's weights before their decay, or of pwd's after it (theory fact 8).
        other_loss: likewise.
        val_top1: on the validation split.
        val_loss: likewise.
    """

    epoch: int
    step: int
    train_loss: float = math.nan
    top1: float = math.nan
    loss: float = math.nan
    other_top1: float = math.nan
    other_loss: float = math.nan
    val_top1: float = math.nan
    val_loss: float = math.nan


class Recorder:
    """Writes what a run measures, as it is measured, and keeps only totals of it.

    It asks nothing of the loop but plain numbers. ``steps.csv`` has every step. ``layers.csv`` and
    the dashboard have one of each of :class:`Stretches`: the record with the largest R_op, the
    mean loss.

    Args:
        folder: the run folder.
        probe: measures R_op; None where nothing is measured.
        literal: measures it by the literal reading of Eq. 10, for pwd and lpwd.
    """

    def __init__(
        self,
        folder: RunFolder,
        probe: OpposingPenaltyProbe | None = None,
        literal: OpposingPenaltyProbe | None = None,
    ) -> None:
        self.folder, self.probe, self.literal = folder, probe, literal
        self.shares = {name: Running() for name in (*_SHARES, "literal_rate")}
        self.epochs: list[Epoch] = []
        self.profiles: list[ProfileRecord] = []
        self.steps = self.measured = self.penalized = 0
        self._board: Dashboard | None = None
        self._epoch_loss, self._shown_loss = Running(), Running()
        self._shown, self._kept = Stretches(), Stretches()  # steps, measured steps
        self._largest: tuple[int, StepRecord] | None = None
        self._last: tuple[int, StepRecord] | None = None
        self._ledger: tuple[str, ...] = _LEDGER
        self._records: dict[int, StepRecord] = {}
        self._literals: dict[int, StepRecord] = {}
        self._profiles_taken = 0

    @classmethod
    def of(cls, probe: OpposingPenaltyProbe) -> "Recorder":
        """One that writes nothing and holds what a probe does."""
        self = cls(Unwritten(Path()), probe)
        self.steps = probe.steps
        for record in probe.records:
            self._measured(record.step, record)
        return self

    # --- the dashboard ----------------------------------------------------------------------------

    def open_dashboard(self, stages: Layers) -> None:
        """Show on a dashboard what comes from here on, with a chart for each of the stages."""
        self._board = self.folder.guard(lambda: Dashboard(self.folder.path, stages))

    def flush(self) -> None:
        """Bring what the dashboard has yet to write to its file."""
        self._show(Dashboard.flush)

    def _show(self, draw: Callable[[Dashboard], None]) -> None:
        board = self._board
        if board is not None:
            self.folder.guard(lambda: draw(board))

    # --- as it is measured ------------------------------------------------------------------------

    def step(
        self,
        number: int,
        *,
        epoch: int | None = None,
        loss: float | None = None,
        lr: float | None = None,
        update: int | None = None,
    ) -> StepRecord | None:
        """A step was trained; returns what was measured of it.

        Args:
            number: from 1.
            epoch: from 1, if known.
            loss: of its batch, if known.
            lr: the learning rate, if known.
            update: which call of ``optimizer.step()`` it made; None if it made none.
        """
        self.steps = number
        if loss is not None:
            self._epoch_loss.add(loss)
            self._shown_loss.add(loss)
        record = _of(self.probe, self._records, update)
        literal = _of(self.literal, self._literals, update)
        columns: dict[str, Any] = {
            "step": number,
            "epoch": epoch,
            "loss": loss,
            "lr": None if lr is None else decimal(lr),
        }
        if self.probe is not None:
            columns |= {name: _cell(getattr(record, name, math.nan)) for name in _SHARES}
            total = None if record is None else record.total
            columns |= {name: "" if total is None else getattr(total, name) for name in _COUNTS}
            decayed = None if record is None else decaying(record).total
            columns |= {name: _cell(getattr(decayed, name, math.nan)) for name in self._ledger}
        if self.literal is not None:
            columns["literal_rate"] = _cell(getattr(literal, "rate", math.nan))
        self.folder.rows("steps.csv", tuple(columns), [tuple(columns.values())])
        if self._shown.ends():
            scalars = {
                "train/loss": self._shown_loss.mean,
                "train/lr": math.nan if lr is None else lr,
            }
            self._shown_loss = Running()
            self._show(lambda board: board.scalars(number, scalars))
        if record is not None:
            self._measured(number, record)
        if literal is not None:
            self.shares["literal_rate"].add(literal.rate)
        return record

    def _measured(self, step: int, record: StepRecord) -> None:
        for name in _SHARES:
            self.shares[name].add(getattr(record, name))
        self.measured += 1
        self.penalized = record.penalized
        self._last = (step, record)
        if self._largest is None or not self._largest[1].rate >= record.rate:
            self._largest = (step, record)
        if self._kept.ends():
            self._write_largest()
        assert self.probe is not None
        for profile in self.probe.profiles[self._profiles_taken :]:
            self._profiles_taken += 1
            self.profiles.append(profile)
            self.folder.rows(
                "profile.csv",
                ("step", "rate", "opposing", "penalized"),
                [
                    (profile.step, decimal(rate), count, profile.penalized)
                    for rate, count in zip(profile.rates, profile.opposing, strict=True)
                ],
            )

    def _write_largest(self) -> None:
        """Write the record with the largest R_op since the last that was written."""
        if self._largest is None:
            return
        (step, record), self._largest = self._largest, None
        counted = (*_SHARES, "penalized", "nonfinite")
        self.folder.rows(
            "layers.csv",
            ("step", "index", *counted, *self._ledger),
            [
                (step, t.index, *_cells(t, counted), *_cells(d if d.held else t, self._ledger))
                for t, d in zip(record.layers, decaying(record).layers, strict=True)
            ],
        )
        self._show(lambda board: board.record(step, record))

    @property
    def evaluated(self) -> int:
        """The step after which the model was last evaluated; 0 if it was not."""
        return self.epochs[-1].step if self.epochs else 0

    def epoch(self, number: int, **scores: float) -> None:
        """An epoch was trained; ``scores`` are those of :class:`Epoch` that were evaluated."""
        train_loss, self._epoch_loss = self._epoch_loss.mean, Running()
        epoch = Epoch(number, self.steps, train_loss, **scores)
        self.epochs.append(epoch)
        columns = tuple(field.name for field in fields(Epoch))
        self.folder.rows("epochs.csv", columns, [tuple(map(_cell, astuple(epoch)))])
        scalars = {
            "test/top1": epoch.top1,
            "test/loss": epoch.loss,
            "test/top1 at the other moment": epoch.other_top1,
            "validation/top1": epoch.val_top1,
        }
        self._show(lambda board: board.scalars(epoch.step, scalars))

    # --- killed and resumed -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs once every step so far is written; plain values and tensors."""
        return {
            "steps": self.steps,
            "measured": self.measured,
            "penalized": self.penalized,
            "epochs": [_nested(epoch) for epoch in self.epochs],
            "profiles": [astuple(profile) for profile in self.profiles],
            "largest": _plain(self._largest),
            "last": _plain(self._last) if self._ledger else None,
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.steps, self.measured = int(state["steps"]), int(state["measured"])
        self.penalized = int(state["penalized"])
        self.epochs = [
            Epoch(int(epoch), int(step), float(loss), *(float(x) for pair in scores for x in pair))
            for epoch, step, loss, *scores in state["epochs"]
        ]
        self.profiles = [
            ProfileRecord(int(step), tuple(rates), tuple(opposing), int(penalized))
            for step, rates, opposing, penalized in state["profiles"]
        ]
        self._largest = self._record(state["largest"])
        self._last = self._record(state.get("last"))
        if "last" not in state or (self.measured and self._last is None):
            self._ledger = ()  # begun by a version that had none
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _record(self, state: tuple[int, int, torch.Tensor] | None) -> tuple[int, StepRecord] | None:
        """A step and its record from plain values; those of an older version are fewer."""
        if self.probe is None or state is None:
            return None
        step, own, values = state
        table = np.zeros((len(values), WIDTH))
        table[:, : values.shape[1]] = values.numpy()
        return int(step), StepRecord(int(own), table, self.probe.names, self.probe.layers)

    def _parts(self) -> dict[str, Running | Stretches]:
        return {
            **self.shares,
            "epoch_loss": self._epoch_loss,
            "shown_loss": self._shown_loss,
            "shown": self._shown,
            "kept": self._kept,
        }

    # --- at the end -------------------------------------------------------------------------------

    def summary(self, rate: float, setting: Setting | None = None) -> dict[str, Any]:
        """What was measured, for ``summary.json``: what decay did, R_op, findings, accuracy.

        Args:
            rate: the decay rate λ of the run.
            setting: what else is known of what it was asked to do; momentum and steps are found.
        """
        states = self._states()
        beta = math.nan if self.probe is None else momentum(self.probe.optimizers)
        known = replace(setting or Setting(), rate=rate, steps=self.steps, momentum=beta)
        return {
            "steps": self.steps,
            **self._verdict(states, known),
            **self._rates(states),
            **self._findings(rate),
            **self._scores(),
        }

    def close(self, summary: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Write what is left, draw the figures, end the dashboard; ``summary.json`` comes last.

        Args:
            summary: of the run: :meth:`summary` and what else is known of it.
            options: what the dashboard compares runs by.
        """
        self._write_largest()
        self._write_tensors()
        self.folder.close_tables()
        self.folder.guard(lambda: self._draw(summary, options))
        self._show(Dashboard.close)
        self.folder.json("summary.json", summary)

    def _write_tensors(self) -> None:
        if self.probe is None:
            return
        self.folder.rows(
            "tensors.csv",
            ("name", *_COUNTS, "rate", "mass", *self._ledger),
            [
                (name, *_cells(t, (*_COUNTS, "rate", "mass", *self._ledger)))
                for name, t in self.probe.total.tensors.items()
            ],
        )

    def _draw(self, summary: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        from . import figures  # loads matplotlib

        path = self.folder.path
        try:
            drawn = figures.draw_training(replace(read_run(path), summary=summary))
        except InputError as error:  # longer than can be read back: the run itself is whole
            warnings.warn(f"no figures are drawn: {error}", WdProbeWarning, stacklevel=2)
            drawn = {}
        figures.save(drawn, path / "figures")
        if self._board is not None:
            self._board.summary(summary, options, drawn)

    def _rates(self, states: States | None) -> dict[str, Any]:
        if self.probe is None:
            return {}
        total = self.probe.total
        told = [{} for _ in total.layers] if states is None else states.layers_json()
        found = {
            "measured_steps": self.measured,
            "penalized": self.penalized,
            "nonfinite": total.nonfinite,
            **{name: self.shares[name].statistics() for name in _SHARES},
            "layers": [
                {"index": t.index, "name": t.name}
                | {name: getattr(t, name) for name in (*_SHARES, "norm")}
                | more
                for t, more in zip(total.layers, told, strict=True)
            ],
        }
        if self.literal is not None:
            found["literal_rate"] = self.shares["literal_rate"].statistics()
        return found

    def _states(self) -> States | None:
        """What decay did, if that was measured from the first step on."""
        if self.probe is None or self._last is None or not self._ledger:
            return None
        parameters = dict(self.probe.named_parameters())
        return States.of(self.probe.total, self.probe.late, self._last[1], parameters)

    def _verdict(self, states: States | None, setting: Setting) -> dict[str, Any]:
        if states is not None:
            numbers = states.json(setting.steps_per_epoch, setting.beta)
            return {"verdict": verdict(states, setting), "dynamics": numbers}
        return {} if self.probe is None else {"verdict": [] if self._ledger else [_NO_LEDGER]}

    def _findings(self, rate: float) -> dict[str, Any]:
        if self.probe is None:
            return {"findings": []}
        ndims = {name: p.ndim for name, p in self.probe.named_parameters()}
        tensors = {name: (ndims[name], t) for name, t in self.probe.total.tensors.items()}
        return {"findings": findings(tensors, self.profiles, rate)}

    def _scores(self) -> dict[str, Any]:
        """Accuracy: the last epoch, the best ten, the best by validation.

        ``best10`` is the mean and standard deviation of the ten best test top-1 (the paper's
        figure); ``chosen`` the test top-1 of the epoch that is best on the validation split.
        """
        last = Epoch(0, 0)
        if self.epochs and self.epochs[-1].step == self.steps:  # of the weights that stand
            last = self.epochs[-1]
        trained = [e for e in self.epochs if e.epoch]
        best = sorted(e.top1 for e in trained if math.isfinite(e.top1))[-10:]
        validated = [e for e in self.epochs if math.isfinite(e.val_top1)]
        chosen = max(validated, key=lambda e: e.val_top1) if validated else None
        return {
            "epochs": len(trained),
            "train_loss": last.train_loss,
            "top1": last.top1,
            "loss": last.loss,
            "other_top1": last.other_top1,
            "val_top1": last.val_top1,
            "best10": {
                "mean": statistics.fmean(best) if best else math.nan,
                "std": statistics.stdev(best) if len(best) > 1 else math.nan,
                "epochs": len(best),
            },
            "chosen": None
            if chosen is None
            else {"epoch": chosen.epoch, "val_top1": chosen.val_top1, "top1": chosen.top1},
        }


def _of(
    probe: OpposingPenaltyProbe | None, waiting: dict[int, StepRecord], update: int | None
) -> StepRecord | None:
    """What a probe measured of an update; its own numbers may come some steps ahead."""
    if probe is None:
        return None
    waiting |= {record.step: record for record in probe.for_writing()}
    return None if update is None else waiting.pop(update, None)


def _nested(epoch: Epoch) -> tuple[Any, ...]:
    """An epoch as ``recovery.pt`` holds it: top-1 and loss of each evaluation in pairs."""
    number, step, train_loss, *scores = astuple(epoch)
    return (number, step, train_loss, *zip(scores[::2], scores[1::2], strict=True))


def _plain(record: tuple[int, StepRecord] | None) -> tuple[int, int, torch.Tensor] | None:
    return record and (record[0], record[1].step, torch.tensor(record[1].values))


def _cells(tally: Tally, names: Iterable[str]) -> tuple[float | str, ...]:
    return tuple(_cell(getattr(tally, name)) for name in names)


def _cell(value: float) -> float | str:
    return value if math.isfinite(value) else ""
