"""Which decay rule an optimizer really runs, found by its effect on scratch weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from .doubles import Double, maximizes, random_like, scratch, shapes, tried, visible
from .places import rate_elsewhere, rate_held
from .ungraded import decays_ungraded

#: "none": weight_decay changes nothing. "l2": the gradient becomes g + λθ. "wd": exactly ηλθ is
#: taken off beside the step. "rwd": ηλû is taken off after it. "proximal": û is divided by 1 + ηλ
#: after it. "scaled": another constant multiple of ηλθ is taken off beside the step, or one that
#: follows another power of η. "other": none of these in every situation tried.
Rule = Literal["none", "l2", "wd", "rwd", "proximal", "scaled", "other"]

_STEPS = 12  # every pairing of what follows, and the periods of built-in lookaheads
_LR_SCALES = (1.0, 0.5, 2.0)
_STRENGTHS = (0.05, 0.02)  # ηλ on the scratch weights: large enough to stand clear of rounding
_SIZES = (1.0, 0.01)  # of the weights: trust ratios are clipped on one side
_SEEN = 1e-4  # the share of the weights that a step moves, if it is to tell
_LOUDER = (1.0, 1e3, 1e6)  # times the learning rate, where steps are smaller
_DTYPES = (torch.float64, torch.float32)  # fused and 8-bit kernels may know only the second


@dataclass(frozen=True, slots=True)
class Effect:
    """What one parameter group's decay does in a step.

    Attributes:
        rule: by which rule it acts.
        multiplier: c / (ηλ) at the learning rate ``lr_seen``; 0 for "none", NaN where c is no
            closed form of η and λ ("l2", "other"). "wd": 1. c / η where λ is unknown.
        power: c ∝ η**power: 1 as a rule, 2 for timm's corrected decay c = η²λ/η_max, 0 for c ∝ λ.
        lr_seen: the learning rate at which the multiplier was found.
        why: for "other", what was seen instead, or why nothing could be.
        name: the option that holds λ; "" where weights decay whatever the options say.
        rate_seen: λ where no parameter group holds it; NaN where it is unknown.
        ungraded: whether weights without a gradient decay too; see :func:`effect_at_work`.
    """

    rule: Rule
    multiplier: float
    power: int
    lr_seen: float
    why: str = ""
    name: str = "weight_decay"
    rate_seen: float = math.nan
    ungraded: bool = False

    def rate(self, group: dict[str, Any]) -> float:
        """λ as the group has it now."""
        return float(group[self.name]) if self.name in group else self.rate_seen

    def factor(self, group: dict[str, Any], optimizer: Optimizer | None = None) -> float | Tensor:
        """c at the group's live η and λ; on the device where the learning rate is a tensor.

        The share of θ ("wd", "scaled") or û ("rwd") that a step takes off; "proximal" leaves
        û / (1 + c). Where no group holds λ, the optimizer does.
        """
        if math.isnan(self.multiplier):
            return math.nan
        rate: float | Tensor = group.get(self.name, self.rate_seen) if self.name else 1.0
        if optimizer is not None and self.name and self.name not in group:
            rate = rate_held(optimizer, group, self.name)
        nominal: float | Tensor = group["lr"] * rate
        if self.multiplier == 1 and self.power == 1:
            return nominal
        if self.power == 1:
            return self.multiplier * nominal
        against: float | Tensor = (group["lr"] / self.lr_seen) ** (self.power - 1)
        return self.multiplier * nominal * against


def decay_effect(
    optimizer: Optimizer, group: dict[str, Any], like: Tensor, *, first_step: int = 1
) -> Effect:
    """By which rule, and how strongly, one parameter group's own ``weight_decay`` acts.

    Steps doubles of the optimizer, with no state and one scratch tensor, a wide and a tall one.
    Before each step the double is copied, and the copies are stepped with and without decay, at
    several learning rates and strengths, on large and small weights, with ordinary gradients and
    with gradients orthogonal to the weights; what decay changed tells the rule. Where there is no
    ``weight_decay``, or it does nothing, see :func:`effect_at_work`. The optimizer, its state, its
    parameters and the random state are left alone.

    Args:
        optimizer: any optimizer whose ``step()`` needs no closure.
        group: one of its parameter groups.
        like: a parameter of that group: optimizers may treat matrices and vectors differently.
        first_step: judge from this step of a fresh state on; some optimizers only set up their
            state in the first.

    Returns:
        The effect; "other" also where the double cannot be stepped.

    Example:
        >>> weights = [torch.zeros(4, 4, requires_grad=True)]
        >>> adamw = torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1)
        >>> effect = decay_effect(adamw, adamw.param_groups[0], weights[0])
        >>> effect.rule, round(effect.factor(adamw.param_groups[0]), 6)
        ('wd', 0.001)
    """
    named = Effect("none", 0.0, 1, math.nan)
    if "weight_decay" in group:
        named = _effect_of(optimizer, group, like, "weight_decay", first_step)
    return named if named.rule != "none" else _elsewhere(optimizer, group, like, named, first_step)


def effect_at_work(
    optimizer: Optimizer, group: dict[str, Any], like: Tensor, *, first_step: int = 1
) -> Effect:
    """What decays one parameter group's weights as its options stand, under whatever name.

    Where ``weight_decay`` is 0, absent, or does nothing, steps without a gradient tell whether the
    weights decay all the same, and which option ends that; if none does, how c follows η.

    Args:
        optimizer: as :func:`decay_effect` takes it, and the others too.
        group: one of its parameter groups.
        like: a parameter of that group.
        first_step: likewise.

    Returns:
        The effect; its name is "" where the rate is unknown.

    Example:
        >>> weights = [torch.zeros(4, 4, requires_grad=True)]
        >>> asgd = torch.optim.ASGD(weights)
        >>> effect = effect_at_work(asgd, asgd.param_groups[0], weights[0])
        >>> effect.rule, effect.name
        ('l2', 'lambd')
    """
    if group.get("weight_decay"):
        found = decay_effect(optimizer, group, like, first_step=first_step)
    else:
        named = Effect("none", 0.0, 1, math.nan)
        found = _elsewhere(optimizer, group, like, named, first_step)
    if found.rule == "none":
        return found
    return replace(found, ungraded=decays_ungraded(optimizer, group, like, found.name))


def options_of(optimizer: Optimizer, group: dict[str, Any]) -> tuple[Any, ...]:
    """What an optimizer's rule may depend on."""
    plain = {k: v for k, v in vars(optimizer).items() if isinstance(v, bool | int | float | str)}
    chosen = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    return type(optimizer), repr(plain), repr(chosen)


