"""Opposing penalties in Hugging Face's Trainer; needs the extra ``transformers``."""

from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

from ..layering import blocks
from .attached import Attached

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "Transformers is not installed; pip install 'wd-probe[transformers]'"
    ) from error

__all__ = ["OpposingPenaltyCallback", "blocks"]


class OpposingPenaltyCallback(Attached, TrainerCallback, ExportableState):
    """Measures R_op while ``trainer.train`` runs, and adds it to what the Trainer logs.

    ``R_op/rate``, ``R_op/mass`` and ``R_op/flip_rate`` stand for the steps since the last log, as
    the loss beside them does, in ``trainer.state.log_history`` and on the progress bar. The
    Trainer serves the integrations of ``report_to`` before its ``callbacks=``; :meth:`add_to` puts
    this one ahead of them, so that they have the values too. Checkpoints carry the counts, and a
    resumed training goes on from them.

    Args:
        every: measure steps 1, 1 + every, 1 + 2·every, ...
        method: also attach a :class:`wd_probe.WeightDecay` of this method; the Trainer's own
            ``weight_decay`` must be 0.
        rate: its λ.
        scale: how its rate rises from layer to layer.
        options: the other arguments of :class:`wd_probe.OpposingPenaltyProbe`; ``groups`` is
            ``blocks(model)`` by default.

    Attributes:
        probe: the :class:`wd_probe.OpposingPenaltyProbe` of the last training; its records stay.
        decays: the :class:`wd_probe.WeightDecay`, if there is one.

    Raises:
        InputError: ``every`` < 1; ``rate`` without ``method``; when training starts, whatever the
            probe and the decay refuse.
    """

    def add_to(self, trainer: Any) -> Self:
        """Become the trainer's first callback, ahead of the integrations that report its logs."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(other for other in callbacks if other is not self)]
        return self

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Attach: the model is moved and wrapped, and everything is restored."""
        # The Trainer itself restores callbacks only if told to, and then as new objects.
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name) if state.global_step else None
        self._loaded = saved["attributes"]["_loaded"] if isinstance(saved, dict) else None
        self.attach(model, [optimizer], blocks(model))
        # It cannot save a callback that the checkpoint it resumes from did not have.
        state.stateful_callbacks.setdefault(name, self.state())

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add the metrics to a training log; the history holds a copy of it already."""
        if logs is None or "loss" not in logs:
            return
        metrics = self.metrics()
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Detach."""
        self.detach()

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in a checkpoint's ``trainer_state.json``."""
        options = {key: value for key, value in self._options.items() if key != "groups"}
        return {
            "args": {
                "every": self._every,
                "method": self._method,
                "rate": self._rate,
                "scale": self._scale,
                **options,
            },
            "attributes": {"_loaded": self.state_dict() or None},
        }
