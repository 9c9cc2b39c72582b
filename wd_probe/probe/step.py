"""One optimizer's steps seen from both sides: what is penalized by how much, and the counts."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from ..decay.methods import Moment, WeightDecay, attached, voided
from ..decay.rules import Effect, Rule, decay_effect
from ..decay.undecayed import undecayed
from ..errors import Teller, first_line
from ..sharding import Shards, local
from . import formulas as penalty
from . import kernel
from .movement import Moved, movements, tells_movement

#: Which penalty Eq. 10 asks about where pwd decays before the forward pass (theory fact 9).
Reading = Literal["paired", "literal"]
#: What is kept of the weights during a step: all of it, the upper half of every number, or nothing
#: where the optimizer's state tells how far they moved.
Keep = Literal["whole", "half", "nothing"]
#: How a tensor's penalty is had: P = cθ beside the step; P = cû after it, or û/(1 + c); P = cθ
#: ahead of the gradient, read as paired or literally; or the step against the same without decay.
_Way = Literal["beside", "after", "proximal", "ahead", "literal", "exact"]

_OWN_WAYS: dict[Rule, _Way] = {
    "wd": "beside",
    "scaled": "beside",
    "rwd": "after",
    "proximal": "proximal",
    "l2": "exact",
    "other": "exact",
}
_ATTACHED_WAYS: dict[Moment, _Way] = {
    "step": "beside",
    "update": "after",
    "forward": "ahead",
    "gradient": "exact",
}
_WHY_NOT: dict[Rule, str] = {
    "none": "its weight_decay changes nothing",
    "l2": "its weight_decay is L2 regularization (the gradient becomes g + λθ)",
    "other": "its decay rule is not known",
}
_EXACTLY = (
    "measured against a copy of the optimizer that steps without decay: slower, with another copy "
    "of weights, gradients and state in memory; "
)
#: An address, how the numbers there are laid out, and of which kind.
_Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype]
#: Rules by the optimizer's class and options: loops with an optimizer for each tensor have many.
Effects = dict[tuple[Any, ...], Effect]


@dataclass(frozen=True, slots=True)
class _Penalty:
    """What is taken off tensors that are alike."""

    way: _Way
    c: float | Tensor
    rate: float  # λ
    group: dict[str, Any]

    @property
    def factor(self) -> float | Tensor:
        """What θ' is counted at."""
        if self.way == "beside":
            return self.c
        return self.size if self.way == "literal" else 0.0

    @property
    def size(self) -> float | Tensor:
        """Σ|P| in units of the sums counted."""
        if self.way == "exact":
            return 1.0
        if self.way in ("beside", "proximal"):
            return self.c
        # (1 − c) of what was penalized stands: P is c/(1 − c) of that
        if isinstance(self.c, Tensor):
            return torch.where(self.c < 1, self.c / (1 - self.c), 0.0)
        return self.c / (1 - self.c) if self.c < 1 else 0.0

    @property
    def opposes(self) -> bool:
        """Whether it can."""
        return self.way in ("beside", "literal", "exact")


@dataclass(frozen=True, slots=True)
class Counted:
    """One optimizer's measured step, whose numbers may still be on the device.

    Attributes:
        rows: which of the probe's parameters were penalized.
        penalties: for each the number of what was taken off it.
        sizes: of each penalty Σ|P| in units of the sums counted.
        opposes: of each penalty whether it can oppose.
        sums: gives the float64 (len(rows), 6) counts of the whole parameters.
        profile: gives the float64 (len(rows), rates) counts at other rates, if asked for and to be
            had.
        voided: 1 where `GradScaler` left this step out.
    """

    rows: NDArray[np.int64]
    penalties: NDArray[np.int64]
    sizes: list[float | Tensor]
    opposes: list[bool]
    sums: Callable[[], Tensor]
    profile: Callable[[], Tensor] | None
    voided: Tensor | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """How to count a step; holds while the same tensors are penalized in the same ways.

    Attributes:
        weights: the penalized parameters; where each lies is its ``place``.
        ways: of each.
        version: of the copies that it counts against.
        tally: counts those that a closed rule gives.
        rows: see :class:`Counted`.
    """

    weights: list[Tensor]
    places: list[_Place]
    ways: list[_Way]
    version: int
    tally: kernel.Tallying
    rows: NDArray[np.int64]

    def holds(self, weights: list[Tensor], ways: list[_Way], version: int) -> bool:
        """Whether it does for these."""
        return (
            same(weights, self.weights)
            and (ways, version) == (self.ways, self.version)
            and _places(weights) == self.places
        )