def _effect_of(
    optimizer: Optimizer, group: dict[str, Any], like: Tensor, name: str, first_step: int
) -> Effect:
    """What the rate under this name does."""
    rate = math.nan if name in group else rate_held(optimizer, group, name)
    if group.get("lr") is None:
        why = "it chooses its own learning rate"
        return Effect("other", math.nan, 1, math.nan, why, name, rate)
    lr = visible(group)
    assert lr is not None
    for dtype in _DTYPES:
        why, effect, is_none = "its steps are too small to tell", None, True
        for times in _LOUDER:
            found = _observed(optimizer, group, like, name, dtype, times * lr)
            if isinstance(found, str):
                why = f"it cannot be stepped alone ({found})"
                break
            seen = [one for several in found for one in several[first_step - 1 :]]
            if not all(one.is_finite() for one in seen):
                why = "its trial steps give numbers that are not finite"
                break
            effect = replace(_judged(seen, times * lr), name=name, rate_seen=rate)
            is_none &= effect.rule == "none"
            if any(one.shows(effect.rule) for one in seen) and is_none == (effect.rule == "none"):
                return effect
        if effect is not None:
            if all(one.is_still() for one in seen):
                why = "its steps leave a lone tensor where it is"
            elif is_none:
                return effect
            break
    return Effect("other", math.nan, 1, lr, why, name, rate)


