"""What an optimizer's own step depends on, found by its effect on scratch weights."""

from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .doubles import Double, maximizes, random_like, scratch, shapes, tried, visible

_STEPS = 8  # and so past the periods of most built-in lookaheads
_KEPT = (0.9, 0.4)
_SIZES = (1.0, 0.01)
_DTYPES = (torch.float64, torch.float32)  # fused and 8-bit kernels may know only the second


class Updates:
    """What the steps of some optimizers depend on; each kind of step is tried once.

    A kind of step is a class with its flags: what other options say (how fast, how smooth) may
    change at every step, and does not decide these questions.
    """

    def __init__(self) -> None:
        self._reads: dict[Any, bool] = {}
        self._climbs: dict[Any, bool] = {}

    def reads_weights(self, optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> bool:
        """Whether U or what is remembered of it depends on the weights, as LAMB's and LARS' do.

        Asked of θ against (1 − c)θ; of an optimizer that cannot be tried, or that does not move a
        weight that is alone, it is taken to.
        """
        kind = (*_flags(optimizer, group), p.ndim, p.dtype, p.device)
        if kind not in self._reads:
            self._reads[kind] = _reads_weights(optimizer, group, p)
        return self._reads[kind]

    def climbs(self, optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> bool:
        """Whether a step follows the gradient (``maximize=True``) instead of opposing it."""
        kind = (*_flags(optimizer, group), p.ndim, p.dtype, p.device)
        if kind not in self._climbs:
            self._climbs[kind] = _climbs(optimizer, group, p)
        return self._climbs[kind]


def _flags(optimizer: Optimizer, group: dict[str, Any]) -> tuple[Any, ...]:
    found: list[Any] = [type(optimizer)]
    for holder in (group, vars(optimizer)):
        for name, value in holder.items():
            if value is None or isinstance(value, bool | str):
                found.append((name, value))
            elif isinstance(value, FunctionType):
                found.append((name, id(value)))
    return tuple(found)


def _reads_weights(optimizer: Optimizer, group: dict[str, Any], like: Tensor) -> bool:
    lr = visible(group)
    for dtype in _DTYPES:
        found: list[bool | str] = [
            tried(
                optimizer,
                group,
                scratch(shape, like.device, dtype),
                lambda double: _differs(double, lr),
            )
            for shape in shapes(like.ndim)
        ]
        if not any(isinstance(one, str) for one in found):
            return any(found)
    return True


def _differs(double: Double, lr: float | None) -> bool:
    """Whether steps from weights and from a share of them differ, or none is taken."""
    generator = torch.Generator().manual_seed(0)
    moves = False
    for step in range(_STEPS):
        theta = _SIZES[step // 2 % 2] * random_like(double.theta.detach(), generator)
        gradient = random_like(theta, generator)
        both = []
        for kept in (1.0, _KEPT[step % 2]):
            double.theta.detach().copy_(kept * theta)
            stepped = double.stepped(lr, {}, gradient)
            both.append((stepped.theta.detach() - kept * theta, stepped.memory, stepped))
        (update, memory, stepped), (other, others, _) = both
        rounding = 8 * torch.finfo(theta.dtype).eps * float(theta.abs().max())
        if not torch.allclose(update, other, rtol=1e-5, atol=rounding):
            return True
        if not all(map(torch.allclose, memory, others)):
            return True
        moves |= bool(update.any())
        double = stepped
    return not moves


def _climbs(optimizer: Optimizer, group: dict[str, Any], like: Tensor) -> bool:
    lr = visible(group)

    def along(double: Double) -> float:
        """How far steps go along a gradient that stays the same."""
        before = double.theta.detach().clone()
        gradient = random_like(before, torch.Generator().manual_seed(0))
        for _ in range(_STEPS):
            double = double.stepped(lr, {}, gradient)
        return float(((double.theta.detach() - before) * gradient).sum())

    for dtype in _DTYPES:
        found = tried(optimizer, group, scratch(shapes(like.ndim)[0], like.device, dtype), along)
        if not isinstance(found, str) and found:
            return found > 0
    return maximizes(optimizer, group)
