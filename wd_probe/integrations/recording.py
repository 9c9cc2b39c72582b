"""The run folder of a loop that is not ours: written as it steps, summarized when it ends."""

import contextlib
import copy
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..decay.methods import attached
from ..decay.rules import effect_at_work
from ..hooks import is_captured
from ..layering import Layers
from ..probe.probe import OpposingPenaltyProbe
from ..runs.folder import RunFolder, environment
from ..runs.recorder import Recorder, Running
from ..runs.verdict import Setting
from ..wording import decimal
from .norms import Norms

#: Seconds between two writings; what was measured waits on its device.
_SECONDS = 1.0
#: Steps that wait for them at most.
_STEPS = 256


@dataclass(frozen=True, slots=True)
class Loop:
    """What is known of who trains.

    Attributes:
        model: what it is called.
        stages: of its layers, for the dashboard.
        script: the file's name.
        command_line: how it was started.
        command: "loop" is one's own, "watch" that of a script that is watched.
        norms: batch norms of the model, followed from the start.
    """

    model: str
    stages: Layers
    script: str
    command_line: str
    command: str
    norms: Norms | None = None


class Recording:
    """What becomes in a run folder of what a probe measures.

    Args:
        probe: what measures; it may be a weak proxy, since the recording keeps none alive.
        folder: an empty one.
        loop: who trains.
    """

    def __init__(self, probe: OpposingPenaltyProbe, folder: RunFolder, loop: Loop) -> None:
        self.loop, self.recorder = loop, Recorder(folder, probe)
        self.summary: dict[str, Any] = {}
        self._choose(probe)
        self._rates, self._lr = dict[int, float | Tensor](), Running()
        self._losses, self._top1 = dict[int, float | Tensor](), dict[int, float]()
        self._started = self._written = time.monotonic()
        self._known, self._layers = self._config(probe), probe.layers
        folder.json("config.json", self._known)
        self.recorder.open_dashboard(loop.stages)

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return self.recorder.folder

    def _choose(self, probe: OpposingPenaltyProbe) -> None:
        """Which optimizer and group the run's one η and λ are of."""
        self._optimizer: Optimizer | None
        self._optimizer, self._group = most_decayed(probe.optimizers)

    # --- as it steps ------------------------------------------------------------------------------

    def stepped(self, optimizer: Optimizer, probe: OpposingPenaltyProbe, last: int) -> None:
        """An optimizer has stepped; steps up to ``last`` are over."""
        if is_captured():
            return
        if optimizer is self._optimizer:
            lr = optimizer.param_groups[self._group].get("lr", math.nan)
            self._rates[probe.steps] = _held(lr)
        now = time.monotonic()
        if now - self._written > _SECONDS or last - self.recorder.steps > _STEPS:
            self._written = now
            self.write(last)

    def log(self, step: int, loss: float | Tensor | None, top1: float | Tensor | None) -> None:
        """What a step's batch was trained with, and an evaluation after it."""
        if loss is not None:
            self._losses[max(step, 1)] = _held(loss)
        if top1 is not None:
            self._top1[step] = float(top1)

    def write(self, last: int) -> None:
        """Write the steps so far, up to the last one that nothing will be added to."""
        self._name_layers()
        self._evaluated(self.recorder.steps)
        for step in range(self.recorder.steps + 1, last + 1):
            lr, loss = _number(self._rates.pop(step, None)), _number(self._losses.pop(step, None))
            self._lr.add(lr)
            self.recorder.step(step, loss=_known(loss), lr=_known(lr), update=step)
            self._evaluated(step)

    def _name_layers(self) -> None:
        """Name those that have joined, before a table has their numbers."""
        probe = self.recorder.probe
        if probe is not None and probe.layers != self._layers:
            self._layers = probe.layers
            self._known |= _measured(probe)
            self.folder.json("config.json", self._known)

    def _evaluated(self, step: int) -> None:
        """Write an evaluation after a step, if there was one; ahead of training it is number 0."""
        if step in self._top1:
            before = self.recorder.epochs
            number = before[-1].epoch + 1 if before else min(step, 1)
            self.recorder.epoch(number, top1=self._top1.pop(step))

    # --- at the end -------------------------------------------------------------------------------

    def end(self, status: str, probe: OpposingPenaltyProbe) -> None:
        """Write what is left of a probe that is closed, sum it up; `draw` draws the figures."""
        if self._optimizer is None:
            return
        self.recorder.probe = probe
        self.write(probe.steps)
        self.folder.close_tables()  # what is drawn later may be drawn never
        chosen, self._optimizer = (self._optimizer, self._group), None
        self.summary = {
            **summed_up(probe, self.recorder, self.loop, chosen, self._lr.mean),
            "status": status,
            "seconds": time.monotonic() - self._started,
            "run": str(self.folder.path),
        }
        told = {"opt": self.summary["optimizer"], "lr": self.summary["lr"]}  # not as warm-ups begin
        if told["lr"] == told["lr"]:
            self.folder.json("config.json", {**self._known, **told})
        self.folder.json("summary.json", self.summary)
        self.recorder.probe = copy.copy(probe)  # which holds no model

    def draw(self) -> None:
        """Draw the figures, end the dashboard and close the folder."""
        with self.folder:
            found = self.summary
            if not found:  # what ended it has failed, and was told
                return
            shown = {key: found[key] for key in ("model", "optimizer", "lr", "weight_decay")}
            self.recorder.close(found, shown)

    # --- what is known of it ----------------------------------------------------------------------

    def _config(self, probe: OpposingPenaltyProbe) -> dict[str, Any]:
        optimizer = self._optimizer
        assert optimizer is not None
        group = optimizer.param_groups[self._group]
        return {
            "command": self.loop.command,
            "command_line": self.loop.command_line,
            "script": self.loop.script,
            "model": self.loop.model,
            "dataset": self.loop.script,
            "opt": type(optimizer).__name__,
            "method": "own",
            "lr": _number(group.get("initial_lr", group.get("lr"))),
            "weight_decay": _number(group.get("weight_decay", 0.0)),
            "every": probe.every,
            "keep": probe.keep,
            **_measured(probe),
            **environment(group["params"][0].device),
        }


