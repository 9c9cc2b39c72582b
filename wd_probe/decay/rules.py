"""Which decay rule an optimizer really runs, found by its effect on scratch weights."""

import copy
import inspect
import math
import random
import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import first_line
from .undecayed import HOOKS, NOT_COPIED, random_kept, set_rate

#: "none": weight_decay changes nothing. "l2": the gradient becomes g + λθ. "wd": exactly ηλθ is
#: taken off beside the step. "rwd": ηλû is taken off after it. "proximal": û is divided by 1 + ηλ
#: after it. "scaled": another constant multiple of ηλθ is taken off beside the step, or one that
#: follows another power of η. "other": none of these in every situation tried.
Rule = Literal["none", "l2", "wd", "rwd", "proximal", "scaled", "other"]

T = TypeVar("T")

_STEPS = 12  # every pairing of what follows, and the periods of built-in lookaheads
_LR_SCALES = (1.0, 0.5, 2.0)
_STRENGTHS = (0.05, 0.02)  # ηλ on the scratch weights: large enough to stand clear of rounding
_SIZES = (1.0, 0.01)  # of the weights: trust ratios are clipped on one side
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
        for shape in _shapes(like.ndim):  # some scale the learning rate by the shape
            theta = _scratch(shape, like.device, dtype)
            found = _tried(optimizer, group, theta, lambda double: list(_observe(double, lr)))
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
    gradients = [0.01 * _random_like(weights, generator) for _ in range(2)]

    def share(double: Optimizer) -> float:
        double = _stepped(double, lr, rate, gradients[0])
        decayed, plain = (_stepped(double, lr, r, gradients[1]) for r in (rate, 0.0))
        u_hat = _weights(plain).detach().double()
        of = u_hat if rule in ("rwd", "proximal") else _weights(double).detach().double()
        taken = u_hat - _weights(decayed).detach().double()
        return float((taken * of).sum() / of.square().sum())

    if rule in ("l2", "other"):
        return math.nan
    found = _tried(optimizer, group, weights.detach().clone().requires_grad_(), share)
    return math.nan if isinstance(found, str) else found


def is_adaptive(optimizer: Optimizer, group: dict[str, Any], like: Tensor) -> bool:
    """Whether larger gradients do not make proportionally larger steps, as they do in SGD."""

    def updates(double: Optimizer) -> list[Tensor]:
        return [_eighth_update(double, size) for size in (1.0, 2.0, 3.0)]

    theta = _scratch(_shapes(like.ndim)[0], like.device, torch.float64)
    found = _tried(optimizer, group, theta, updates)
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


def _tried(
    optimizer: Optimizer, group: dict[str, Any], theta: Tensor, use: Callable[[Optimizer], T]
) -> T | str:
    """What ``use`` makes of a double that holds these weights, or why there is none."""
    if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
        return "it wraps another optimizer"
    first = ""
    for with_graph in (False, True):  # some take a Hessian
        theta.__dict__["with_graph"] = with_graph
        for start in (_double, _rebuilt):
            try:
                return use(start(optimizer, group, theta))
            except Exception as error:
                first = first or first_line(error)
    return first


