"""The run folder of one watched model: written as its optimizers step, summarized when it ends."""

import contextlib
import copy
import math
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..decay.methods import attached
from ..decay.rules import effect_at_work
from ..errors import Teller
from ..hooks import is_captured, untraced
from ..probe.copies import Keep
from ..probe.probe import OpposingPenaltyProbe
from ..runs.folder import environment, run_folder
from ..runs.recorder import Recorder, Running
from ..runs.verdict import Setting
from ..wording import decimal
from .owners import Owner, device_of, parameters_of

#: Seconds between two writings; what was measured waits on its device.
_SECONDS = 1.0


class Notes(Teller):
    """Says each thing once, as it comes, and keeps it to be said again; never raises."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.said: list[str] = []
        self._say = say

    def tell(self, message: str) -> None:
        """Say it."""
        self.said.append(message)
        self._say(message)


class _Probe(OpposingPenaltyProbe):
    """A probe that tells its watch what it cannot measure."""

    def __init__(self, notes: Notes, *arguments: Any, **options: Any) -> None:
        self._notes = notes
        super().__init__(*arguments, **options)

    def _teller(self) -> Teller:
        return self._notes


@dataclass(frozen=True, slots=True)
class Choices:
    """What is asked of a watch, and what it is told of the script."""

    output: Path | None
    every: int
    keep: Keep
    script: str
    command_line: str


class Recording:
    """One model's probe, and what becomes of it in a run folder.

    The model's optimizers hold it, and it holds them: what the script lets go of is freed, and
    then it is handed to ``retire``. What may fail is called by ``safely``.
    """

    def __init__(
        self,
        owner: Owner,
        optimizer: Optimizer,
        choices: Choices,
        path: Path,
        notes: Notes,
        safely: Callable[[Callable[[], None]], None],
        retire: Callable[["Recording"], None],
    ) -> None:
        self.choices, self.title = choices, owner.title
        self._safely, self._retire = safely, retire
        self._owner: Owner | None = owner
        self.probe: OpposingPenaltyProbe = _Probe(
            notes, owner.model, optimizer, every=choices.every, keep=choices.keep,
            parameters=owner.parameters, groups=owner.layers,
        )  # fmt: skip
        self.summary: dict[str, Any] = {}
        self._optimizer: Optimizer | None = optimizer
        self._group = _most_decayed(optimizer)
        self._rates, self._lr = dict[int, float | Tensor](), Running()
        self._started = self._written = time.monotonic()
        self._holds = weakref.WeakKeyDictionary[Optimizer, RemovableHandle]()
        self._replaced = weakref.WeakSet[Optimizer]()
        folder = run_folder(path)
        # who opened files must outlive the model: see `Watch`
        self.recorder = Recorder(folder, weakref.proxy(self.probe))
        self._known = self._config(optimizer, owner)
        folder.json("config.json", self._known)
        self.recorder.open_dashboard(owner.stages)
        self.hold(optimizer)

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.recorder.folder.path

    def measures(self, optimizer: Optimizer) -> bool:
        """Whether its steps are measured here."""
        return optimizer in self._holds

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether all that an optimizer steps is measured here."""
        known = {id(p) for _, p in self.probe.named_parameters()}
        return known.issuperset(map(id, parameters_of(optimizer)))

    def hold(self, optimizer: Optimizer) -> None:
        """Be told of an optimizer's steps, and live as long as it does."""

        def stepped(optimizer: Optimizer, *_: Any) -> None:
            self._safely(lambda: self.stepped(optimizer))

        self._holds[optimizer] = optimizer.register_step_post_hook(untraced(stepped))

    def join(self, optimizer: Optimizer) -> None:
        """Measure one more, and let go of those that it replaces, unless they come again."""
        before, own = self.probe.optimizers, {id(p) for p in parameters_of(optimizer)}
        self.probe.join(optimizer)
        for other in before:
            if other not in self._replaced and own.issuperset(map(id, parameters_of(other))):
                self._replaced.add(other)
                self.probe.leave(other)
                self._holds.pop(other).remove()
        self._optimizer, self._group = max(
            ((one, _most_decayed(one)) for one in self.probe.optimizers),
            key=lambda pair: _size(pair[0].param_groups[pair[1]]),
        )
        self.hold(optimizer)

    # --- as it steps ------------------------------------------------------------------------------

    def stepped(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped, and the probe has seen to it."""
        if is_captured():
            return
        step = self.probe.steps
        if optimizer is self._optimizer:
            lr = optimizer.param_groups[self._group].get("lr", math.nan)
            self._rates[step] = lr.detach().clone() if isinstance(lr, Tensor) else lr
        now = time.monotonic()
        if now - self._written > _SECONDS or step - self.recorder.steps > 256:
            self._written = now
            self.write(step if len(self.probe.optimizers) == 1 else step - 1)

    def write(self, last: int) -> None:
        """Write the steps so far, up to the last one that no optimizer will add to."""
        for step in range(self.recorder.steps + 1, last + 1):
            lr = _number(self._rates.pop(step, math.nan))
            self._lr.add(lr)
            self.recorder.step(step, lr=None if math.isnan(lr) else lr, update=step)

    # --- at the end -------------------------------------------------------------------------------

    def end(self, status: str) -> None:
        """Stop measuring, write what is left, sum it up; the figures are left to `draw`."""
        if self._owner is None:
            return
        self._owner = None
        for hold in self._holds.values():
            hold.remove()
        self.recorder.probe = self.probe
        names = dict.fromkeys(type(one).__name__ for one in self.probe.optimizers)
        self._stepping = " and ".join(names)
        self.probe.close()
        self.write(self.probe.steps)
        optimizer, self._optimizer = self._optimizer, None
        assert optimizer is not None
        self.summary = self._summary(optimizer, status)
        known = {"opt": self._stepping, "lr": self.summary["lr"]}  # not as a warm-up begins
        if known["lr"] == known["lr"]:
            self.recorder.folder.json("config.json", {**self._known, **known})
        self.recorder.folder.json("summary.json", self.summary)
        self.probe = self.recorder.probe = copy.copy(self.probe)

    def draw(self) -> None:
        """Draw the figures, end the dashboard and close the folder."""
        with self.recorder.folder:
            found = self.summary
            shown = {key: found[key] for key in ("model", "optimizer", "lr", "weight_decay")}
            self.recorder.close(found, shown)

    def __del__(self) -> None:
        """The script has let go of the model."""
        if getattr(self, "_owner", None) is not None and hasattr(self, "recorder"):
            self._retire(self)

    # --- what is known of it ----------------------------------------------------------------------

    def _config(self, optimizer: Optimizer, owner: Owner) -> dict[str, Any]:
        chosen = self.choices
        group = optimizer.param_groups[self._group]
        return {
            "command": "watch",
            "command_line": chosen.command_line,
            "script": chosen.script,
            "model": self.title,
            "dataset": chosen.script,
            "opt": type(optimizer).__name__,
            "method": "own",
            "lr": _number(group.get("initial_lr", group.get("lr"))),
            "weight_decay": _number(group.get("weight_decay", 0.0)),
            "every": chosen.every,
            "keep": chosen.keep,
            "weights": sum(p.numel() for p in owner.parameters.values()),
            "layer_definition": owner.layers.definition,
            "layers": [
                {"index": one.index, "name": one.name, "parameters": one.parameters}
                for one in owner.layers
            ],
            **environment(device_of(optimizer)),
        }

    def _summary(self, optimizer: Optimizer, status: str) -> dict[str, Any]:
        group = optimizer.param_groups[self._group]
        decay = attached(optimizer)
        method, rate, lr = "", math.nan, decimal(self._lr.mean)
        if decay is not None:
            method, rate = decay.method, decay.rate
        else:
            rate = _number(group.get("weight_decay", 0.0))
            like = max(group["params"], key=lambda p: p.ndim)
            with contextlib.suppress(Exception):  # of an optimizer's own, stepped aside
                method = str(effect_at_work(optimizer, group, like).rule)
        return {
            "command": "watch",
            "script": self.choices.script,
            "model": self.title,
            "dataset": self.choices.script,
            "method": method,
            "decay": "optimizer" if decay is None else "attached",
            "optimizer": self._stepping,
            "lr": lr,
            "weight_decay": rate,
            "layer_definition": self.probe.layers.definition,
            **self.recorder.summary(rate, Setting(lr=lr, rule=method, in_code=True)),
            "status": status,
            "seconds": time.monotonic() - self._started,
            "run": str(self.path),
        }


def _most_decayed(optimizer: Optimizer) -> int:
    """The parameter group with most of the weights that decay, else of all weights."""
    groups = optimizer.param_groups
    return max(range(len(groups)), key=lambda k: _size(groups[k]))


def _size(group: Mapping[str, Any]) -> tuple[bool, int]:
    return bool(group.get("weight_decay")), sum(p.numel() for p in group["params"])


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