def _observed(
    optimizer: Optimizer,
    group: dict[str, Any],
    like: Tensor,
    name: str,
    dtype: torch.dtype,
    lr: float,
) -> list[list["_Seen"]] | str:
    """What is seen of a wide and a tall tensor, as some scale the learning rate by the shape."""
    several = []
    for shape in shapes(like.ndim):
        theta = scratch(shape, like.device, dtype)
        found = tried(optimizer, group, theta, lambda double: list(_observe(double, lr, name)))
        if isinstance(found, str):
            return found
        several.append(found)
    return several


def _elsewhere(
    optimizer: Optimizer, group: dict[str, Any], like: Tensor, named: Effect, first_step: int
) -> Effect:
    """What decays the weights beside ``weight_decay``, if anything does."""
    lr = visible(group)
    for dtype in _DTYPES:
        name = rate_elsewhere(optimizer, group, like, lr, dtype)
        if name:
            effect = _effect_of(optimizer, group, like, name, first_step)
            why = "it takes something off, and not by what is known of it"
            return effect if effect.rule != "none" else replace(effect, rule="other", why=why)
        if name is not None:
            return _unnamed(optimizer, group, like, lr, dtype) or named
    return named


def decay_share(
    optimizer: Optimizer,
    group: dict[str, Any],
    weights: Tensor,
    rule: Rule,
    name: str = "weight_decay",
) -> float:
    """The mean share of these very weights that decay takes off in one step, as they are stored.

    The second step of a fresh double, at the group's own η and λ and in the weights' own dtype, so
    that decay lost to rounding shows. For "rwd" and "proximal" it is the share of û, else of θ.

    Args:
        optimizer: whose decay.
        group: one of its parameter groups.
        weights: some of its numbers.
        rule: by which it decays.
        name: the option that holds λ; "" if there is none: then there is no gradient either.

    Returns:
        The share; NaN for "l2" and "other", whose share is the gradient's affair, and where no
        double can be stepped.
    """
    if rule in ("l2", "other"):
        return math.nan
    lr = float(group["lr"])
    generator = torch.Generator().manual_seed(0)
    size = 0.01 if name else 0.0
    gradients = [size * random_like(weights, generator) for _ in range(2)]
    on = {name: rate_held(optimizer, group, name)} if name else {}

    def share(double: Double) -> float:
        double = double.stepped(lr, on, gradients[0])
        before = double.theta.detach().double()
        decayed = double.stepped(lr, on, gradients[1]).theta.detach().double()
        u_hat = before
        if name:
            u_hat = double.stepped(lr, {name: 0.0}, gradients[1]).theta.detach().double()
        of = u_hat if rule in ("rwd", "proximal") else before
        return float(((u_hat - decayed) * of).sum() / of.square().sum())

    found = tried(optimizer, group, weights.detach().clone().requires_grad_(), share)
    return math.nan if isinstance(found, str) else found


def is_adaptive(optimizer: Optimizer, group: dict[str, Any], like: Tensor) -> bool:
    """Whether larger gradients do not make proportionally larger steps, as they do in SGD."""

    def updates(double: Double) -> list[Tensor]:
        return [_eighth_update(double, size) for size in (1.0, 2.0, 3.0)]

    theta = scratch(shapes(like.ndim)[0], like.device, torch.float64)
    found = tried(optimizer, group, theta, updates)
    if isinstance(found, str):
        return False
    single, twice, thrice = found
    straight = torch.allclose(thrice - twice, twice - single)
    return not straight or torch.allclose(single, twice)


# --- what is seen, and what it means ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Seen:
    """One step of the scratch weights: with decay, without, and with λθ in the gradient."""

    lr: float
    strength: float
    theta: Tensor
    u_hat: Tensor
    taken: Tensor
    taken_by_l2: Tensor
    unremembered: bool  # L2 stays in the momentum, decoupled decay does not

    @property
    def _rounding(self) -> float:
        return 4 * torch.finfo(self.theta.dtype).eps * float(self.u_hat.abs().max())

    @property
    def _least(self) -> float:
        return 1e-5 * self.strength * float(self.theta.abs().min())

    def is_taken(self, expected: Tensor) -> bool:
        return torch.allclose(self.taken, expected, rtol=1e-4, atol=self._least + self._rounding)

    def is_finite(self) -> bool:
        """Whether the steps came to numbers."""
        return bool((self.taken.isfinite() & self.u_hat.isfinite()).all())

    def is_still(self) -> bool:
        """Whether the weights stayed where they were."""
        return torch.equal(self.u_hat, self.theta)

    def is_none(self) -> bool:
        """Whether nothing is taken off."""
        return float(self.taken.abs().max()) <= self._rounding

    def shows(self, rule: Rule) -> bool:
        """Whether the step is large enough to tell the rule from others."""
        if rule != "none":
            return float(self.taken.abs().max()) > 10 * self._least
        moved = (self.u_hat - self.theta).abs().mean()
        return bool(moved > _SEEN * self.theta.abs().mean())

    def share_of(self, weights: Tensor) -> float:
        """Which share of these weights was taken off; NaN if not the same from all."""
        share = float((self.taken * weights).sum() / weights.square().sum())
        return share if self.is_taken(share * weights) else math.nan