def _observe(double: Optimizer, lr: float) -> Iterator[_Seen]:
    generator = torch.Generator().manual_seed(0)
    for step in range(_STEPS):
        live = lr * _LR_SCALES[step % 3]
        strength = _STRENGTHS[step // 2 % 2]
        before = _SIZES[step // 3 % 2] * _random_like(_weights(double).detach(), generator)
        _weights(double).detach().copy_(before)
        gradient = _random_like(before, generator)
        if step % 2 == 0:
            # Some optimizers decay differently where the gradient is orthogonal to the weights.
            gradient = _orthogonal(gradient, before)
        rate = strength / live
        decayed = _stepped(double, live, rate, gradient)
        plain = _stepped(double, live, 0.0, gradient)
        sign = -1 if double.param_groups[0].get("maximize") else 1
        with_l2 = _stepped(double, live, 0.0, gradient + sign * rate * before)
        u_hat = _weights(plain).detach()
        yield _Seen(
            live,
            strength,
            before,
            u_hat,
            u_hat - _weights(decayed).detach(),
            u_hat - _weights(with_l2).detach(),
            all(map(torch.allclose, _memory(decayed), _memory(plain))),
        )
        double = decayed


def _stepped(double: Optimizer, lr: float, rate: float, gradient: Tensor) -> Optimizer:
    """A copy of the double after one step."""
    group = double.param_groups[0]
    twin = _double(double, group, _cloned(group["params"][0]), state=double.state)
    (own,) = twin.param_groups
    own["lr"] = torch.full_like(own["lr"], lr) if isinstance(own["lr"], Tensor) else lr
    set_rate(twin, rate)
    theta = own["params"][0]
    theta.grad = gradient.clone()  # some add λθ to it in place
    if theta.__dict__["with_graph"]:
        theta.grad = theta.grad + (theta - theta.detach())
    with _undisturbed(theta.device):
        # The same numbers for every copy, and others in every step.
        seed = int(1e6 * float(theta.detach().abs().sum()))
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        twin.step()
    theta.grad = None
    return twin


def _eighth_update(double: Optimizer, size: float) -> Tensor:
    """The last of eight: ADOPT begins to adapt at the second step, RAdam at the sixth."""
    generator = torch.Generator().manual_seed(0)
    before = _weights(double).detach()
    for _ in range(8):
        before = _weights(double).detach()
        double = _stepped(double, 1e-3, 0.0, size * _random_like(before, generator))
    return _weights(double).detach() - before


def _double(
    optimizer: Optimizer, group: dict[str, Any], theta: Tensor, state: Any = None
) -> Optimizer:
    """An optimizer of the same class and options over one weight, sharing nothing with it."""
    double: Optimizer = object.__new__(type(optimizer))
    # Whatever else holds the optimizer's weights gets an empty one: nothing reaches the real ones.
    blank = torch.empty(0, device="meta")
    held = (p for other in optimizer.param_groups for p in other["params"])
    memo: dict[int, Any] = dict.fromkeys(map(id, held), blank)
    memo |= {id(optimizer): double, id(group["params"][0]): theta}
    replaced = {"state", "param_groups", *NOT_COPIED}
    own = {name: value for name, value in vars(optimizer).items() if name not in replaced}
    double.__dict__.update(copy.deepcopy(own, memo))
    double.__dict__.update({name: OrderedDict() for name in HOOKS})
    double.state = defaultdict(dict) if state is None else copy.deepcopy(state, memo)
    options = {name: value for name, value in group.items() if name != "params"}
    if state is None:
        options.pop("step", None)  # some count steps here, and set up their state at the first
    double.param_groups = [{**copy.deepcopy(options, memo), "params": [theta]}]
    return double


def _rebuilt(optimizer: Optimizer, group: dict[str, Any], theta: Tensor) -> Optimizer:
    """The same made by the class itself, for those that set up their state when they are made."""
    accepted = inspect.signature(type(optimizer)).parameters
    options = {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
    defaults = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    make: Callable[..., Optimizer] = type(optimizer)
    return make([{**options, "params": [theta]}], **defaults)


def _weights(double: Optimizer) -> Tensor:
    weights: Tensor = double.param_groups[0]["params"][0]
    return weights


def _memory(double: Optimizer) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(list(double.state.values()))
    return [leaf.double().cpu() for leaf in leaves if isinstance(leaf, Tensor)]


def _cloned(theta: Tensor) -> Tensor:
    clone = theta.detach().clone().requires_grad_()
    clone.__dict__.update(theta.__dict__)  # AdaHessian keeps a Hessian there
    return clone


def _shapes(ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A wide and a tall one."""
    kernel = (3,) * (ndim - 2)
    return ((4, 6)[:ndim] + kernel, (5, 3)[:ndim] + kernel)


def _scratch(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type == "mps":
        dtype = torch.float32
    empty = torch.empty(shape, device=device, dtype=dtype)
    return _random_like(empty, torch.Generator().manual_seed(1)).requires_grad_()


def _random_like(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers away from zero, of both signs."""
    values = torch.rand(weights.shape, generator=generator, dtype=torch.float64) + 0.5
    signs = torch.randint(0, 2, weights.shape, generator=generator) * 2 - 1
    return (values * signs).to(weights)


def _orthogonal(gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient without what it has along each row of the weights."""
    row = tuple(range(1, weights.ndim)) or 0
    along = (gradient * weights).sum(row, keepdim=True) / weights.square().sum(row, keepdim=True)
    return gradient - along * weights


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the random states as they were, warn of nothing, compile nothing, use one thread."""
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # for so few numbers, waking others takes longer than the work
        stack.enter_context(random_kept([device]))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
