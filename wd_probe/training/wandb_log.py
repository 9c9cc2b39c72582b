"""`--log-wandb`: what a run measures, on Weights & Biases as it goes."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from .. import ranks
from ..errors import InputError, first_line
from ..probe.probe import METRICS
from ..probe.records import StepRecord
from .data import Data
from .loop import Listener, Score, Step

#: Holds the name that a resumed run goes on under.
_ID = "wandb.id"


class OnWandb:
    """Passes on what it is told of a run, and logs it from the first process.

    Project, entity and mode are wandb's own affair: ``WANDB_PROJECT`` (default wd-probe),
    ``WANDB_ENTITY``, ``WANDB_MODE``. Its files lie in the run folder.

    Args:
        listener: who is told of it all.
        every: whether every step is logged, or only those that were measured.
    """

    def __init__(self, listener: Listener, every: bool) -> None:
        self._listener, self._every = listener, every
        self._run: Any = None
        self._step = 0

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """End the run there too."""
        if self._run is not None:
            self._run.finish(exit_code=int(kind is not None))

    def started(
        self, total_steps: int, folder: Path, data: Data, layer_count: int, done: int
    ) -> None:
        """Begin a run there, or go on with it."""
        if ranks.rank() == 0:
            self._run = _begun(folder, done)
        self._listener.started(total_steps, folder, data, layer_count, done)

    def stepped(self, step: Step, record: StepRecord | None) -> None:
        """Log a step by the names of :meth:`wd_probe.OpposingPenaltyProbe.metrics`."""
        self._step = step.step
        if record is not None or self._every:
            found = {"train/loss": step.loss, "train/lr": step.lr}
            if record is not None:
                found |= {name: getattr(record.total, own) for name, own in METRICS.items()}
            self._log(found)
        self._listener.stepped(step, record)

    def scored(self, epoch: int, score: Score) -> None:
        """Log an evaluation."""
        self._log({"epoch": epoch, "test/top1": score.top1, "test/loss": score.loss})
        self._listener.scored(epoch, score)

    def summed(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Put the numbers and texts of the summary there; returns it as it is."""
        if self._run is not None:
            plain = {k: v for k, v in summary.items() if isinstance(v, int | float | str)}
            self._run.summary.update(plain | {"verdict": " ".join(summary.get("verdict") or ())})
        return summary

    def _log(self, found: Mapping[str, float]) -> None:
        if self._run is not None:
            self._run.log(found, step=self._step)


def _begun(folder: Path, done: int) -> Any:
    import wandb

    kept = folder / _ID
    known = kept.read_text(encoding="utf-8") if done and kept.is_file() else None
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "wd-probe"),
            name=folder.resolve().name,
            id=known,
            resume="allow" if known else None,
            dir=folder,
            config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
            settings=wandb.Settings(console="off"),  # what is printed is left as it is
        )
    except wandb.errors.Error as error:
        raise InputError(
            f"wandb cannot begin ({first_line(error)}); WANDB_MODE=offline needs no account"
        ) from error
    kept.write_text(run.id, encoding="utf-8")
    return run
