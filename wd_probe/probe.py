"""The opposing-penalty rate of an ordinary training loop, step by step."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import kernel, penalty
from .decay import Moment, WeightDecay, attached, voided
from .errors import InputError, WdProbeWarning
from .hooks import StepHooks, hooked
from .layering import Layers, check_rate, clean_name, layers
from .records import ProfileRecord, StepRecord
from .rules import Effect, Rule, decay_effect
from .twin import undecayed

#: Which penalty Eq. 10 asks about where pwd decays before the forward pass (theory fact 9).
Reading = Literal["paired", "literal"]
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
_OPPOSING = [penalty.TALLY_FIELDS.index(name) for name in ("opposing", "opposing_size")]


@dataclass(frozen=True, slots=True)
class _Penalty:
    """What is taken off one tensor."""

    parameter: Tensor
    way: _Way
    c: float | Tensor
    rate: float  # λ


@dataclass(slots=True)
class _Pending:
    """One measured step whose numbers may still be on the device."""

    step: int
    rows: list[int]
    sizes: list[float | Tensor]  # Σ|P| in units of the sums counted
    opposes: list[bool]  # False where the penalty cannot oppose
    sums: Tensor  # float64 (len(rows), 6)
    voided: Tensor | None


class OpposingPenaltyProbe:
    """Measures, at every step of an optimizer, where weight decay pushes away from zero.

    A step hook remembers the weights before the step; another compares them with what stands after
    it (theory fact 2). Weights, gradients, optimizer state and random state are only ever read.
    Costs one copy of the weights, and about what reading them twice costs.

    What is taken as the penalty: the attached :class:`wd_probe.WeightDecay`, else the optimizer's
    own ``weight_decay`` by the rule that its effect shows. Decay after the update (rwd) and before
    the forward pass (pwd, lpwd) never opposes, since it falls on the weight that stands (Eq. 8):
    R_op is 0 there by that law. Where no closed rule gives P (L2, L1, optimizers of their own
    kind), every measured step is taken twice, on a copy of the optimizer without decay too, and P
    is the difference; a :class:`wd_probe.WdProbeWarning` says so once.

    Args:
        model: the model; its parameters' names and layers label the results.
        optimizer: the optimizer that steps it; a wrapper such as timm's Lookahead is measured at
            the optimizer it wraps.
        every: measure steps 1, 1 + every, 1 + 2·every, ...
        profile: decay rates λ to answer "what would R_op have been" for (theory fact 4).
        profile_every: answer that at every so-many-th measured step.
        groups: the model's layers, if not ``wd_probe.layers(model)``.
        exact: True measures every rule against a copy of the optimizer; False never does, and
            leaves unmeasured what only that can measure. Default: where it is needed.
        reading: of Eq. 10 for pwd and lpwd. "paired" (default) compares the penalty with the weight
            that it is taken from; "literal" takes P = cθ_t and û = θ_t − ηU as they are printed.

    Raises:
        InputError: ``every`` < 1; an unknown reading; the optimizer's hooks never fire; it holds
            none of the model's parameters; it is LBFGS.

    Example:
        >>> net = nn.Linear(64, 10)
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
        >>> with OpposingPenaltyProbe(net, optimizer) as probe:
        ...     for _ in range(3):
        ...         net(torch.randn(8, 64)).square().mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> len(probe.records), probe.records[-1].penalized
        (3, 650)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 1,
        profile: Sequence[float] = (),
        profile_every: int = 1,
        groups: Layers | None = None,
        exact: bool | None = None,
        reading: Reading = "paired",
    ) -> None:
        if reading not in get_args(Reading):
            raise InputError(f"unknown reading {reading!r}; choose from paired, literal")
        if every < 1 or profile_every < 1:
            raise InputError(f"every must be at least 1, got {min(every, profile_every)}")
        self.optimizer = hooked(optimizer)
        self.every, self.profile_every = every, profile_every
        self.exact, self.reading = exact, reading
        self.profile_rates = tuple(check_rate(rate) for rate in profile)
        self.layers = layers(model) if groups is None else groups
        named = [(clean_name(name), p) for name, p in model.named_parameters()]
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        if not any(p in held for _, p in named):
            raise InputError(
                "the optimizer holds none of the model's parameters; build it from "
                "model.parameters() after the model is made, moved and wrapped"
            )
        self.names = tuple(name for name, _ in named)
        self._row: dict[Tensor, int] = {p: row for row, (_, p) in enumerate(named)}
        self.steps = 0
        self._copies: dict[Tensor, Tensor] = {}
        self._live: list[Tensor] = []
        self._u_hat: dict[Tensor, Tensor] = {}
        self._steps_twice = exact is not False
        self._effects: dict[tuple[int, int], Effect] = {}
        self._told: set[str] = set()
        self._pending: list[_Pending] = []
        self._records: list[StepRecord] = []
        self._profiles: list[ProfileRecord] = []
        self._counted: dict[int, list[int]] = {}
        self._check_rules()
        self._hooks = StepHooks(
            self.optimizer, self._before, self._after, graded=self._step_twin, outermost=True
        )

    # --- around the step, on the device -------------------------------------------------------

    @torch.no_grad()
    def _before(self, has_closure: bool) -> None:
        self._live = []
        if self.steps % self.every:
            return
        live = [
            p
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p in self._row and (p.grad is not None or (has_closure and p.requires_grad))
        ]
        for p in live:
            kept = self._copies.get(p)
            if kept is None or kept.shape != p.shape or kept.dtype != p.dtype:
                self._copies[p] = torch.empty_like(p)
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in live:
            by_kind.setdefault((p.device, p.dtype), []).append(p)
        for chosen in by_kind.values():
            kernel.copy_all([self._copies[p] for p in chosen], chosen)
        self._live = live

    def _step_twin(self) -> None:
        """Where a closed rule will not do, take the step on a copy without decay first."""
        self._u_hat = {}
        if not self._live or not self._needs_twin():
            return
        try:
            self._u_hat = undecayed(self.optimizer)
        except Exception as error:  # what a copy cannot do must not end somebody's training
            self._steps_twice = False
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._tell(
                f"a copy of {type(self.optimizer).__name__} cannot be stepped ({reason}), so R_op "
                "is not measured there",
                above=6,
            )

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

    @torch.no_grad()
    def _after(self) -> None:
        self.steps += 1
        if not self._live:
            return
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
            counted = penalty.tally_exact(self._copies[p], self._u_hat[p], p)
            sums.append(counted.unsqueeze(0))
        self._u_hat = {}
        self._pending.append(
            _Pending(
                self.steps,
                [self._row[item.parameter] for item in (*closed, *exact)],
                [*sizes, *(1.0 for _ in exact)],
                [*opposes, *(True for _ in exact)],
                torch.cat(sums),
                voided(self.optimizer),
            )
        )
        measured = (self.steps - 1) // self.every
        if (
            self.profile_rates
            and measured % self.profile_every == 0
            and all(item.way == "beside" for item in found)
        ):
            self._take_profile(found)

    def _job(self, item: _Penalty) -> tuple[kernel.Job, float | Tensor, bool]:
        """What to count for one tensor, Σ|P| in units of its sums, and whether it can oppose."""
        before, after, c = self._copies[item.parameter], item.parameter.detach(), item.c
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
        return _Penalty(p, way, decay.factor(p, group), decay.rate)

    def _own(self, number: int, group: dict[str, Any], p: Tensor) -> _Penalty | None:
        rate = float(group.get("weight_decay", 0))
        if not rate:
            return None
        effect = self._effect(number, group, p)
        if effect.rule == "none":
            return None
        way = "exact" if self.exact else _OWN_WAYS[effect.rule]
        return _Penalty(p, way, 0.0 if way == "exact" else effect.factor(group), rate)

    def _effect(self, number: int, group: dict[str, Any], like: Tensor) -> Effect:
        key = (number, like.ndim)
        if key not in self._effects:
            self._effects[key] = decay_effect(self.optimizer, group, like)
        effect = self._effects[key]
        if effect.rule in _WHY_NOT:
            unmeasured = effect.rule == "none" or self.exact is False
            self._tell(
                f"{type(self.optimizer).__name__}, parameter group {number}: "
                f"{_WHY_NOT[effect.rule]}, so R_op is "
                + ("not measured there; " if unmeasured else _EXACTLY)
                + "build it with weight_decay=0 and attach wd_probe.WeightDecay(model, optimizer, "
                '"wd", rate=...) for the paper\'s decay',
                above=6,
            )
        return effect

    def _check_rules(self) -> None:
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

    def _tell(self, message: str, above: int = 4) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, WdProbeWarning, stacklevel=above)

    def _take_profile(self, penalties: Sequence[_Penalty]) -> None:
        total = torch.zeros(len(self.profile_rates), dtype=torch.int64)
        for item in penalties:
            c, p = float(item.c), item.parameter
            factors = [c * wanted / item.rate for wanted in self.profile_rates]
            total += penalty.profile(self._copies[p], p.detach(), c, factors).cpu()
        self._counted[self.steps] = total.tolist()

    # --- on the host, when asked --------------------------------------------------------------

    def flush(self) -> None:
        """Read what is still on the device into `records`: one transfer for all pending steps."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        sums = torch.cat([item.sums for item in pending]).cpu().numpy()
        start = 0
        for item in pending:
            rows = sums[start : start + len(item.rows)]
            start += len(item.rows)
            if item.voided is not None and float(item.voided):
                continue
            values = np.zeros((len(self.names), len(penalty.TALLY_FIELDS)))
            rows[:, 4:] *= np.array([float(size) for size in item.sizes]).reshape(-1, 1)
            never = np.flatnonzero(~np.array(item.opposes, dtype=bool))
            rows[never[:, None], _OPPOSING] = 0
            values[item.rows] = rows
            record = StepRecord(item.step, values, self.names, self.layers)
            self._records.append(record)
            if item.step in self._counted:
                opposing = tuple(self._counted.pop(item.step))
                self._profiles.append(
                    ProfileRecord(item.step, self.profile_rates, opposing, record.penalized)
                )

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters by the names the records use."""
        return zip(self.names, self._row, strict=True)

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """Every measured step so far, oldest first; steps that a GradScaler voided are left out."""
        self.flush()
        return tuple(self._records)

    def drain(self) -> tuple[StepRecord, ...]:
        """The records since the last call, which the probe then forgets: for long runs."""
        taken = self.records
        self._records = []
        return taken

    @property
    def profiles(self) -> tuple[ProfileRecord, ...]:
        """R_op at the rates of ``profile``, for each step it was taken at."""
        self.flush()
        return tuple(self._profiles)

    def close(self) -> None:
        """Detach and free the copies; the records stay. Safe to call twice."""
        self._hooks.remove()
        self.flush()
        self._copies.clear()
        self._live, self._u_hat = [], {}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()
