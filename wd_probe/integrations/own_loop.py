"""The probe of one's own training loop, which can write a run folder."""

import atexit
import html
import os
import shlex
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import InputError, first_line
from ..layering import layers, unwrap
from ..probe import probe as within
from ..probe.records import StepRecord
from ..ranks import known_rank
from .ending import ENDINGS, close_at_exit, status_of

if TYPE_CHECKING:
    from ..probe.step import WatchedOptimizer
    from ..runs.summary_tables import Summary
    from .recording import Loop, Recording


class OpposingPenaltyProbe(within.OpposingPenaltyProbe):
    """Measures what weight decay does at every step, and where it pushes away from zero.

    One pass a step compares the weights as the last step left them with what stands (theory facts
    2, 20, 28). Weights, gradients, optimizer state and random state are only ever read. Costs one
    copy of the weights, and about what copying them costs. It measures as long as it is kept: a
    probe that nothing refers to any more, as after a notebook's cell is run again, detaches itself.

    What is taken as the penalty: the attached :class:`wd_probe.WeightDecay`, else the optimizer's
    own ``weight_decay`` by the rule that its effect shows. Decay after the update (rwd) and before
    the forward pass (pwd, lpwd) never opposes, since it falls on the weight that stands (Eq. 8):
    R_op is 0 there by that law. Where no closed rule gives P (L2, L1, optimizers of their own
    kind), every measured step is taken twice, on a copy of the optimizer without decay too, and P
    is the difference; a :class:`wd_probe.WdProbeWarning` says so once.

    What it cannot measure it says once, in a warning: it never raises inside a training loop.
    Parameters that join the optimizer later are measured from then on. Where parameters are
    sharded (FSDP2, tensor parallelism), build a probe on every process; each has the counts of
    the whole parameters, and reading them waits for no other process.

    Args:
        model: the model; its parameters' names and layers label the results.
        optimizer: the optimizer that steps it; a wrapper such as timm's Lookahead is measured at
            the optimizer it wraps. Several make one record for each round: a round ends when one
            of them steps again.
        every: measure steps 1, 1 + every, 1 + 2·every, ...
        profile: decay rates λ to answer "what would R_op have been" for (theory fact 4).
        profile_every: answer that at every so-many-th measured step.
        groups: the model's layers, if not ``wd_probe.layers(model)``. Parameters in none of them
            count in tensors and totals alone.
        exact: True measures every rule against a copy of the optimizer; False never does, and
            leaves unmeasured what only that can measure. Default: where it is needed.
        reading: of Eq. 10 for pwd and lpwd. "paired" (default) compares the penalty with the weight
            that it is taken from; "literal" takes P = cθ_t and û = θ_t − ηU as they are printed.
        parameters: what the optimizer steps, by the model's names, where that is not the model's
            own parameters: float32 master copies, say.
        keep: of float32 weights from step to step. "whole" (default): a copy. "signs": a bit of
            each (and one more of tensors that hold zeros): R_op and flips alone, counted as what
            crosses zero, which is c/2 of them too many (theory fact 30); the rest is NaN. Rules
            that are measured against a second step keep the whole all the same. See
            docs/performance.md.
        history: how many records to keep. Beyond it every stretch of neighbouring steps keeps the
            record with the largest rate; `total` stays exact.
        output: a folder that is written as `wdprobe rop` writes one, for `wdprobe report` and its
            like: tables and TensorBoard as it goes, figures and findings by `close()` or when the
            process ends. Of several processes the first one writes.

    Raises:
        InputError: ``every`` or ``profile_every`` < 1, ``history`` < 2; an unknown reading or keep;
            ``keep="signs"`` with ``profile``, or where c is above 0.002;
            another argument that is of a wrong kind; an optimizer's hooks never fire, it holds none
            of the model's parameters or is LBFGS; FSDP1; not every process that holds a part of the
            parameters builds a probe; ``output`` holds a run already.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(64, 10)
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
        >>> with OpposingPenaltyProbe(net, optimizer) as probe:
        ...     for _ in range(3):
        ...         net(torch.randn(8, 64)).square().mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> len(probe.records), probe.records[-1].penalized
        (3, 650)
    """

    _recording: "Recording | None" = None
    _process = 0
    _summed_up: Mapping[str, Any] = MappingProxyType({})  # of a run folder that is closed

    def _begin(self, output: Path | None) -> None:
        from .norms import Norms

        self._norms = Norms(unwrap(self._model), self.named_parameters())
        if output is not None:
            self._open(output)

    def _open(self, output: Path) -> None:
        from ..runs.folder import RunFolder, Unwritten, check_free
        from .recording import Recording

        check_free(output)
        place = output.absolute()  # wherever the script goes
        folder = Unwritten(place) if known_rank() else RunFolder(place)
        self._process = os.getpid()
        self._rounds.new(0, False)
        self._recording = Recording(weakref.proxy(self), folder, self._loop())
        _writing.add(self)
        _undrawn[self._recording] = self._process
        ENDINGS.add(_stop)
        atexit.unregister(_at_exit)
        atexit.register(_at_exit)

    def _loop(self) -> "Loop":
        from .recording import Loop

        is_notebook = "ipykernel" in sys.modules
        script = "session" if is_notebook or not sys.argv[0] else Path(sys.argv[0]).name
        command_line = script if is_notebook else shlex.join(sys.argv)
        model = unwrap(self._model)
        stages = layers(model, coarse=True) if self._finds_layers else self.layers
        return Loop(type(model).__name__, stages, script, command_line, "loop", self._norms)

    def _writes(self) -> "Recording | None":
        """What writes; None in a process that was forked from the one that does."""
        return self._recording if self._recording and os.getpid() == self._process else None

    # --- as it steps ------------------------------------------------------------------------------

    def _after(self, watched: "WatchedOptimizer") -> None:
        super()._after(watched)
        recording = self._writes()
        if recording is None:
            return
        try:
            last = self.steps - 1  # `log` may still add to the present one
            with ENDINGS.wait():
                recording.stepped(watched.optimizer, self, last)
        except Exception as error:
            why = first_line(error)
            self._tell(f"not everything is written: {why}", about=why)

    def for_writing(self) -> tuple[StepRecord, ...]:
        """The records since the last call, for who writes them down; they stay."""
        if self._recording is None:
            return super().for_writing()
        return self._rounds.new(self.steps, self._has_ended())

    def log(
        self, *, loss: float | Tensor | None = None, top1: float | Tensor | None = None
    ) -> None:
        """Add what only the loop knows to the run folder and TensorBoard, for the last step taken.

        Args:
            loss: of the step's batch; a tensor is read when it is written, not here.
            top1: of an evaluation after it, as a share of 1; a row of ``epochs.csv``. Ahead of
                training it is of step 0.

        Raises:
            InputError: the probe has no ``output``, or is closed; it is not one number, or top-1
                is not a share.
        """
        if self._recording is None:
            raise InputError(
                "there is no run folder to log to: give the probe output=, and log before close()"
            )
        loss, top1 = _one_number(loss, "loss"), _one_number(top1, "top1")
        if top1 is not None and not 0 <= float(top1) <= 1:
            raise InputError(f"top1 must be a share of 1, from 0 to 1, got {float(top1):g}")
        self._recording.log(self.steps, loss, top1)

    # --- what it came to --------------------------------------------------------------------------

    def summary(self) -> "Summary":
        """What decay did so far, as the command line shows it when a run ends.

        Printed, or shown in a notebook, it is the verdict, the ledger and the layers; ``numbers``
        is what ``summary.json`` holds. Reading waits for the device.

        Raises:
            InputError: this is a copy of the probe that measured.
        """
        from ..runs.summary_tables import Summary

        return Summary(self._summed_up or self._numbers())

    def _numbers(self) -> dict[str, Any]:
        from ..runs.recorder import Recorder
        from .recording import most_decayed, summed_up

        if self._model is None:
            raise InputError("a copy of a probe has no model: ask the probe itself for a summary")
        chosen = most_decayed(self.optimizers)
        found = summed_up(self, Recorder.of(self), self._loop(), chosen)
        for name in ("rate", "mass", "flip_rate"):  # of all steps, not of the records that are kept
            found[name]["mean"] = getattr(self.total, name)
        return {**found, "status": "finished"}

    def _repr_html_(self) -> str:
        return html.escape(repr(self)) if self._model is None else self.summary()._repr_html_()

    # --- state ------------------------------------------------------------------------------------

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where the run that made ``state`` stopped; a run folder begins there.

        Raises:
            InputError: it is of other parameters.
        """
        super().load_state_dict(state)
        if self._recording is not None:
            self._recording.recorder.steps = self.steps

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle holds what was measured, and writes nothing."""
        return super().__getstate__() | {"_recording": None}

    # --- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Detach and free the copies, end the run folder; the records stay. Safe to call twice."""
        self._end("finished")
        super().close()

    def __exit__(self, *error: Any) -> None:
        """Close."""
        self._end(status_of(error[0] if error else None))
        super().__exit__(*error)

    def __del__(self) -> None:
        """Detach, and write what is left; the figures are drawn when the process ends."""
        super().__del__()
        self._end("finished", draws=False)

    def _end(self, status: str, draws: bool = True) -> None:
        """End the run folder."""
        recording = self._writes()
        if recording is None:
            return
        super().close()
        try:
            with ENDINGS.wait():
                recording.end(status, self)
            self._summed_up = recording.summary
            if draws:
                del _undrawn[recording]
                recording.draw()
        except Exception as error:
            self._tell(f"not everything is written: {first_line(error)}")
        finally:
            self._recording = None
            if all(one._recording is None for one in _writing):
                ENDINGS.remove(_stop)


_writing: weakref.WeakSet[OpposingPenaltyProbe] = weakref.WeakSet()
#: What has no figures yet, by the process that draws them. Held here, its files outlive the probe:
#: garbage's open files are closed before it can write.
_undrawn: dict["Recording", int] = {}


def _one_number(value: Any, what: str) -> float | Tensor | None:
    """One number; what is on a device stays there."""
    if value is None or (
        isinstance(value, Tensor)
        and not (value.numel() != 1 or value.is_complex() or value.is_meta)
    ):
        return value
    try:
        if isinstance(value, str | Tensor):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{what} must be one number, got {type(value).__name__}") from None


def _at_exit() -> None:
    """The script is over."""
    if os.getpid() in _undrawn.values():
        close_at_exit(_end_all)


def _stop() -> None:
    """A signal ends the process."""
    _end_all("interrupted")


def _end_all(status: str) -> None:
    for probe in tuple(_writing):
        probe._end(status, draws=False)
    for recording in [one for one, process in _undrawn.items() if process == os.getpid()]:
        del _undrawn[recording]
        recording.draw()