class _Copies:
    """A copy of each of some weights, made anew before every step.

    Attributes:
        version: changes where a copy comes to lie elsewhere.
    """

    def __init__(self, half: bool) -> None:
        self.version = 0
        self._half = half
        self._kept: dict[Tensor, Tensor] = {}
        self._weights: list[Tensor] = []
        self._places: list[_Place] = []
        self._passes: list[kernel.Copying] = []

    def __getitem__(self, p: Tensor) -> Tensor:
        return self._kept[p]

    def take(self, weights: list[Tensor]) -> None:
        """Copy these weights."""
        places = _places(weights)
        if not (same(weights, self._weights) and places == self._places):
            self._weights, self._passes = [], []  # as they are if there is no memory for the rest
            self._passes = self._prepared(weights)
            self._weights, self._places = weights, places
        for copying in self._passes:
            copying()

    def _prepared(self, weights: list[Tensor]) -> list[kernel.Copying]:
        by_kind: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for p in weights:
            kept, here = self._kept.get(p), local(p)
            half = self._half and here.dtype == torch.float32
            dtype = torch.bfloat16 if half else here.dtype
            layout = here.shape, here.stride(), dtype
            if kept is None or (kept.shape, kept.stride(), kept.dtype) != layout:
                self.version += 1
                kept = self._kept[p] = torch.empty_like(here, dtype=dtype)
            targets, sources = by_kind.setdefault((here.device, here.dtype), ([], []))
            targets.append(kept)
            sources.append(here)
        return [kernel.Copying(*both) for both in by_kind.values()]


def _places(weights: Sequence[Tensor]) -> list[_Place]:
    """Where their numbers lie."""
    return [
        (here.data_ptr(), here.shape, here.stride(), here.dtype) for here in map(local, weights)
    ]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two lists hold the very same tensors."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


