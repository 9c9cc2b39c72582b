"""What the callbacks share: a probe, and a decay if asked, on a trainer's model and optimizers."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..choices import Method, Scale
from ..decay.methods import WeightDecay
from ..errors import InputError
from ..layering import Layers, named_parameters
from .own_loop import OpposingPenaltyProbe


class Attached:
    """A probe and, with ``method``, a WeightDecay for each optimizer; the base of every callback.

    Attributes:
        probe: the probe of the last training, readable when it is over; None before the first.
        decays: a :class:`wd_probe.WeightDecay` for each optimizer, or none.
    """

    def __init__(
        self,
        every: int = 1,
        *,
        method: Method | None = None,
        rate: float = 0.0,
        scale: Scale | None = None,
        **options: Any,
    ) -> None:
        signature(OpposingPenaltyProbe).bind(None, None, every=every, **options)
        if every < 1:
            raise InputError(f"every must be at least 1, got {every}")
        if method is None and (rate or scale):
            raise InputError("rate= and scale= need a method=, such as 'wd' or 'lpwd'")
        self.probe: OpposingPenaltyProbe | None = None
        self.decays: tuple[WeightDecay, ...] = ()
        self._every, self._options = every, options
        self._method, self._rate, self._scale = method, rate, scale
        self._loaded: dict[str, Any] | None = None

    def attach(
        self, model: nn.Module, optimizers: Sequence[Optimizer], groups: Layers | None = None
    ) -> None:
        """Measure, and decay, from now on; what was attached before is detached."""
        self.detach()
        loaded, self._loaded, self.decays = self._loaded, None, ()
        if loaded:
            self._check(loaded)
        options = {"groups": groups, **self._options}
        for optimizer in optimizers:
            if self._method is not None:
                decay = WeightDecay(
                    model,
                    optimizer,
                    self._method,
                    rate=self._rate,
                    scale=self._scale,
                    parameters=None if len(optimizers) == 1 else _held(model, optimizer),
                    groups=options["groups"],
                )
                self.decays += (decay,)
        self.probe = OpposingPenaltyProbe(model, list(optimizers), every=self._every, **options)
        if loaded:
            self.probe.load_state_dict(loaded["probe"])
            for decay, state in zip(self.decays, loaded["decays"], strict=True):
                decay.load_state_dict(state)

    def detach(self) -> None:
        """Stop; what was measured stays readable. Safe to call twice."""
        if self.probe is not None:
            self.probe.close()
        for decay in self.decays:
            decay.detach()

    def metrics(self, *, peek: bool = False) -> dict[str, float]:
        """What `probe.metrics` gives; empty before the first training."""
        return {} if self.probe is None else self.probe.metrics(peek=peek)

    def _check(self, loaded: dict[str, Any]) -> None:
        method = loaded["decays"][0]["method"] if loaded["decays"] else None
        if method != self._method:
            raise InputError(
                f"the checkpoint was trained with method={method!r}, and the callback has "
                f"method={self._method!r}; give it the checkpoint's"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs; plain values."""
        if self._loaded:  # and not attached since
            return self._loaded
        if self.probe is None:
            return {}
        return {
            "probe": self.probe.state_dict(),
            "decays": [decay.state_dict() for decay in self.decays],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on, when training starts, where the one that made ``state_dict`` stopped."""
        self._loaded = state_dict


def _held(model: nn.Module, optimizer: Optimizer) -> list[str]:
    held = {p for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in named_parameters(model) if p in held]