def _judged(seen: Sequence[_Seen], lr: float) -> Effect:
    if all(s.is_none() for s in seen):
        return Effect("none", 0.0, 1, lr)
    if all(s.unremembered for s in seen):
        beside = [s.share_of(s.theta) for s in seen]
        after = [s.share_of(s.u_hat) for s in seen]
        divided = [_undivided(share) for share in after]
        closed: dict[Rule, list[float]] = {"scaled": beside, "rwd": after, "proximal": divided}
        for rule, factors in closed.items():
            for power in (1, 2, 0):
                multiplier = _common(
                    c / s.strength * (lr / s.lr) ** (power - 1)
                    for c, s in zip(factors, seen, strict=True)
                )
                if not math.isnan(multiplier):
                    exact = rule == "scaled" and multiplier == 1 and power == 1
                    return Effect("wd" if exact else rule, multiplier, power, lr)
    if all(s.is_taken(s.taken_by_l2) for s in seen):
        return Effect("l2", math.nan, 1, lr)
    return Effect("other", math.nan, 1, lr, _why_not_closed(seen))


def _undivided(share: float) -> float:
    """The c of which û / (1 + c) leaves this share out."""
    return share / (1 - share) if share != 1 else math.nan


def _why_not_closed(seen: Sequence[_Seen]) -> str:
    if not all(s.unremembered for s in seen):
        return "what is taken off stays in the optimizer's state"
    multiples = sorted(s.share_of(s.theta) / s.strength for s in seen)
    if any(map(math.isnan, multiples)):
        return "a step takes off no fixed share of the weights"
    return f"a step takes off {multiples[0]:.2g} to {multiples[-1]:.2g} times ηλθ"


def _common(values: Iterable[float]) -> float:
    """The value that all of these have, 1 if it is 1 up to rounding; NaN if they differ."""
    found = list(values)
    if not all(math.isclose(value, found[0], rel_tol=1e-4) for value in found):
        return math.nan
    return 1.0 if math.isclose(found[0], 1.0, rel_tol=1e-4) else found[0]


# --- decay that no option ends ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What a step takes off without a gradient, and how one with a gradient differs from it."""

    lr: float
    share: float  # of θ; NaN if it is not the same of all
    update: Tensor


#: c by the share of θ that a step without a gradient takes off, and whether it falls after a step.
_UNNAMED: dict[Rule, tuple[Callable[[float], float], bool]] = {
    "scaled": (lambda share: share, False),
    "rwd": (lambda share: share, True),
    "proximal": (_undivided, True),
}


def _unnamed(
    optimizer: Optimizer, group: dict[str, Any], like: Tensor, lr: float | None, dtype: torch.dtype
) -> Effect | None:
    """The rule of a decay whose rate is unknown, from how it follows η; None if it is none.

    What falls after the step shrinks the update too, and by more the larger η is. What is of
    second order in η is no decay, but the step's own way of keeping to a norm (Fromage).
    """
    unknown = "it decays at a rate that is none of its options"
    other = Effect("other", math.nan, 1, math.nan if lr is None else lr, unknown, "")
    if lr is None:
        return other
    series: list[list[_Drawn]] = []
    for shape in shapes(like.ndim):
        theta = scratch(shape, like.device, dtype)
        found = tried(optimizer, group, theta, partial(_drawn, lr=lr))
        series += [] if isinstance(found, str) else found
    drawn = [one for several in series for one in several]
    if not drawn or not all(0 < one.share < 1 for one in drawn):
        return other
    _, half, twice = (one.share for one in series[0])
    if math.log2(twice / half) > 3:
        return None
    late = _misfit(series, after=True) < _misfit(series, after=False)
    for rule, (c_of, after) in _UNNAMED.items():
        for power in (1, 0):
            shares = (c_of(one.share) / lr * (lr / one.lr) ** power for one in drawn)
            multiplier = _common(shares)
            if after == late and not math.isnan(multiplier):
                return Effect(rule, multiplier, power, lr, "", "")
    return other