def _measured(probe: OpposingPenaltyProbe) -> dict[str, Any]:
    """What ``config.json`` says of the weights and their layers."""
    return {
        "weights": sum(p.numel() for _, p in probe.named_parameters()),
        "layer_definition": probe.layers.definition,
        "layers": [
            {"index": one.index, "name": one.name, "parameters": one.parameters}
            for one in probe.layers
        ],
    }


def most_decayed(optimizers: Iterable[Optimizer]) -> tuple[Optimizer, int]:
    """The parameter group with most of the weights that decay, else of all weights."""
    groups = [(one, k) for one in optimizers for k in range(len(one.param_groups))]
    return max(groups, key=lambda pair: _size(pair[0].param_groups[pair[1]]))


def summed_up(
    probe: OpposingPenaltyProbe,
    recorder: Recorder,
    loop: Loop,
    chosen: tuple[Optimizer, int],
    lr: float = math.nan,
) -> dict[str, Any]:
    """What ``summary.json`` says of a loop.

    Args:
        probe: what measured it.
        recorder: what it told.
        loop: who trained.
        chosen: :func:`most_decayed`.
        lr: the mean of η; default the present one.
    """
    optimizer, group = chosen[0], chosen[0].param_groups[chosen[1]]
    decay, method = attached(optimizer), ""
    lr = _number(group.get("lr")) if math.isnan(lr) else decimal(lr)
    if decay is not None:
        method, rate = decay.method, decay.rate
    else:
        rate = _number(group.get("weight_decay", 0.0))
        like = max(group["params"], key=lambda p: p.ndim)
        with contextlib.suppress(Exception):  # of an optimizer's own, stepped aside
            method = str(effect_at_work(optimizer, group, like).rule)
    norms = None if loop.norms is None else loop.norms.moved()
    return {
        "command": loop.command,
        "script": loop.script,
        "model": loop.model,
        "dataset": loop.script,
        "method": method,
        "decay": "optimizer" if decay is None else "attached",
        "optimizer": " and ".join(dict.fromkeys(type(one).__name__ for one in probe.optimizers)),
        "lr": lr,
        "weight_decay": rate,
        "layer_definition": probe.layers.definition,
        **recorder.summary(rate, Setting(lr=lr, rule=method, in_code=True, batch_norms=norms)),
    }


def _size(group: Mapping[str, Any]) -> tuple[bool, int]:
    return bool(group.get("weight_decay")), sum(p.numel() for p in group["params"])


def _held(value: float | Tensor) -> float | Tensor:
    """A number that stays; one on a device is read when it is written."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # torch has the last one of what cannot be read
        return math.nan


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
