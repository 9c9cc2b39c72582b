"""Opposing penalties in Lightning's Trainer; needs the extra ``lightning``."""

from typing import Any

from torch import nn

from ..choices import Method, Scale
from ..errors import InputError
from .attached import Attached

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise ImportError("Lightning is not installed; pip install 'wd-probe[lightning]'") from error


class OpposingPenaltyCallback(Attached, pl.Callback):
    """Measures R_op while ``trainer.fit`` runs, and logs it through the LightningModule.

    ``R_op/rate``, ``R_op/mass`` and ``R_op/flip_rate`` stand for the steps measured since they were
    last logged, and can be monitored like any logged value. Steps are the optimizers' own, so
    gradient accumulation and manual optimization need nothing special; with several optimizers a
    step is one round of all. Checkpoints carry the counts, and a resumed fit goes on from them.

    Names and layers are those of the one child that holds every parameter (``self.model``, say),
    else of the LightningModule.

    Args:
        every: measure steps 1, 1 + every, 1 + 2·every, ...
        log_every: log at every so-many-th step and at the end of an epoch; default the trainer's
            ``log_every_n_steps``, at which its loggers write. Reading the counts waits for the
            device.
        prog_bar: show ``R_op/rate`` in the progress bar.
        method: also attach a :class:`wd_probe.WeightDecay` of this method to each optimizer.
        rate: its λ.
        scale: how its rate rises from layer to layer.
        options: the other arguments of :class:`wd_probe.OpposingPenaltyProbe`.

    Attributes:
        probe: the :class:`wd_probe.OpposingPenaltyProbe` of the last fit; its records stay.
        decays: the :class:`wd_probe.WeightDecay` of each optimizer.

    Raises:
        InputError: ``every`` or ``log_every`` < 1; ``rate`` without ``method``; when the fit
            starts, whatever the probe and the decay refuse.
    """

    def __init__(
        self,
        every: int = 1,
        *,
        log_every: int | None = None,
        prog_bar: bool = False,
        method: Method | None = None,
        rate: float = 0.0,
        scale: Scale | None = None,
        **options: Any,
    ) -> None:
        super().__init__(every, method=method, rate=rate, scale=scale, **options)
        if log_every is not None and log_every < 1:
            raise InputError(f"log_every must be at least 1, got {log_every}")
        self.log_every, self.prog_bar = log_every, prog_bar

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach: the model is moved and wrapped, and everything is restored."""
        self.attach(_model(pl_module), trainer.optimizers)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Log, if it is time."""
        # Lightning's loggers write when this many batches have stepped.
        automatic = pl_module.automatic_optimization
        stepped = trainer.global_step if automatic else trainer.fit_loop.total_batch_idx + 1
        log_every = self.log_every or trainer.log_every_n_steps
        due = log_every and stepped % log_every == 0
        if not due and not trainer.is_last_batch:
            return
        for name, value in self.metrics(peek=not due).items():
            shown = self.prog_bar and name == "R_op/rate"
            pl_module.log(name, value, prog_bar=shown, on_step=True, on_epoch=False)

    def on_train_end(self, *_: Any) -> None:
        """Detach."""
        self.detach()

    def on_exception(self, *_: Any) -> None:
        """Detach."""
        self.detach()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Forget a state that was loaded for something other than a fit."""
        self._loaded = None


def _model(module: nn.Module) -> nn.Module:
    every = set(module.parameters())
    return next((c for c in module.children() if every and set(c.parameters()) == every), module)
