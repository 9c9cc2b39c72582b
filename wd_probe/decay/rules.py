"""Which decay rule an optimizer really runs, found by its effect on scratch weights."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from .doubles import Double, random_like, scratch, shapes, tried

#: "none": weight_decay changes nothing. "l2": the gradient becomes g + λθ. "wd": exactly ηλθ is
#: taken off beside the step. "rwd": ηλû is taken off after it. "proximal": û is divided by 1 + ηλ
#: after it. "scaled": another constant multiple of ηλθ is taken off beside the step, or one that
#: follows another power of η. "other": none of these in every situation tried.
Rule = Literal["none", "l2", "wd", "rwd", "proximal", "scaled", "other"]

_STEPS = 12  # every pairing of what follows, and the periods of built-in lookaheads
_LR_SCALES = (1.0, 0.5, 2.0)
_STRENGTHS = (0.05, 0.02)  # ηλ on the scratch weights: large enough to stand clear of rounding
_SIZES = (1.0, 0.01)  # of the weights: trust ratios are clipped on one side
_NAME = "weight_decay"
_DTYPES = (torch.float64, torch.float32)  # fused and 8-bit kernels may know only the second


@dataclass(frozen=True, slots=True)
class Effect:
    """What one parameter group's ``weight_decay`` does in a step.

    Attributes:
        rule: by which rule it acts.
        multiplier: c / (ηλ) at the learning rate ``lr_seen``; 0 for "none", NaN where c is no
            closed form of η and λ ("l2", "other"). "wd": 1.
        power: c ∝ η**power: 1 as a rule, 2 for timm's corrected decay c = η²λ/η_max, 0 for c ∝ λ.
        lr_seen: the learning rate at which the multiplier was found.
        why: for "other", what was seen instead, or why nothing could be.
    """

    rule: Rule
    multiplier: float
    power: int
    lr_seen: float
    why: str = ""

    def factor(self, group: dict[str, Any]) -> float | Tensor:
        """c at the group's live η and λ; on the device where the learning rate is a tensor.

        The share of θ ("wd", "scaled") or û ("rwd") that a step takes off; "proximal" leaves
        û / (1 + c).
        """
        nominal: float | Tensor = group["lr"] * group["weight_decay"]
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
    with gradients orthogonal to the weights; what decay changed tells the rule. The optimizer, its
    state, its parameters and the random state are left alone.

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
    if "weight_decay" not in group:
        return Effect("none", 0.0, 1, math.nan)
    if group.get("lr") is None:
        return Effect("other", math.nan, 1, math.nan, "it chooses its own learning rate")
    lr = float(group["lr"]) or 1e-3
    for dtype in _DTYPES:
        seen: list[_Seen] = []
        for shape in shapes(like.ndim):  # some scale the learning rate by the shape
            theta = scratch(shape, like.device, dtype)
            found = tried(optimizer, group, theta, lambda double: list(_observe(double, lr)))
            if isinstance(found, str):
                break
            seen += found[first_step - 1 :]
        else:
            return _judged(seen, lr)
    return Effect("other", math.nan, 1, lr, f"it cannot be stepped alone ({found})")


def decay_share(optimizer: Optimizer, group: dict[str, Any], weights: Tensor, rule: Rule) -> float:
    """The mean share of these very weights that decay takes off in one step, as they are stored.

    The second step of a fresh double, at the group's own η and λ and in the weights' own dtype, so
    that decay lost to rounding shows. For "rwd" and "proximal" it is the share of û, else of θ.

    Returns:
        The share; NaN for "l2" and "other", whose share is the gradient's affair, and where no
        double can be stepped.
    """
    lr, rate = float(group["lr"]), float(group["weight_decay"])
    generator = torch.Generator().manual_seed(0)
    gradients = [0.01 * random_like(weights, generator) for _ in range(2)]

    def share(double: Double) -> float:
        double = double.stepped(lr, {_NAME: rate}, gradients[0])
        decayed, plain = (double.stepped(lr, {_NAME: r}, gradients[1]) for r in (rate, 0.0))
        u_hat = plain.theta.detach().double()
        of = u_hat if rule in ("rwd", "proximal") else double.theta.detach().double()
        taken = u_hat - decayed.theta.detach().double()
        return float((taken * of).sum() / of.square().sum())

    if rule in ("l2", "other"):
        return math.nan
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

    def is_taken(self, expected: Tensor) -> bool:
        rounding = 4 * torch.finfo(self.theta.dtype).eps * float(self.u_hat.abs().max())
        least = 1e-5 * self.strength * float(self.theta.abs().min())
        return torch.allclose(self.taken, expected, rtol=1e-4, atol=least + rounding)

    def share_of(self, weights: Tensor) -> float:
        """Which share of these weights was taken off; NaN if not the same from all."""
        share = float((self.taken * weights).sum() / weights.square().sum())
        return share if self.is_taken(share * weights) else math.nan


def _judged(seen: Sequence[_Seen], lr: float) -> Effect:
    if all(s.is_taken(torch.zeros_like(s.taken)) for s in seen):
        return Effect("none", 0.0, 1, lr)
    if all(s.unremembered for s in seen):
        beside = [s.share_of(s.theta) for s in seen]
        after = [s.share_of(s.u_hat) for s in seen]
        divided = [share / (1 - share) for share in after]
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


# --- stepping a double ------------------------------------------------------------------------


def _observe(double: Double, lr: float) -> Iterator[_Seen]:
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
        decayed = double.stepped(live, {_NAME: rate}, gradient)
        plain = double.stepped(live, {_NAME: 0.0}, gradient)
        sign = -1 if double.group.get("maximize") else 1
        with_l2 = double.stepped(live, {_NAME: 0.0}, gradient + sign * rate * before)
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
        double = double.stepped(1e-3, {_NAME: 0.0}, size * random_like(before, generator))
    return double.theta.detach() - before


def _orthogonal(gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient without what it has along each row of the weights."""
    row = tuple(range(1, weights.ndim)) or 0
    along = (gradient * weights).sum(row, keepdim=True) / weights.square().sum(row, keepdim=True)
    return gradient - along * weights
