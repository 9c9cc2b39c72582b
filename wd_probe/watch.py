"""One optimizer's steps seen from both sides: what is penalized by how much, and the counts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import kernel, penalty
from .decay import Moment, WeightDecay, attached, voided
from .errors import Teller, first_line
from .movement import movement, tells_movement
from .rules import Effect, Rule, decay_effect
from .sharding import Shards, local
from .twin import undecayed

#: Which penalty Eq. 10 asks about where pwd decays before the forward pass (theory fact 9).
Reading = Literal["paired", "literal"]
#: What is kept of the weights during a step: all of it, the upper half of every number, or nothing
#: where the optimizer's state tells how far they moved.
Keep = Literal["whole", "half", "nothing"]
#: How a tensor's penalty is had: P = cθ beside the step; P = cû after it, or û/(1 + c); P = cθ
#: ahead of the gradient; or the step against the same step without decay.
_Way = Literal["beside", "after", "proximal", "ahead", "exact"]

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
#: Rules by the optimizer's class and options: loops with an optimizer for each tensor have many.
Effects = dict[tuple[Any, ...], Effect]


@dataclass(frozen=True, slots=True)
class _Penalty:
    """What is taken off one tensor."""

    parameter: Tensor
    group: dict[str, Any]
    way: _Way
    c: float | Tensor
    rate: float  # λ


@dataclass(frozen=True, slots=True)
class Counted:
    """One optimizer's measured step, whose numbers may still be on the device.

    Attributes:
        parameters: what was penalized.
        sizes: Σ|P| of each in units of the sums counted.
        opposes: False where a penalty cannot oppose.
        sums: gives the float64 (len(parameters), 6) counts of the whole parameters.
        profile: gives the float64 (len(parameters), rates) counts at other rates, if asked for and
            to be had.
        voided: 1 where `GradScaler` left this step out.
    """

    parameters: list[Tensor]
    sizes: list[float | Tensor]
    opposes: list[bool]
    sums: Callable[[], Tensor]
    profile: Callable[[], Tensor] | None
    voided: Tensor | None


class Watch:
    """Remembers an optimizer's weights before its step, and counts after it.

    Args:
        optimizer: one whose hooks fire.
        exact: see :class:`wd_probe.OpposingPenaltyProbe`.
        reading: likewise.
        keep: likewise.
        effects: rules found so far, shared between the optimizers of a probe.
        tell: says what cannot be measured.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        exact: bool | None,
        reading: Reading,
        keep: Keep,
        effects: Effects,
        tell: Teller,
    ) -> None:
        self.optimizer, self.exact, self.reading, self.keep = optimizer, exact, reading, keep
        self._effects, self._tell = effects, tell
        self._own_effects: dict[tuple[int, int], Effect] = {}
        self._copies: dict[Tensor, Tensor] = {}
        self._live: list[Tensor] = []
        self._has_closure = False
        self._moves: set[Tensor] = set()  # had again from the optimizer's state
        self._u_hat: dict[Tensor, Tensor] = {}
        self._twin_error = ""
        self._steps_twice = exact is not False

    def held(self) -> Iterator[Tensor]:
        """The optimizer's parameters."""
        return (p for group in self.optimizer.param_groups for p in group["params"])

    # --- around the step, on the device -------------------------------------------------------

    def remember(self, parameters: Sequence[Tensor], has_closure: bool) -> None:
        """Copy what this step will move of these parameters."""
        self._has_closure = has_closure
        live = [p for p in parameters if p.grad is not None or (has_closure and p.requires_grad)]
        self._moves = self._readable(live) if self.keep == "nothing" else set()
        self._copy([p for p in live if p not in self._moves] if self._moves else live)
        self._live = live

    def _readable(self, live: Sequence[Tensor]) -> set[Tensor]:
        """Those of the weights that the optimizer's state will give back, as the penalty is cθ."""
        penalties = self._penalties()
        beside = {item.parameter for item in penalties if item.way == "beside" and item.c < 1}
        return {
            p
            for group in self.optimizer.param_groups
            if tells_movement(self.optimizer, group)
            for p in group["params"]
            if p in beside and p.dtype == torch.float32
        }.intersection(live)

    def _copy(self, live: Sequence[Tensor]) -> None:
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in live:
            kept = self._copies.get(p)
            weights = local(p)
            half = self.keep == "half" and weights.dtype == torch.float32
            dtype = torch.bfloat16 if half else weights.dtype
            if kept is None or kept.shape != weights.shape or kept.dtype != dtype:
                self._copies[p] = torch.empty_like(weights, dtype=dtype)
            by_kind.setdefault((weights.device, weights.dtype), []).append(p)
        for chosen in by_kind.values():
            kernel.copy_all([self._copies[p] for p in chosen], [local(p) for p in chosen])

    @torch.no_grad()
    def graded(self) -> None:
        """The gradient is there: where a closed rule will not do, step a copy without decay now."""
        self._u_hat = {}
        decay = attached(self.optimizer)
        if self._has_closure and decay is not None and decay.moment == "forward":
            self._copy(self._live)  # the forward pass in the closure has decayed the weights
        if not self._live or not self._needs_twin():
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
            for rule in {self._effect(number, group, p).rule for p in group["params"]}
        )

    def count(self, shards: Shards, profile_rates: Sequence[float]) -> Counted | None:
        """Count what the step did; None if nothing was remembered of it."""
        if not self._live:
            return None
        if self._twin_error:  # and the optimizer itself could
            self._steps_twice = False
            self._tell(
                f"a copy of {type(self.optimizer).__name__} cannot be stepped "
                f"({self._twin_error}), so R_op is not measured there from now on"
            )
        wanted = {p for p in self._live if p.grad is not None}
        self._live = []
        found = [item for item in self._penalties() if item.parameter in wanted]
        closed = [item for item in found if item.way != "exact"]
        exact = [item for item in found if item.parameter in self._u_hat and item.way == "exact"]
        jobs, sizes, opposes = [], [], []
        for item in closed:
            job, size, may_oppose = self._job(item)
            jobs.append(job)
            sizes.append(size)
            opposes.append(may_oppose)
        sums = [kernel.tally_all(jobs)] if jobs or not exact else []
        for p in (item.parameter for item in exact):
            counted = penalty.tally_exact(self._copies[p], local(self._u_hat[p]), local(p))
            sums.append(counted.unsqueeze(0))
        self._u_hat = {}
        parameters = [item.parameter for item in (*closed, *exact)]
        profile = None
        if profile_rates and all(item.way == "beside" for item in found):
            profile = shards.sum(parameters, self._profile(closed, profile_rates))
        return Counted(
            parameters,
            [*sizes, *(1.0 for _ in exact)],
            [*opposes, *(True for _ in exact)],
            shards.sum(parameters, torch.cat(sums)),
            profile,
            voided(self.optimizer),
        )

    def forget(self) -> None:
        """Drop what was remembered."""
        self._live, self._u_hat, self._twin_error = [], {}, ""

    def close(self) -> None:
        """Free the copies."""
        self.forget()
        self._copies.clear()

    def _job(self, item: _Penalty) -> tuple[kernel.Job, float | Tensor, bool]:
        """What to count for one tensor, Σ|P| in units of its sums, and whether it can oppose."""
        if item.parameter in self._moves:
            c = item.c
            moved = movement(self.optimizer, item.group, item.parameter, float(c))
            return (moved, local(item.parameter), c), c, True
        before, after, c = self._copies[item.parameter], local(item.parameter), item.c
        if item.way == "beside":
            return (before, after, c), c, True
        if item.way == "proximal":  # û/(1 + c) stands: P = c·θ'
            return (after, before, 0.0), c, False
        # (1 − c) of what was penalized stands: P is c/(1 − c) of that
        share = c / (1 - c) if isinstance(c, Tensor) or c < 1 else 0.0
        if item.way == "after":
            return (after, before, 0.0), share, False
        if self.reading == "paired":
            return (before, after, 0.0), share, False
        return (before, after, share), share, True

    def _profile(self, penalties: Sequence[_Penalty], rates: Sequence[float]) -> Tensor:
        rows = []
        for item in penalties:
            c, p = float(item.c), item.parameter
            factors = [c * wanted / item.rate for wanted in rates]
            before = self._copies.get(p)
            if p in self._moves:
                before = movement(self.optimizer, item.group, p, c).before(local(p))
            assert before is not None
            rows.append(penalty.profile(before, local(p), c, factors).double().cpu())
        return torch.stack(rows) if rows else torch.zeros(0, len(rates), dtype=torch.float64)

    # --- what is penalized, and by which rule -------------------------------------------------

    def _penalties(self) -> list[_Penalty]:
        """Every penalized parameter, with its live factor."""
        decay = attached(self.optimizer)
        result = []
        for number, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                found = (
                    self._attached(decay, p, group)
                    if decay is not None
                    else self._own(number, group, p)
                )
                if found is not None and (found.way != "exact" or self._steps_twice):
                    result.append(found)
        return result

    def _attached(self, decay: WeightDecay, p: Tensor, group: dict[str, Any]) -> _Penalty | None:
        if not decay.decays(p):
            return None
        way = _ATTACHED_WAYS[decay.moment]
        if self.exact and way != "ahead":
            way = "exact"
        return _Penalty(p, group, way, decay.factor(p, group), decay.rate)

    def _own(self, number: int, group: dict[str, Any], p: Tensor) -> _Penalty | None:
        rate = float(group.get("weight_decay", 0))
        if not rate:
            return None
        effect = self._effect(number, group, p)
        if effect.rule == "none":
            return None
        way = "exact" if self.exact else _OWN_WAYS[effect.rule]
        c = 0.0 if way == "exact" else effect.factor(group)
        return _Penalty(p, group, way, c, rate)

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
