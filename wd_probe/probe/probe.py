"""The opposing-penalty rate of an ordinary training loop, step by step."""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import as_path, check_choice, check_count, check_rate, check_type
from ..errors import InputError, Teller, first_line
from ..hooks import Missing, StepHooks, classes, hooked_all, is_captured, weakly
from ..layering import Layer, Layers, check_made, clean_name, layers, layers_or, named_parameters
from ..sharding import Shards, refuse_flat
from . import kernel
from .copies import Keep, same
from .dynamics import LATE
from .penalties import Effects, Reading
from .records import ProfileRecord, StepRecord, Tally, fields, since, summed
from .rounds import Rounds
from .step import WatchedOptimizer
from .sums import WIDTH

#: Steps whose numbers may wait on the device before they are read without being asked for.
_MOST_PENDING = 256


class OpposingPenaltyProbe:
    """What :class:`wd_probe.OpposingPenaltyProbe` is, but for a run folder, which `_open` adds.

    Its arguments are explained there.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        every: int = 1,
        profile: Sequence[float] = (),
        profile_every: int = 1,
        groups: Layers | None = None,
        exact: bool | None = None,
        reading: Reading = "paired",
        parameters: Mapping[str, Tensor] | None = None,
        keep: Keep = "whole",
        history: int = 4096,
        output: str | os.PathLike[str] | None = None,
    ) -> None:
        check_choice(keep, "keep", get_args(Keep))
        check_choice(reading, "reading", get_args(Reading))
        check_count(every, "every")
        check_count(profile_every, "profile_every")
        check_count(history, "history", least=2)
        check_type(profile, "profile", Sequence, "a list of rates")
        check_type(exact, "exact", (bool, NoneType), "True, False or None")
        if parameters is not None:
            check_type(parameters, "parameters", Mapping, "a mapping from names to tensors")
            for p in parameters.values():
                check_type(p, "each of parameters", Tensor, "a tensor")
        if keep == "signs" and profile:
            raise InputError("keep='signs' tells nothing of other rates: leave profile out")
        refuse_flat(model)
        self.optimizers = hooked_all(optimizer)
        self.every, self.profile_every = every, profile_every
        self.exact, self.reading = exact, reading
        self.profile_rates = tuple(check_rate(rate, "each of profile") for rate in profile)
        self.layers = layers_or(groups, model)
        self._model = model
        self._finds_layers = groups is None
        self._tell = self._teller()
        self.names: tuple[str, ...] = ()
        self._row: dict[Tensor, int] = {}
        self._strangers: set[Tensor] = set()
        self._held: dict[WatchedOptimizer, list[Tensor]] = {}  # as last looked through for new ones
        self.keep, self._effects = keep, Effects()
        self._watched = [self._watching(one) for one in self.optimizers]
        self._take_in(named_parameters(model) if parameters is None else self._own(parameters))
        if not any(p in self._row for watched in self._watched for p in watched.held()):
            raise InputError(
                "the optimizer holds none of the model's parameters; build it from "
                "model.parameters() after the model is made, moved and wrapped, or give what it "
                "holds as parameters="
            )
        self.steps = 0
        self._stepped: set[WatchedOptimizer] = set()  # in the present round
        # by optimizer the others over some of its weights, whose steps are rounds of their own
        self._rivals: dict[WatchedOptimizer, weakref.WeakSet[WatchedOptimizer]] = {}
        self._rounds = Rounds(self.profile_rates, history)
        self._told = np.zeros((0, WIDTH))  # what `metrics` has given
        for watched in self._watched:
            watched.penalties.check_rules()
            watched.refuse_signs()
        if kernel.slowly(self._row):
            self._tell(
                "no C compiler was found ($CC, else cc), so torch counts; with one the probe is "
                "six times as fast"
            )
        if self._shards:
            self._shards.meet(self._tell)
        self._begin(None if output is None else as_path(output, "output"))
        self._missing = Missing(self._row, weakly(self._miss))
        self._hooks: dict[WatchedOptimizer | None, StepHooks | Missing] = {None: self._missing}
        self._hooks |= {watched: self._attach(watched) for watched in self._watched}

    def _teller(self) -> Teller:
        """What says what cannot be measured."""
        return Teller()

    def _begin(self, output: Path | None) -> None:
        """Write what is measured to a run folder, if one is named."""
        if output is not None:
            raise InputError("wd_probe.OpposingPenaltyProbe alone writes a run folder")

    def _watching(self, optimizer: Optimizer) -> WatchedOptimizer:
        return WatchedOptimizer(
            optimizer,
            self._row,
            exact=self.exact,
            reading=self.reading,
            keep=self.keep,
            effects=self._effects,
            tell=self._tell,
        )

    def _attach(self, watched: WatchedOptimizer) -> StepHooks:
        return StepHooks(
            watched.optimizer,
            partial(weakly(self._before), watched),
            partial(weakly(self._after), watched),
            graded=partial(weakly(self._graded), watched),
            early=partial(weakly(self._early), watched),
            outermost=True,
        )

    def join(self, optimizer: Optimizer) -> None:
        """Measure one more optimizer of the model, as one of the same round.

        A round ends when one of them steps again, or another one that holds some of its weights.

        Raises:
            InputError: as for the first ones.
        """
        for one in hooked_all((*self.optimizers, optimizer))[len(self.optimizers) :]:
            watched = self._watching(one)
            watched.penalties.check_rules()
            watched.refuse_signs()
            own = set(watched.held())
            rivals = [other for other in self._watched if not own.isdisjoint(other.held())]
            self._rivals[watched] = weakref.WeakSet(rivals)
            for rival in rivals:
                self._rivals.setdefault(rival, weakref.WeakSet()).add(watched)
            self.optimizers += (one,)
            self._watched.append(watched)
            self._hooks[watched] = self._attach(watched)

    def leave(self, optimizer: Optimizer) -> None:
        """Let go of an optimizer that another one has replaced; what it did stays counted."""
        for watched in [one for one in self._watched if one.optimizer is optimizer]:
            self._hooks.pop(watched).remove()
            self._watched.remove(watched)
            self._held.pop(watched, None)
            self._rivals.pop(watched, None)
            watched.close()
        self.optimizers = tuple(watched.optimizer for watched in self._watched)

    def _own(self, given: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Parameters by the model's own names, without what a wrapper has put before them."""
        own = {name for name, _ in named_parameters(self._model)}
        for name, p in given.items():
            parts = clean_name(name, self._model).split(".")
            tails = (".".join(parts[start:]) for start in range(len(parts)))
            yield next((tail for tail in tails if tail in own), name), p

    def _take_in(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Give every new parameter a row: its name's, if free, or one after those there are."""
        names = list(self.names)
        taken = set(self._row.values())
        free = {name: row for row, name in enumerate(names) if row not in taken}
        for name, p in named:
            check_made(name, p)
            if p.is_complex():
                self._tell(f"{name} is complex, and R_op leaves it out")
            elif p.is_floating_point() and p not in self._row:  # quantized weights do not decay
                self._row[p] = free.pop(name, len(names))
                if self._row[p] == len(names):
                    names.append(name)
        self.names = tuple(names)
        self._shards = Shards(self._row)

    # --- around the step, on the device -------------------------------------------------------

    @torch.no_grad()
    def _before(self, watched: WatchedOptimizer, has_closure: bool) -> None:
        watched.forget()
        if is_captured():
            self._tell(
                "a CUDA graph replays its steps without hooks, so R_op is not measured there"
            )
            return
        if (self._next(watched) - 1) % self.every == 0:
            self._safely(watched, lambda: watched.remember(self._known(watched), has_closure))

    def _miss(self, passes: int) -> None:
        self._tell(
            f"the weights move, and in {passes} backward passes no step() of "
            f"{classes(self.optimizers)} was seen: R_op is not measured; attach to the optimizer "
            "whose step() the loop, or what it calls, calls"
        )

    def _graded(self, watched: WatchedOptimizer) -> None:
        self._safely(watched, watched.graded)

    def _early(self, watched: WatchedOptimizer) -> None:
        if watched.steps_twice():
            self._tell(
                "a compiled step calls other hooks after R_op's copy of it has stepped: where they "
                "change gradients (clipping), R_op is that of gradients unchanged; change them "
                "ahead of optimizer.step()"
            )

    @torch.no_grad()
    def _after(self, watched: WatchedOptimizer) -> None:
        self._missing.remove()
        step = self._next(watched)
        if step > self.steps:
            self._stepped.clear()
        self.steps = step
        self._stepped.add(watched)
        self._safely(watched, lambda: self._count(watched))
        if self._rounds.waiting(step) >= _MOST_PENDING:
            self._safely(watched, self.flush)

    def _next(self, watched: WatchedOptimizer) -> int:
        """The number of the round that an optimizer's coming step belongs to."""
        has_ended = watched in self._stepped or any(
            rival in self._stepped for rival in self._rivals.get(watched, ())
        )
        return self.steps + 1 if has_ended or not self.steps else self.steps

    def _safely(self, watched: WatchedOptimizer, measure: Callable[[], None]) -> None:
        """What cannot be measured must not end somebody's training."""
        try:
            measure()
        except Exception as error:
            watched.forget()
            why = first_line(error)
            self._tell(f"R_op of step {self.steps or 1} is not measured: {why}", about=why)

    def _known(self, watched: WatchedOptimizer) -> list[list[Tensor]]:
        """The optimizer's parameters that are measured, by group; new ones are looked for."""
        held = watched.held()
        if not same(held, self._held.get(watched, ())):
            self._look_through(watched, held)
        groups = [group["params"] for group in watched.optimizer.param_groups]
        if not self._strangers:
            return groups
        return [[p for p in params if p in self._row] for params in groups]

    def _look_through(self, watched: WatchedOptimizer, held: list[Tensor]) -> None:
        """Take in the parameters that have joined an optimizer, and let go of those replaced."""
        if watched in self._held:
            self._let_go()
        new = {p for p in held if p not in self._row and p not in self._strangers}
        if new:
            self._take_in(item for item in named_parameters(self._model) if item[1] in new)
            if self._finds_layers:
                self.layers = layers(self._model)
            self._strangers |= new - self._row.keys()
        others = sum(map(Tensor.is_floating_point, self._strangers))
        if others:
            self._tell(
                f"{type(watched.optimizer).__name__} steps {others} parameters that "
                "are none of the model's; R_op leaves them out",
                about="strangers",
            )
        self._held[watched] = held

    def _let_go(self) -> None:
        """Free what is kept of parameters that neither the model nor an optimizer has any more."""
        kept = {p for watched in self._watched for p in watched.held()}
        self._strangers &= kept
        kept.update(p for _, p in named_parameters(self._model))
        gone = self._row.keys() - kept
        self._rounds.renew([self._row.pop(p) for p in gone])
        for watched in self._watched if gone else ():
            watched.close()
        self._shards = Shards(self._row)

    def _count(self, watched: WatchedOptimizer) -> None:
        measured, passed = divmod(self.steps - 1, self.every)
        rates = self.profile_rates if measured % self.profile_every == 0 else ()
        counted = (
            watched.passed(self._known(watched)) if passed else watched.count(self._shards, rates)
        )
        if counted is not None:
            self._rounds.add(counted, self.steps, self.names, self.layers)

    # --- on the host, when asked --------------------------------------------------------------

    def flush(self) -> None:
        """Read what is still on the device into `records`: one transfer for all pending steps."""
        self._rounds.flush()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The measured parameters by the names the records use."""
        return ((self.names[row], p) for p, row in self._row.items())

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """The measured steps, oldest first, the newest last; steps that a GradScaler voided are
        left out. All of them, up to ``history``.
        """  # fmt: skip
        self._missing.look()
        return self._rounds.records()

    @property
    def total(self) -> StepRecord:
        """All measured steps together: exact sums over every one, and the number of the last."""
        self._missing.look()
        values = self._rounds.total(len(self.names))
        return StepRecord(self.steps, values, self.names, self.layers)

    @property
    def late(self) -> StepRecord:
        """As `total`, but balance, angle and timescale are those of the last quarter of the steps.

        Of more than 64 steps the quarter begins with one of 64 that are noted, evenly.
        """
        values = self._rounds.late(len(self.names), LATE)
        return StepRecord(self.steps, values, self.names, self.layers)

    def metrics(self, *, groups: Layers | None = None, peek: bool = False) -> dict[str, float]:
        """Numbers over the steps measured since the last call, flat, as loggers take them.

        For ``wandb.log``, ``mlflow.log_metrics``, ``trackio.log`` or a ``SummaryWriter``. A share
        is of 1, an angle in radians, and NaN stands where there is no number.

        Args:
            groups: the same of each of these layers too, such as ``wd_probe.layers(model)``.
            peek: leave it to the next call to begin where this one did.

        Returns:
            By name ("R_op/rate", "decay/balance", ...); empty if nothing was measured.

        Raises:
            InputError: ``groups`` are no layers.
        """
        if groups is not None:
            check_type(groups, "groups", Iterable, _LAYERS)
            for layer in groups:
                check_type(layer, "groups", Layer, _LAYERS)
        values = self.total.values
        told = np.zeros_like(values)
        told[: len(self._told)] = self._told
        if np.array_equal(values, told, equal_nan=True):
            return {}
        if not peek:
            self._told = values
        gone = since(values, told)
        found = _metrics(Tally(*fields(gone.sum(axis=0))), "")
        if groups is not None:
            for layer, row in zip(groups, summed(groups, self.names, gone), strict=True):
                found |= _metrics(Tally(*fields(row)), f"/{layer.index:02d} {layer.name}")
        return found

    def drain(self) -> tuple[StepRecord, ...]:
        """The records since the last call, which the probe then forgets: for long runs.

        Where there are several optimizers, a round that one of them may still step in stays until
        it has ended, or the probe is closed.
        """
        return self._rounds.drain(self.steps, self._has_ended())

    def for_writing(self) -> tuple[StepRecord, ...]:
        """The records since the last call, for who writes them down."""
        return self.drain()

    def _has_ended(self) -> bool:
        """Whether every optimizer has stepped in the present round."""
        return self._stepped.issuperset(self._watched)

    @property
    def profiles(self) -> tuple[ProfileRecord, ...]:
        """R_op at the rates of ``profile``, for each step it was taken at, up to ``history``."""
        return self._rounds.profiles()

    # --- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The steps counted so far and their sums, as plain values; records are not in it."""
        total = self.total
        return {
            "steps": self.steps,
            "names": list(total.names),
            "values": total.values.tolist(),
            **self._rounds.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where the run that made ``state`` stopped.

        Raises:
            InputError: it is of other parameters.
        """
        if tuple(state.get("names", ())) != self.names:
            raise InputError("this state is of a probe on other parameters")
        self._rounds.restart(state["values"], state)
        self._stepped, self.steps = set(self._watched), int(state["steps"])
        self._told = self.total.values

    def close(self) -> None:
        """Detach and free the copies; the records stay. Safe to call twice."""
        self._missing.look()
        _remove(self._hooks)
        self.flush()
        self._rounds.finish()
        for watched in self._watched:
            watched.close()

    def __del__(self) -> None:
        """Detach; an optimizer may be a part of the same garbage."""
        _remove(getattr(self, "_hooks", {}))

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle holds what was measured, and is attached to nothing."""
        self.flush()
        attached = (
            "_hooks",
            "_watched",
            "optimizers",
            "_stepped",
            "_row",
            "_strangers",
            "_held",
            "_effects",
        )
        nothing: dict[str, Any] = {name: type(self.__dict__[name])() for name in attached}
        return self.__dict__ | nothing | {"_shards": None, "_model": None}

    def __repr__(self) -> str:
        """What is watched, and what came of it so far."""
        names, rate = classes(self.optimizers), self.total.total.rate
        return f"OpposingPenaltyProbe({names}, steps={self.steps}, rate={rate:.6g})"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


_LAYERS = "a layer, as of wd_probe.layers(model),"

#: What :meth:`OpposingPenaltyProbe.metrics` gives, by its name there.
METRICS = {
    "R_op/rate": "rate",
    "R_op/mass": "mass",
    "R_op/flip_rate": "flip_rate",
    "decay/balance": "balance",
    "decay/angular_update": "angular_update",
    "decay/relative_update": "relative_update",
    "decay/remaining": "remaining",
    "decay/norm": "norm",
}


def _metrics(tally: Tally, suffix: str) -> dict[str, float]:
    return {name + suffix: getattr(tally, own) for name, own in METRICS.items()}


def _remove(hooks: Mapping[WatchedOptimizer | None, StepHooks | Missing]) -> None:
    for one in hooks.values():
        one.remove()
