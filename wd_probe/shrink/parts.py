"""Not running again what cannot have changed: the part of a model before its decayed layer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layering import chosen_parameters, unwrap
from .scan import Shrunk, evaluating

#: Sums over a batch of whatever is counted, from its logits and its number.
Count = Callable[[Tensor, int], Tensor]


@dataclass(slots=True)
class _Calls:
    """How often a module was called in one pass, and when (a counter) first entered, last left."""

    count: int = 0
    entered: int = 0
    left: int = 0
    is_tensor: bool = False


@dataclass(slots=True)
class PartScan:
    """Scales parts of a model one at a time and counts over its outputs.

    For each batch the modules that finish before a part's parameters are first needed hand back
    what they returned without decay, instead of being run. Whether that is exact is tried on two
    images for every part; where it is not, that part's passes are run whole.

    Args:
        model: a trained model; left as it was.
        parts: for each part the names of its parameters.
        reuse: False always runs whole passes.

    Attributes:
        skipped: for each part the modules that are not run again.
    """

    model: nn.Module
    parts: Mapping[str, Sequence[str]]
    reuse: bool = True
    skipped: dict[str, list[str]] = field(default_factory=dict)
    _planned: bool = False

    def run(
        self, batches: Iterable[Tensor], scales: Mapping[str, Sequence[float]], count: Count
    ) -> dict[str, Tensor]:
        """Evaluate every part at every scale asked of it.

        Args:
            batches: batches of images; gone through once.
            scales: for each part, what to multiply its weights by.
            count: sums over a batch from its logits and its number; called for the undecayed
                logits of each batch first.

        Returns:
            For each part a float64 tensor (scales, sums), summed over the batches.
        """
        model = unwrap(self.model)
        found: dict[str, Tensor] = {}
        with evaluating(model), torch.no_grad():
            for number, images in enumerate(batches):
                if not self._planned:
                    self._plan(model, images[:2])
                wanted = {name for names in self.skipped.values() for name in names}
                with _recorded(model, wanted) as outputs:
                    count(model(images), number)
                for part, wanted_scales in scales.items():
                    sums = self._part(model, part, images, wanted_scales, outputs, number, count)
                    found[part] = found[part] + sums if part in found else sums
        return found

    def _part(
        self,
        model: nn.Module,
        part: str,
        images: Tensor,
        scales: Sequence[float],
        outputs: Mapping[str, Tensor],
        number: int,
        count: Count,
    ) -> Tensor:
        rows = []
        with (
            Shrunk(model, self.parts[part]) as shrunk,
            _replayed(model, {name: outputs[name] for name in self.skipped[part]}),
        ):
            for scale in scales:
                shrunk.to(scale)
                rows.append(count(model(images), number).double().cpu())
        return torch.stack(rows)

    def _plan(self, model: nn.Module, images: Tensor) -> None:
        self._planned = True
        self.skipped = {part: [] for part in self.parts}
        if not self.reuse:
            return
        calls = _trace(model, images)
        for part, names in self.parts.items():
            weights = set(chosen_parameters(model, names).values())
            first = min(
                calls[name].entered
                for name, module in model.named_modules()
                if not weights.isdisjoint(module._parameters.values()) and calls[name].count
            )
            done = {
                name
                for name, call in calls.items()
                if call.count == 1 and call.is_tensor and call.left < first
            }
            self.skipped[part] = [n for n in done if n.rpartition(".")[0] not in done]
        self._try(model, images)

    def _try(self, model: nn.Module, images: Tensor) -> None:
        """Forget a part's plan where it does not give exactly what a whole pass gives."""
        wanted = {name for names in self.skipped.values() for name in names}
        with _recorded(model, wanted) as outputs:
            model(images)
        for part, names in self.parts.items():
            with Shrunk(model, names) as shrunk:
                shrunk.to(0.5)
                whole = model(images)
                with _replayed(model, {name: outputs[name] for name in self.skipped[part]}):
                    if not torch.equal(whole, model(images)):
                        self.skipped[part] = []


def _trace(model: nn.Module, images: Tensor) -> dict[str, _Calls]:
    calls = {name: _Calls() for name, _ in model.named_modules()}
    clock = iter(range(10**9))

    def entering(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            call, now = calls[name], next(clock)
            call.entered = now if call.count == 0 else call.entered
            call.count += 1

        return note

    def leaving(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            calls[name].left, calls[name].is_tensor = next(clock), isinstance(output, Tensor)

        return note

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(entering(name)))
            handles.append(module.register_forward_hook(leaving(name)))
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def _recorded(model: nn.Module, names: set[str]) -> Iterator[dict[str, Tensor]]:
    """The named modules' outputs in the pass made inside the block."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        # Cloned, since a later in-place activation may write into it.
        def note(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs[name] = output.clone()

        return note

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replayed(model: nn.Module, outputs: Mapping[str, Tensor]) -> Iterator[None]:
    """The named modules return what is given for them instead of being run."""
    modules = dict(model.named_modules())
    try:
        for name, output in outputs.items():
            modules[name].forward = lambda *_, kept=output, **__: kept.clone()
        yield
    finally:
        for name in outputs:
            modules[name].__dict__.pop("forward", None)