class Watch:
    """Remembers an optimizer's weights before its step, and counts after it.

    Args:
        optimizer: one whose hooks fire.
        rows: the number of each parameter that is measured; others are left alone.
        exact: see :class:`wd_probe.OpposingPenaltyProbe`.
        reading: likewise.
        keep: likewise.
        effects: rules found so far, shared between the optimizers of a probe.
        tell: says what cannot be measured.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rows: Mapping[Tensor, int],
        *,
        exact: bool | None,
        reading: Reading,
        keep: Keep,
        effects: Effects,
        tell: Teller,
    ) -> None:
        self.optimizer, self.exact, self.reading, self.keep = optimizer, exact, reading, keep
        self._rows, self._effects, self._tell = rows, effects, tell
        self._own_effects: dict[tuple[int, int], Effect] = {}
        self._copies = _Copies(half=keep == "half")
        self._plan: _Plan | None = None
        self._live: list[list[Tensor]] = []  # by parameter group
        self._has_closure = False
        self._moves: set[Tensor] = set()  # had again from the optimizer's state
        self._u_hat: dict[Tensor, Tensor] = {}
        self._twin_error = ""
        self._steps_twice = exact is not False

    def held(self) -> list[Tensor]:
        """The optimizer's parameters."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # --- around the step, on the device -------------------------------------------------------

    def remember(self, groups: Iterable[Sequence[Tensor]], has_closure: bool) -> None:
        """Copy what this step will move of these parameters, which stand by parameter group."""
        self._has_closure = has_closure
        self._live = [
            [p for p in params if p.grad is not None or (has_closure and p.requires_grad)]
            for params in groups
        ]
        self._moves = self._readable() if self.keep == "nothing" else set()
        self._copies.take(self._copied())

    def _copied(self) -> list[Tensor]:
        live = [p for params in self._live for p in params]
        return [p for p in live if p not in self._moves] if self._moves else live

    def _readable(self) -> set[Tensor]:
        """Those of the weights that the optimizer's state will give back, as the penalty is cθ."""
        weights, numbers, penalties = self._penalized()
        told = [
            item.way == "beside" and item.c < 1 and tells_movement(self.optimizer, item.group)
            for item in penalties
        ]
        return {
            p for p, k in zip(weights, numbers, strict=True) if told[k] and p.dtype == torch.float32
        }

    @torch.no_grad()
    def graded(self) -> None:
        """The gradient is there: where a closed rule will not do, step a copy without decay now."""
        self._u_hat = {}
        decay = attached(self.optimizer)
        if self._has_closure and decay is not None and decay.moment == "forward":
            self._copies.take(self._copied())  # the closure's forward pass has decayed the weights
        if not any(self._live) or not self._needs_twin():
            return
        try:
            self._u_hat = undecayed(self.optimizer)
        except Exception as error:  # what a copy cannot do must not end somebody's training
            self._twin_error = first_line(error)

    def _needs_twin(self) -> bool:
        """Whether any penalty is to be had exactly; computes no factors, as every step asks."""
        decay = attached(self.optimizer)
        if not self._steps_twice:
            return False
        if decay is not None:
            forced = bool(self.exact) and decay.moment in ("step", "update")
            return decay.rate > 0 and (forced or decay.moment == "gradient")
        return any(
            rule != "none" and (bool(self.exact) or _OWN_WAYS[rule] == "exact")
            for number, group in enumerate(self.optimizer.param_groups)
            if group.get("weight_decay", 0)
            for like in {p.ndim: p for p in group["params"]}.values()
            for rule in (self._effect(number, group, like).rule,)
        )

    def count(self, shards: Shards, profile_rates: Sequence[float]) -> Counted | None:
        """Count what the step did; None if nothing was remembered of it."""
        if not any(self._live):
            return None
        if self._twin_error:  # and the optimizer itself could
            self._steps_twice = False
            self._tell(
                f"a copy of {type(self.optimizer).__name__} cannot be stepped "
                f"({self._twin_error}), so R_op is not measured there from now on"
            )
        if self._has_closure:
            self._live = [[p for p in params if p.grad is not None] for params in self._live]
        weights, numbers, penalties = self._penalized()
        self._live = []
        exact: list[tuple[Tensor, int]] = []
        if any(item.way == "exact" for item in penalties):
            both = list(zip(weights, numbers, strict=True))
            exact = [(p, k) for p, k in both if penalties[k].way == "exact" and p in self._u_hat]
            closed = [(p, k) for p, k in both if penalties[k].way != "exact"]
            weights, numbers = [p for p, _ in closed], [k for _, k in closed]
        each = [penalties[k] for k in numbers]
        plan = self._planned(weights, each)
        self._plan = None if self._moves else plan
        factors = [item.factor for item in penalties]
        sums = [plan.tally([factors[k] for k in numbers])] if weights or not exact else []
        for p, _ in exact:
            counted = penalty.tally_exact(self._copies[p], local(self._u_hat[p]), local(p))
            sums.append(counted.unsqueeze(0))
        self._u_hat = {}
        profile = None
        if profile_rates and all(item.way == "beside" for item in penalties):
            found = self._profile(weights, each, profile_rates)
            profile = shards.sum(weights, found)
        return Counted(
            np.concatenate([plan.rows, self._numbered([p for p, _ in exact])]),
            np.array(numbers + [k for _, k in exact], dtype=np.int64),
            [item.size for item in penalties],
            [item.opposes for item in penalties],
            shards.sum([*weights, *(p for p, _ in exact)], torch.cat(sums)),
            profile,
            voided(self.optimizer),
        )

    def _planned(self, weights: list[Tensor], penalties: list[_Penalty]) -> _Plan:
        """How to count these weights: as the last time, where nothing has changed."""
        ways = [item.way for item in penalties]
        version = self._copies.version
        if self._plan is not None and self._plan.holds(weights, ways, version):
            return self._plan
        pairs = self._pairs(weights, penalties)
        tally = kernel.Tallying([one for one, _ in pairs], [other for _, other in pairs])
        return _Plan(weights, _places(weights), ways, version, tally, self._numbered(weights))

    def _pairs(
        self, weights: Sequence[Tensor], penalties: Sequence[_Penalty]
    ) -> list[tuple[Tensor | Moved, Tensor]]:
        """What to count against what."""
        given = list(zip(weights, penalties, strict=True))
        read = [(p, item.group, float(item.c)) for p, item in given if p in self._moves]
        moved = iter(movements(self.optimizer, read) if read else ())
        pairs: list[tuple[Tensor | Moved, Tensor]] = []
        for p, item in given:
            after = local(p)
            before = next(moved) if p in self._moves else self._copies[p]
            # P is a share of û where it falls after the step: what stands is weighed, and cannot
            # oppose
            turned = item.way in ("after", "proximal")
            pairs.append((after, self._copies[p]) if turned else (before, after))
        return pairs

    def _numbered(self, weights: Sequence[Tensor]) -> NDArray[np.int64]:
        return np.array([self._rows[p] for p in weights], dtype=np.int64)

    def _profile(
        self, weights: Sequence[Tensor], penalties: Sequence[_Penalty], rates: Sequence[float]
    ) -> Tensor:
        rows = []
        pairs = self._pairs(weights, penalties)
        for (before, after), item in zip(pairs, penalties, strict=True):
            c = float(item.c)
            factors = [c * wanted / item.rate for wanted in rates]
            theta = before.before(after) if isinstance(before, Moved) else before
            rows.append(penalty.profile(theta, after, c, factors).double().cpu())
        return torch.stack(rows) if rows else torch.zeros(0, len(rates), dtype=torch.float64)

    def forget(self) -> None:
        """Drop what was remembered."""
        self._live, self._u_hat, self._twin_error = [], {}, ""

    def close(self) -> None:
        """Free the copies."""
        self.forget()
        self._plan = None
        self._copies = _Copies(half=self.keep == "half")

    # --- what is penalized, and by which rule -------------------------------------------------

    def _penalized(self) -> tuple[list[Tensor], list[int], list[_Penalty]]:
        """The penalized weights of this step, of each the number of its penalty, and those."""
        decay = attached(self.optimizer)
        weights: list[Tensor] = []
        numbers: list[int] = []
        penalties: list[_Penalty] = []
        for number, params in enumerate(self._live):
            known: dict[float | None, int | None] = {}  # by what tells a group's tensors apart
            for p in params:
                kind = p.ndim if decay is None else decay.share(p)
                if kind not in known:
                    known[kind] = None
                    item = self._penalty(decay, number, p)
                    if item is not None and (item.way != "exact" or self._steps_twice):
                        known[kind] = len(penalties)
                        penalties.append(item)
                at = known[kind]
                if at is not None:
                    weights.append(p)
                    numbers.append(at)
        return weights, numbers, penalties

    def _penalty(self, decay: WeightDecay | None, number: int, p: Tensor) -> _Penalty | None:
        group = self.optimizer.param_groups[number]
        if decay is None:
            return self._own(number, group, p)
        if not decay.decays(p):
            return None
        way = _ATTACHED_WAYS[decay.moment]
        if way == "ahead":
            way = "literal" if self.reading == "literal" else "ahead"
        elif self.exact:
            way = "exact"
        idle = decay.took_nothing(self.optimizer)
        return _Penalty(way, 0.0 if idle else decay.factor(p, group), decay.rate, group)

    def _own(self, number: int, group: dict[str, Any], p: Tensor) -> _Penalty | None:
        rate = float(group.get("weight_decay", 0))
        if not rate:
            return None
        effect = self._effect(number, group, p)
        if effect.rule == "none":
            return None
        way = "exact" if self.exact else _OWN_WAYS[effect.rule]
        c = 0.0 if way == "exact" else effect.factor(group)
        return _Penalty(way, c, rate, group)

    def _effect(self, number: int, group: dict[str, Any], like: Tensor) -> Effect:
        key = (number, like.ndim)
        if key in self._own_effects:
            return self._own_effects[key]
        known = (*_options(self.optimizer, group), like.ndim, like.dtype, like.device)
        if known not in self._effects:
            # ZeroRedundancyOptimizer leaves the stepping to another, over its part of the weights.
            stepping = getattr(self.optimizer, "optim", self.optimizer)
            self._effects[known] = decay_effect(stepping, group, like)
        effect = self._own_effects[key] = self._effects[known]
        if effect.rule in _WHY_NOT:
            unmeasured = effect.rule == "none" or self.exact is False
            self._tell(
                f"{type(self.optimizer).__name__}, parameter group {number}: "
                f"{_WHY_NOT[effect.rule]}, so R_op is "
                + ("not measured there; " if unmeasured else _EXACTLY)
                + "build it with weight_decay=0 and attach wd_probe.WeightDecay(model, optimizer, "
                '"wd", rate=...) for the paper\'s decay'
            )
        return effect

    def check_rules(self) -> None:
        """Say at once, rather than at the first step, what will not be measured."""
        decay = attached(self.optimizer)
        if decay is not None:
            if decay.moment == "gradient" and self.exact is None and decay.rate:
                self._tell(f"{decay.method} goes through the optimizer, so R_op is {_EXACTLY[:-2]}")
            return
        groups = self.optimizer.param_groups
        for number, group in enumerate(groups):
            for p in group["params"]:
                self._own(number, group, p)
        if not any(group.get("weight_decay", 0) for group in groups):
            self._tell(
                f"{type(self.optimizer).__name__} has weight_decay=0 in every group and no "
                "wd_probe.WeightDecay: nothing is penalized, so R_op is undefined (NaN)"
            )


def _options(optimizer: Optimizer, group: dict[str, Any]) -> tuple[Any, ...]:
    """What an optimizer's rule may depend on."""
    plain = {k: v for k, v in vars(optimizer).items() if isinstance(v, bool | int | float | str)}
    chosen = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    return type(optimizer), repr(plain), repr(chosen)
