"""One model of a watched script: its probe, its optimizers and its run folder."""

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import Teller
from ..hooks import untraced
from ..probe.copies import Keep
from ..probe.step import WatchedOptimizer
from ..runs.folder import run_folder
from .norms import Norms
from .own_loop import OpposingPenaltyProbe
from .owners import Owner, parameters_of, with_more
from .recording import Loop, Recording


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

    def _look_through(self, watched: WatchedOptimizer, held: list[Tensor]) -> None:
        known = len(self.names)
        super()._look_through(watched, held)
        if len(self.names) > known:
            self.layers = with_more(self.layers, self._model, self.names)


@dataclass(frozen=True, slots=True)
class Choices:
    """What is asked of a watch, and what it is told of the script."""

    output: Path | None
    every: int
    keep: Keep
    script: str
    command_line: str


class Watched(Recording):
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
        retire: Callable[["Watched"], None],
    ) -> None:
        self._safely, self._retire = safely, retire
        self.probe: OpposingPenaltyProbe = _Probe(
            notes, owner.model, optimizer, every=choices.every, keep=choices.keep,
            parameters=owner.parameters, groups=owner.layers,
        )  # fmt: skip
        self._holds = weakref.WeakKeyDictionary[Optimizer, RemovableHandle]()
        self._replaced = weakref.WeakSet[Optimizer]()
        norms = Norms(owner.root, self.probe.named_parameters())
        loop = Loop(owner.title, owner.stages, choices.script, choices.command_line, "watch", norms)
        # who opened files must outlive the model: see `Watch`
        super().__init__(weakref.proxy(self.probe), run_folder(path), loop)
        self.hold(optimizer)

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
            step = self.probe.steps
            last = step if len(self.probe.optimizers) == 1 else step - 1
            self._safely(lambda: self.stepped(optimizer, self.probe, last))

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
        self._choose(self.probe)
        self.hold(optimizer)

    def retire(self, status: str) -> None:
        """Stop measuring, and sum up what was measured."""
        for hold in self._holds.values():
            hold.remove()
        self.probe.close()
        self.end(status, self.probe)
        self.probe = copy.copy(self.probe)  # which holds no model

    def __del__(self) -> None:
        """The script has let go of the model."""
        if getattr(self, "_optimizer", None) is not None:
            self._retire(self)
