"""What a step takes off each weight: an attached WeightDecay says it, or an optimizer's effect."""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from ..decay.doubles import judged_near
from ..decay.methods import Moment, WeightDecay, attached
from ..decay.places import looks_like_a_rate, rate_held
from ..decay.rules import Effect, Rule, effect_at_work, options_of
from ..errors import Teller
from .sums import Way

#: Which penalty Eq. 10 asks about where pwd decays before the forward pass (theory fact 9).
Reading = Literal["paired", "literal"]
#: Rules by the optimizer's class and options: loops with an optimizer for each tensor have many.
Effects = dict[tuple[Any, ...], Effect]

_OWN_WAYS: dict[Rule, Way] = {
    "wd": "beside",
    "scaled": "beside",
    "rwd": "after",
    "proximal": "proximal",
    "l2": "exact",
    "other": "exact",
}
_ATTACHED_WAYS: dict[Moment, Way] = {
    "step": "beside",
    "update": "after",
    "forward": "ahead",
    "gradient": "exact",
}
_WHY_NOT: dict[Rule, str] = {
    "none": "its {name} changes nothing",
    "l2": "its {name} is L2 regularization (the gradient becomes g + λθ)",
    "other": "its decay rule is not known",
}
_EXACTLY = (
    "measured against a copy of the optimizer that steps without decay: slower, with another copy "
    "of weights, gradients and state in memory; "
)


@dataclass(frozen=True, slots=True)
class Penalty:
    """What is taken off tensors that are alike.

    Attributes:
        way: how it is found.
        c: the share.
        rate: λ; NaN where it is unknown.
        group: of the optimizer.
        is_stored: whether decay and the step's own move are rounded one by one.
    """

    way: Way
    c: float | Tensor
    rate: float
    group: dict[str, Any]
    is_stored: bool = True

    @property
    def factor(self) -> float | Tensor:
        """What θ' is counted at."""
        if self.way == "beside":
            return self.c
        if self.way != "literal":
            return 0.0
        # (1 − c) of what was penalized stands: P is c/(1 − c) of that
        if isinstance(self.c, Tensor):
            return torch.where(self.c < 1, self.c / (1 - self.c), 0.0)
        return self.c / (1 - self.c) if self.c < 1 else 0.0

    @property
    def falls_after(self) -> bool:
        """Whether it is a share of û: what stands after the step is weighed, and cannot oppose."""
        return self.way in ("after", "proximal")


#: Of tensors that nothing is taken off, or nothing that can be told.
NOTHING = Penalty("none", 0.0, 0.0, {})


class Kinds(NamedTuple):
    """Which weights are penalized alike.

    Attributes:
        numbers: of each weight the number of its kind.
        likes: of each kind the parameter group's number, and a weight of it.
    """

    numbers: NDArray[np.int64]
    likes: list[tuple[int, Tensor]]


class Penalized(NamedTuple):
    """What a step takes off some weights.

    Attributes:
        numbers: of each weight the number of its penalty.
        penalties: those there are.
    """

    numbers: NDArray[np.int64]
    penalties: list[Penalty]

    def each(self) -> Iterator[Penalty]:
        """Every weight's penalty."""
        return (self.penalties[number] for number in self.numbers.tolist())

    def without(self, which: Sequence[int]) -> "Penalized":
        """The same, but that of these weights nothing can be told."""
        if not which:
            return self
        numbers = self.numbers.copy()
        numbers[list(which)] = len(self.penalties)
        return Penalized(numbers, [*self.penalties, NOTHING])