def _drawn(double: Double, lr: float) -> list[list[_Drawn]]:
    """At every size of the weights, with every learning rate."""
    off = {"weight_decay": 0.0}
    generator = torch.Generator().manual_seed(0)
    double = double.stepped(lr, off, torch.zeros_like(double.theta))
    series: list[list[_Drawn]] = []
    for size in _SIZES:
        theta = size * random_like(double.theta.detach(), generator)
        gradient = random_like(theta, generator)
        double.theta.detach().copy_(theta)
        series.append([])
        for live in (times * lr for times in _LR_SCALES):
            still = double.stepped(live, off, torch.zeros_like(theta)).theta.detach()
            moved = double.stepped(live, off, gradient).theta.detach()
            share = float(((theta - still) * theta).sum() / theta.square().sum())
            same = torch.allclose(theta - still, share * theta, rtol=1e-4, atol=1e-12 * size)
            series[-1].append(_Drawn(live, share if same else math.nan, moved - still))
    return series


def _misfit(series: Sequence[Sequence[_Drawn]], *, after: bool) -> float:
    """How far updates are from being ∝ η, or ∝ η(1 − c) where decay falls after them."""
    worst = 0.0
    for first, *others in series:
        for one in others:
            times = one.lr / first.lr
            if after:
                times *= (1 - one.share) / (1 - first.share)
            off = (one.update - times * first.update).norm() / one.update.norm()
            worst = max(worst, float(off))
    return worst


# --- stepping a double ------------------------------------------------------------------------


def _observe(double: Double, lr: float, name: str) -> Iterator[_Seen]:
    generator = torch.Generator().manual_seed(0)
    for step in range(_STEPS):
        live = lr * _LR_SCALES[step % 3]
        strength = _STRENGTHS[step // 2 % 2]
        before = _SIZES[step // 3 % 2] * random_like(double.theta.detach(), generator)
        double.theta.detach().copy_(before)
        gradient = random_like(before, generator)
        if step % 2 == 0:
            # Some optimizers decay differently where the gradient is orthogonal to the weights.
            gradient = _orthogonal(gradient, before)
        rate = strength / live
        none = {"weight_decay": 0.0, name: 0.0}
        decayed = double.stepped(live, none | {name: rate}, gradient)
        plain = double.stepped(live, none, gradient)
        sign = -1 if maximizes(double.optimizer, double.group) else 1
        with_l2 = double.stepped(live, none, gradient + sign * rate * before)
        u_hat = plain.theta.detach()
        yield _Seen(
            live,
            strength,
            before,
            u_hat,
            u_hat - decayed.theta.detach(),
            u_hat - with_l2.theta.detach(),
            all(map(torch.allclose, decayed.memory, plain.memory)),
        )
        double = decayed


def _eighth_update(double: Double, size: float) -> Tensor:
    """The last of eight: ADOPT begins to adapt at the second step, RAdam at the sixth."""
    generator = torch.Generator().manual_seed(0)
    before = double.theta.detach()
    for _ in range(8):
        before = double.theta.detach()
        double = double.stepped(1e-3, {"weight_decay": 0.0}, size * random_like(before, generator))
    return double.theta.detach() - before


def _orthogonal(gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient without what it has along each row of the weights."""
    row = tuple(range(1, weights.ndim)) or 0
    along = (gradient * weights).sum(row, keepdim=True) / weights.square().sum(row, keepdim=True)
    return gradient - along * weights
