"""What a training run has measured so far: in memory, in its folder, on its dashboard."""

import math
import statistics
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch

from ..probe.probe import OpposingPenaltyProbe
from ..probe.records import ProfileRecord, StepRecord, Tally
from ..training.loop import Score, Step
from .folder import RunFolder
from .running import Running, Stretches
from .tensorboard import Dashboard

_SHARES = ("rate", "mass", "flip_rate")
_COUNTS = ("penalized", "opposing", "flipped", "nonfinite")


@dataclass(frozen=True, slots=True)
class Epoch:
    """What an epoch came to: scores on the test images, at the other moment, on the held-out part.

    ``other`` is what an evaluation sees of rwd's weights before their decay, or of pwd's after it
    (theory fact 8).
    """

    epoch: int
    step: int
    train_loss: float
    test: Score
    other: Score
    validation: Score


class Journal:
    """Writes what a run measures, as it is measured, and keeps only totals of it.

    ``steps.csv`` has every step. ``layers.csv`` and the dashboard have one of each of
    :class:`.running.Stretches`: the record with the largest R_op, the mean loss.

    Args:
        folder: the run folder.
        board: the dashboard, if there is one.
        probe: measures R_op; None where nothing is measured.
        literal: measures it by the literal reading of Eq. 10, for pwd and lpwd.
    """

    def __init__(
        self,
        folder: RunFolder,
        board: Dashboard | None,
        probe: OpposingPenaltyProbe | None,
        literal: OpposingPenaltyProbe | None,
    ) -> None:
        self.folder, self.board, self.probe, self.literal = folder, board, probe, literal
        self.shares = {name: Running() for name in (*_SHARES, "literal_rate")}
        self.epochs: list[Epoch] = []
        self.profiles: list[ProfileRecord] = []
        self.measured = self.penalized = 0
        self.steps = 0
        self._epoch_loss, self._shown_loss = Running(), Running()
        self._shown, self._kept = Stretches(), Stretches()  # steps, measured steps
        self._largest: tuple[int, StepRecord] | None = None
        self._records: dict[int, StepRecord] = {}
        self._literals: dict[int, StepRecord] = {}
        self._profiles_taken = 0

    def show(self, draw: Callable[[Dashboard], None]) -> None:
        """Draw on the dashboard, if it can be written."""
        board = self.board
        if board is not None:
            self.folder.guard(lambda: draw(board))

    def step(self, step: Step) -> StepRecord | None:
        """A step was trained; returns what was measured of it."""
        self.steps = step.step
        self._epoch_loss.add(step.loss)
        self._shown_loss.add(step.loss)
        record = _of(self.probe, self._records, step)
        literal = _of(self.literal, self._literals, step)
        columns: dict[str, Any] = {
            "step": step.step,
            "epoch": step.epoch,
            "loss": step.loss,
            "lr": step.lr,
        }
        if self.probe is not None:
            columns |= {name: _cell(getattr(record, name, math.nan)) for name in _SHARES}
            total = None if record is None else record.total
            columns |= {name: "" if total is None else getattr(total, name) for name in _COUNTS}
        if self.literal is not None:
            columns["literal_rate"] = _cell(getattr(literal, "rate", math.nan))
        self.folder.rows("steps.csv", tuple(columns), [tuple(columns.values())])
        if self._shown.ends():
            scalars = {"train/loss": self._shown_loss.mean, "train/lr": step.lr}
            self._shown_loss = Running()
            self.show(lambda board: board.scalars(step.step, scalars))
        if record is not None:
            self._measured(step.step, record)
        if literal is not None:
            self.shares["literal_rate"].add(literal.rate)
        return record

    def _measured(self, step: int, record: StepRecord) -> None:
        for name in _SHARES:
            self.shares[name].add(getattr(record, name))
        self.measured += 1
        self.penalized = record.penalized
        if self._largest is None or not self._largest[1].rate >= record.rate:
            self._largest = (step, record)
        if self._kept.ends():
            self.write_largest()
        assert self.probe is not None
        for profile in self.probe.profiles[self._profiles_taken :]:
            self._profiles_taken += 1
            self.profiles.append(profile)
            self.folder.rows(
                "profile.csv",
                ("step", "rate", "opposing", "penalized"),
                [
                    (profile.step, rate, count, profile.penalized)
                    for rate, count in zip(profile.rates, profile.opposing, strict=True)
                ],
            )

    def write_largest(self) -> None:
        """Write the record with the largest R_op since the last that was written."""
        if self._largest is None:
            return
        (step, record), self._largest = self._largest, None
        self.folder.rows(
            "layers.csv",
            ("step", "index", *_SHARES, "penalized", "nonfinite"),
            [
                (step, t.index, *(_cell(getattr(t, n)) for n in _SHARES), t.penalized, t.nonfinite)
                for t in record.layers
            ],
        )
        self.show(lambda board: board.record(step, record))

    @property
    def evaluated(self) -> int:
        """The step after which the model was last evaluated; 0 if it was not."""
        return self.epochs[-1].step if self.epochs else 0

    def epoch(self, number: int, test: Score, other: Score, validation: Score) -> None:
        """An epoch was trained and evaluated."""
        train_loss, self._epoch_loss = self._epoch_loss.mean, Running()
        self.epochs.append(Epoch(number, self.steps, train_loss, test, other, validation))
        columns = {
            "train_loss": train_loss,
            "top1": test.top1,
            "loss": test.loss,
            "other_top1": other.top1,
            "other_loss": other.loss,
            "val_top1": validation.top1,
            "val_loss": validation.loss,
        }
        self.folder.rows(
            "epochs.csv",
            ("epoch", "step", *columns),
            [(number, self.steps, *map(_cell, columns.values()))],
        )
        scalars = {
            "test/top1": test.top1,
            "test/loss": test.loss,
            "test/top1 at the other moment": other.top1,
            "validation/top1": validation.top1,
        }
        self.show(lambda board: board.scalars(self.steps, scalars))

    # --- killed and gone on with ----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs once every step so far is written; plain values and tensors."""
        largest = self._largest
        return {
            "steps": self.steps,
            "measured": self.measured,
            "penalized": self.penalized,
            "epochs": [astuple(epoch) for epoch in self.epochs],
            "profiles": [astuple(profile) for profile in self.profiles],
            "largest": largest and (largest[0], largest[1].step, torch.tensor(largest[1].values)),
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.steps, self.measured = int(state["steps"]), int(state["measured"])
        self.penalized = int(state["penalized"])
        self.epochs = [
            Epoch(int(epoch), int(step), float(loss), *(Score(*map(float, s)) for s in scores))
            for epoch, step, loss, *scores in state["epochs"]
        ]
        self.profiles = [
            ProfileRecord(int(step), tuple(rates), tuple(opposing), int(penalized))
            for step, rates, opposing, penalized in state["profiles"]
        ]
        if self.probe is not None and state["largest"] is not None:
            step, own, largest = state["largest"]
            record = StepRecord(int(own), largest.numpy(), self.probe.names, self.probe.layers)
            self._largest = (int(step), record)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Running | Stretches]:
        return {
            **self.shares,
            "epoch_loss": self._epoch_loss,
            "shown_loss": self._shown_loss,
            "shown": self._shown,
            "kept": self._kept,
        }

    # --- at the end ---------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tally]:
        """The tally of each tensor over the whole run."""
        return {} if self.probe is None else dict(self.probe.total.tensors)

    def write_tensors(self) -> None:
        """Write ``tensors.csv``."""
        self.folder.rows(
            "tensors.csv",
            ("name", "penalized", "opposing", "flipped", "nonfinite", "rate", "mass"),
            [
                (name, *(getattr(t, count) for count in _COUNTS), _cell(t.rate), _cell(t.mass))
                for name, t in self.tensors().items()
            ],
        )

    def rates(self) -> dict[str, Any]:
        """What the summary says of R_op."""
        if self.probe is None:
            return {}
        total = self.probe.total
        found = {
            "measured_steps": self.measured,
            "penalized": self.penalized,
            "nonfinite": total.nonfinite,
            **{name: self.shares[name].statistics() for name in _SHARES},
            "layers": [
                {"index": t.index, "name": t.name} | {name: getattr(t, name) for name in _SHARES}
                for t in total.layers
            ],
        }
        if self.literal is not None:
            found["literal_rate"] = self.shares["literal_rate"].statistics()
        return found

    def scores(self) -> dict[str, Any]:
        """What the summary says of accuracy: the last epoch, the best ten, the best by validation.

        ``best10`` is the mean and standard deviation of the ten best test top-1 (the paper's
        figure); ``chosen`` the test top-1 of the epoch that is best on the validation split.
        """
        last = Epoch(0, 0, math.nan, NOT_EVALUATED, NOT_EVALUATED, NOT_EVALUATED)
        if self.epochs and self.epochs[-1].step == self.steps:  # of the weights that stand
            last = self.epochs[-1]
        best = sorted(e.test.top1 for e in self.epochs if math.isfinite(e.test.top1))[-10:]
        validated = [e for e in self.epochs if math.isfinite(e.validation.top1)]
        chosen = max(validated, key=lambda e: e.validation.top1) if validated else None
        return {
            "epochs": len(self.epochs),
            "train_loss": last.train_loss,
            "top1": last.test.top1,
            "loss": last.test.loss,
            "other_top1": last.other.top1,
            "val_top1": last.validation.top1,
            "best10": {
                "mean": statistics.fmean(best) if best else math.nan,
                "std": statistics.stdev(best) if len(best) > 1 else math.nan,
                "epochs": len(best),
            },
            "chosen": None
            if chosen is None
            else {"epoch": chosen.epoch, "val_top1": chosen.validation.top1,
                  "top1": chosen.test.top1},
        }  # fmt: skip


NOT_EVALUATED = Score(math.nan, math.nan)


def _of(
    probe: OpposingPenaltyProbe | None, waiting: dict[int, StepRecord], step: Step
) -> StepRecord | None:
    """What a probe measured of a step; its own numbers may come some steps ahead."""
    if probe is None:
        return None
    waiting |= {record.step: record for record in probe.drain()}
    return None if step.update is None else waiting.pop(step.update, None)


def _cell(value: float) -> float | str:
    return value if math.isfinite(value) else ""