class Penalties:
    """Finds what the steps of one optimizer penalize, and how.

    Args:
        optimizer: one whose hooks fire.
        exact: see :class:`wd_probe.OpposingPenaltyProbe`.
        reading: likewise.
        effects: rules found so far, shared between the optimizers of a probe.
        tell: says what cannot be measured.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        exact: bool | None,
        reading: Reading,
        effects: Effects,
        tell: Teller,
    ) -> None:
        self._optimizer, self._exact, self._reading = optimizer, exact, reading
        self._effects, self._tell = effects, tell
        self._own_effects: dict[tuple[Any, ...], Effect] = {}
        self._noted: set[tuple[str, int]] = set()  # what groups are not measured, and why
        self._untold: dict[str, list[int]] = {}
        self._telling, self._rates = _telling(optimizer), _rates(optimizer)
        self._steps_twice = exact is not False

    def kinds(self, live: Sequence[Sequence[Tensor]]) -> Kinds:
        """Which of these weights, which stand by parameter group, are penalized alike.

        They stay so while the same :class:`wd_probe.WeightDecay` is attached, or none.
        """
        decay = attached(self._optimizer)
        numbers: list[int] = []
        likes: list[tuple[int, Tensor]] = []
        for number, params in enumerate(live):
            known: dict[float | None, int] = {}  # by what tells a group's tensors apart
            for p in params:
                kind = p.ndim if decay is None else decay.share(p)
                if kind not in known:
                    known[kind] = len(likes)
                    likes.append((number, p))
                numbers.append(known[kind])
        return Kinds(np.array(numbers, dtype=np.int64), likes)

    def of(self, kinds: Kinds) -> Penalized:
        """What the present step takes off weights of these kinds."""
        decay = attached(self._optimizer)
        groups = len(self._optimizer.param_groups)
        penalties = [
            self._told(decay, number, p) if number < groups else NOTHING
            for number, p in kinds.likes
        ]
        self._tell_whys()
        return Penalized(kinds.numbers, penalties)

    def _told(self, decay: WeightDecay | None, number: int, p: Tensor) -> Penalty:
        """A weight's penalty; nothing where it cannot be told."""
        one = self._penalty(decay, number, p)
        if one is None or (one.way == "exact" and not self._steps_twice):
            return NOTHING
        self._tell_rounding(one, p.dtype)
        if not isinstance(one.c, Tensor) and one.c < 0:
            self._tell("R_op is not measured while a learning rate is negative")
        return one

    def need_second_step(self, kinds: Kinds) -> bool:
        """Whether any is measured against a second step; computes no factors, as each step asks."""
        decay = attached(self._optimizer)
        if not self._steps_twice:
            return False
        if decay is not None:
            forced = bool(self._exact) and decay.moment in ("step", "update")
            return decay.rate > 0 and (forced or decay.moment == "gradient")
        groups = self._optimizer.param_groups
        stand = [(number, p) for number, p in kinds.likes if number < len(groups)]
        effects = (self._effect(number, groups[number], p) for number, p in stand)
        return any(self._way(effect) == "exact" for effect in effects)

    def need_weights(self, kinds: Kinds) -> bool:
        """Whether signs are not enough to count against."""
        decay = attached(self._optimizer)
        return self.need_second_step(kinds) or (decay is not None and decay.method == "cautious")

    def ungraded(self) -> set[Tensor]:
        """Weights that the coming step decays though they have no gradient."""
        if not any(effect.ungraded for effect in self._own_effects.values()):
            return set()
        if attached(self._optimizer) is not None:
            return set()
        return {
            p
            for number, group in enumerate(self._optimizer.param_groups)
            for p in group["params"]
            if p.grad is None and self._effect(number, group, p).ungraded
        }

    def rates(self) -> set[str]:
        """The options whose zero ends the decay of a step."""
        return {"weight_decay"} | {effect.name for effect in self._all_effects() if effect.name}

    def _all_effects(self) -> Iterator[Effect]:
        for number, group in enumerate(self._optimizer.param_groups):
            for like in {p.ndim: p for p in group["params"]}.values():
                yield self._effect(number, group, like)

    def _way(self, effect: Effect) -> Way | None:
        """How what it takes off is found; None where it cannot be, or there is nothing."""
        if effect.rule == "none" or (effect.rule == "other" and not effect.name):
            return None
        return "exact" if self._exact and effect.name else _OWN_WAYS[effect.rule]

    def give_up_second_step(self, why: str) -> None:
        """Measure nothing against a second step from now on, and say so."""
        self._steps_twice = False
        self._tell(
            f"a copy of {type(self._optimizer).__name__} cannot be stepped ({why}), so R_op is not "
            "measured there from now on"
        )

    def check_rules(self) -> None:
        """Say at once, rather than at the first step, what will not be measured."""
        decay = attached(self._optimizer)
        if decay is not None:
            if decay.moment == "gradient" and self._exact is None and decay.rate:
                self._tell(f"{decay.method} goes through the optimizer, so R_op is {_EXACTLY[:-2]}")
            return
        groups = self._optimizer.param_groups
        for number, group in enumerate(groups):
            for p in group["params"]:
                self._own(number, group, p)
        self._tell_whys()
        free = (effect.rule == "none" for effect in self._all_effects())
        if not any(group.get("weight_decay", 0) for group in groups) and all(free):
            self._tell(
                f"{type(self._optimizer).__name__} has weight_decay=0 in every group and no "
                "wd_probe.WeightDecay: nothing is penalized, so R_op is undefined (NaN)"
            )

    def _penalty(self, decay: WeightDecay | None, number: int, p: Tensor) -> Penalty | None:
        group = self._optimizer.param_groups[number]
        if decay is None:
            return self._own(number, group, p)
        if not decay.decays(p):
            return None
        way = _ATTACHED_WAYS[decay.moment]
        if way == "ahead":
            way = "literal" if self._reading == "literal" else "ahead"
        elif self._exact:
            way = "exact"
        elif decay.method == "cautious":
            way = "cautious"
        idle = decay.took_nothing(self._optimizer)
        return Penalty(way, 0.0 if idle else decay.factor(p, group), decay.rate, group)

    def _own(self, number: int, group: dict[str, Any], p: Tensor) -> Penalty | None:
        effect = self._effect(number, group, p)
        way = self._way(effect)
        if way is None:
            return None
        rate = rate_held(self._optimizer, group, effect.name) if effect.name else math.nan
        if rate == 0:
            return None
        c = 0.0 if way == "exact" else effect.factor(group, self._optimizer)
        return Penalty(way, c, rate, group, is_stored=not group.get("fused"))

    def _tell_rounding(self, one: Penalty, dtype: torch.dtype) -> None:
        """Say where numbers of 16 bits are too coarse for what decay takes off (theory fact 27)."""
        if dtype.itemsize != 2 or not one.is_stored or one.way == "exact":
            return
        half = torch.finfo(dtype).eps / 2
        if isinstance(one.c, Tensor) or not 0 < one.c < half:
            return
        name = str(dtype).removeprefix("torch.")
        share = "every weight" if one.c < half / 2 else "some weights"
        acting = half / one.c * one.rate
        acts = f"λ acts on some from {acting / 2:.2g} on, and on all from {acting:.2g}"
        if math.isnan(acting):  # the rate is unknown
            acts = "it acts on none but a few"
        self._tell(
            f"{name} rounds decay by c = {one.c:.2g} away from {share}, not penalized: at this "
            f"learning rate {acts}",
            about=f"rounding of {name}",
        )

    def _effect(self, number: int, group: dict[str, Any], like: Tensor) -> Effect:
        own = vars(self._optimizer)
        rates = [bool(holder.get(name)) for holder in (group, own) for name in self._rates]
        key = (number, like.ndim, judged_near(group), *map(group.get, self._telling), *rates)
        if key in self._own_effects:
            return self._own_effects[key]
        known = (*options_of(self._optimizer, group), like.ndim, like.dtype, like.device)
        if known not in self._effects:
            # ZeroRedundancyOptimizer leaves the stepping to another, over its part of the weights.
            stepping = getattr(self._optimizer, "optim", self._optimizer)
            self._effects[known] = effect_at_work(stepping, group, like)
        effect = self._own_effects[key] = self._effects[known]
        if effect.rule in _WHY_NOT:
            self._note_why(effect, number, group)
        return effect

    def _note_why(self, effect: Effect, number: int, group: dict[str, Any]) -> None:
        """Note what is not measured, or at what cost, to be told of all such groups at once."""
        if effect.rule == "none" and not group.get("weight_decay", 0):
            return
        why = self._why(effect)
        if (why, number) not in self._noted:
            self._noted.add((why, number))
            self._untold.setdefault(why, []).append(number)

    def _why(self, effect: Effect) -> str:
        if not effect.name:
            return "it decays, rate unknown, so R_op is not measured there"
        unmeasured = effect.rule == "none" or self._exact is False
        return (
            f"{_WHY_NOT[effect.rule].format(name=effect.name)}, so R_op is "
            + ("not measured there; " if unmeasured else _EXACTLY)
            + f"build it with {effect.name}=0 and attach wd_probe.WeightDecay(model, optimizer, "
            '"wd", rate=...) for the paper\'s decay'
        )

    def _tell_whys(self) -> None:
        """Tell what has been noted."""
        while self._untold:
            why, numbers = self._untold.popitem()
            groups = f"parameter group {numbers[0]}"
            if len(numbers) > 1:
                groups = f"{len(numbers)} of {len(self._optimizer.param_groups)} parameter groups"
            self._tell(f"{type(self._optimizer).__name__}, {groups}: {why}")


def _telling(optimizer: Optimizer) -> tuple[str, ...]:
    """Options that may tell by which rule a group decays, whenever they change.

    Flags, and what the class is made with, but for what schedules move: η, λ and the momenta.
    """
    made_with = inspect.signature(type(optimizer)).parameters
    options = {name: value for group in optimizer.param_groups for name, value in group.items()}
    return tuple(
        name
        for name, value in options.items()
        if isinstance(value, bool)
        or (name in made_with and isinstance(value, NoneType | int | float | str))
        if name not in ("lr", "momentum") and not name.startswith("beta")
        if not looks_like_a_rate(name)
    )


def _rates(optimizer: Optimizer) -> tuple[str, ...]:
    """Options that tell by whether they are zero."""
    holders = (*optimizer.param_groups, vars(optimizer))
    named = {name for holder in holders for name in holder if looks_like_a_rate(name)}
    return ("momentum", *sorted(named))
