"""The opposing-penalty rate of an ordinary training loop, step by step."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import kernel, penalty
from .decay import attached, voided
from .errors import InputError, WdProbeWarning
from .hooks import StepHooks, hooked
from .layering import Layers, check_rate, clean_name, layers
from .records import ProfileRecord, StepRecord
from .rules import Rule, decay_rule

_WHY_NOT: dict[Rule, str] = {
    "none": "its weight_decay changes nothing",
    "l2": "its weight_decay is L2 regularization (the gradient becomes g + λθ)",
    "rwd": "it decays after the update, which never opposes",
    "other": "its decay rule is not known",
}


@dataclass(slots=True)
class _Pending:
    """One measured step whose numbers may still be on the device."""

    step: int
    rows: list[int]
    factors: list[float | Tensor]
    sums: Tensor  # float64 (len(rows), 6)
    voided: Tensor | None


class OpposingPenaltyProbe:
    """Measures, at every step of an optimizer, where weight decay pushes away from zero.

    A step hook remembers the weights before the step; another compares them with what stands after
    it (theory fact 2). Weights, gradients, optimizer state and random state are only ever read.
    Costs one copy of the weights, and about what reading them twice costs.

    What is taken as the penalty: the attached :class:`wd_probe.WeightDecay`, else the optimizer's
    own ``weight_decay``, if by its effect that is the decoupled rule θ' = û − ηλθ. Where it is
    another rule a :class:`wd_probe.WdProbeWarning` says so once, and nothing is measured there.

    Args:
        model: the model; its parameters' names and layers label the results.
        optimizer: the optimizer that steps it; a wrapper such as timm's Lookahead is measured at
            the optimizer it wraps.
        every: measure steps 1, 1 + every, 1 + 2·every, ...
        profile: decay rates λ to answer "what would R_op have been" for (theory fact 4).
        profile_every: answer that at every so-many-th measured step.
        groups: the model's layers, if not ``wd_probe.layers(model)``.

    Raises:
        InputError: ``every`` < 1; the optimizer's hooks never fire; it holds none of the model's
            parameters; it is LBFGS.

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
    ) -> None:
        if every < 1 or profile_every < 1:
            raise InputError(f"every must be at least 1, got {min(every, profile_every)}")
        self.optimizer = hooked(optimizer)
        self.every, self.profile_every = every, profile_every
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
        self._rules: dict[tuple[int, int], Rule] = {}
        self._told: set[str] = set()
        self._pending: list[_Pending] = []
        self._records: list[StepRecord] = []
        self._profiles: list[ProfileRecord] = []
        self._counted: dict[int, list[int]] = {}
        self._check_rules()
        self._hooks = StepHooks(self.optimizer, self._before, self._after, outermost=True)

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

    @torch.no_grad()
    def _after(self) -> None:
        self.steps += 1
        if not self._live:
            return
        wanted = set(self._live)
        self._live = []
        penalties = [
            (p, c, rate) for p, c, rate in self._penalties() if p in wanted and p.grad is not None
        ]
        jobs = [(self._copies[p], p.detach(), c) for p, c, _ in penalties]
        self._pending.append(
            _Pending(
                self.steps,
                [self._row[p] for p, _, _ in penalties],
                [c for _, c, _ in penalties],
                kernel.tally_all(jobs),
                voided(self.optimizer),
            )
        )
        measured = (self.steps - 1) // self.every
        if self.profile_rates and measured % self.profile_every == 0:
            self._take_profile(penalties)

    def _penalties(self) -> list[tuple[Tensor, Any, float]]:
        """Every penalized parameter with its factor c and its nominal rate λ, live."""
        decay = attached(self.optimizer)
        result = []
        for number, group in enumerate(self.optimizer.param_groups):
            rate = decay.rate if decay is not None else float(group.get("weight_decay", 0))
            if not rate:
                continue
            for p in group["params"]:
                if decay is not None:
                    if decay.decays(p):
                        result.append((p, decay.factor(p, group), rate))
                elif self._rule(number, group, p) == "wd":
                    result.append((p, group["lr"] * rate, rate))
        return result

    def _rule(self, number: int, group: dict[str, Any], like: Tensor) -> Rule:
        key = (number, like.ndim)
        if key not in self._rules:
            self._rules[key] = decay_rule(self.optimizer, group, like)
        rule = self._rules[key]
        if rule != "wd":
            self._tell(
                f"{type(self.optimizer).__name__}, parameter group {number}: {_WHY_NOT[rule]}, so "
                "R_op is not measured there; build it with weight_decay=0 and attach "
                'wd_probe.WeightDecay(model, optimizer, "wd", rate=...) for the paper\'s decay',
                above=5,
            )
        return rule

    def _check_rules(self) -> None:
        """Say at once, rather than at the first step, what will not be measured."""
        decay = attached(self.optimizer)
        if decay is None:
            groups = self.optimizer.param_groups
            for number, group in enumerate(groups):
                if group.get("weight_decay", 0):
                    for p in group["params"]:
                        self._rule(number, group, p)
            if not any(group.get("weight_decay", 0) for group in groups):
                self._tell(
                    f"{type(self.optimizer).__name__} has weight_decay=0 in every group and no "
                    "wd_probe.WeightDecay: nothing is penalized, so R_op is undefined (NaN)"
                )

    def _tell(self, message: str, above: int = 4) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, WdProbeWarning, stacklevel=above)

    def _take_profile(self, penalties: Sequence[tuple[Tensor, Any, float]]) -> None:
        total = torch.zeros(len(self.profile_rates), dtype=torch.int64)
        for p, c, rate in penalties:
            factors = [float(c) * wanted / rate for wanted in self.profile_rates]
            total += penalty.profile(self._copies[p], p.detach(), float(c), factors).cpu()
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
            rows[:, 4:] *= np.array([float(c) for c in item.factors]).reshape(-1, 1)
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
        self._live = []

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()
