"""Where an optimizer holds its decay rate, if not in ``weight_decay``: found by what ends decay.

With gradients of zero a step leaves the weights where they are, unless they decay. The option whose
zero ends that holds the rate; where none does, it stands in the code.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .doubles import Double, random_like, scratch, shapes, tried
from .undecayed import holders

_STEPS = 8
_ALONG = 0.6  # the least cosine of what is taken off with the weights; noise has less
_NO_RATES = {"lr", "weight_decay", "initial_lr", "params"}
_LIKELY = re.compile(r"(^|_)(wd|decay|l2|l1|lambda|lambd|lmbd|reg|penalty|shrink)", re.IGNORECASE)


def rate_elsewhere(
    optimizer: Optimizer, group: dict[str, Any], like: Tensor, lr: float | None, dtype: torch.dtype
) -> str | None:
    """The option that holds a decay rate beside ``weight_decay``.

    Returns:
        Its name; "" where weights decay whatever the options say; None where they do not decay.
    """
    off = {"weight_decay": 0.0}
    if not _decays(optimizer, group, like, lr, dtype, off):
        return None
    for name in sorted(_numbers(optimizer, group), key=lambda name: not looks_like_a_rate(name)):
        without = off | {name: 0.0}
        if not _decays(optimizer, group, like, lr, dtype, without) and _steps(
            optimizer, group, like, lr, dtype, without
        ):
            return name
    return ""


def _numbers(optimizer: Optimizer, group: dict[str, Any]) -> Iterator[str]:
    """Names of options that are numbers other than zero."""
    classes = (vars(one) for one in type(optimizer).__mro__)
    yield from dict.fromkeys(
        name
        for holder in (group, *holders(optimizer), *classes)
        for name, value in holder.items()
        if isinstance(name, str) and name not in _NO_RATES and _is_number(value) and float(value)
    )


def rate_held(optimizer: Optimizer, group: dict[str, Any], name: str) -> float:
    """The rate under this name: the group's own, or the optimizer's; NaN if there is none."""
    for holder in (group, *holders(optimizer)):
        if name in holder:
            return float(holder[name])
    return float(getattr(optimizer, name, math.nan))


def looks_like_a_rate(name: str) -> bool:
    """Whether an option is called as decay rates are."""
    return bool(_LIKELY.search(name))


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) and not isinstance(value, bool)


def _decays(
    optimizer: Optimizer,
    group: dict[str, Any],
    like: Tensor,
    lr: float | None,
    dtype: torch.dtype,
    rates: Mapping[str, float],
) -> bool:
    """Whether steps without a gradient draw weights towards zero, and not only the first does."""

    def drawn(double: Double) -> bool:
        start = double.theta.detach().clone()
        zero = torch.zeros_like(start)
        double = double.stepped(lr, rates, zero)
        first = double.theta.detach().clone()
        for _ in range(_STEPS - 1):
            double = double.stepped(lr, rates, zero)
        last = double.theta.detach()
        taken = (start - last).norm()
        rounding = 8 * torch.finfo(start.dtype).eps * start.norm()
        if not bool(torch.isfinite(last).all()) or taken <= rounding:
            return False
        along = ((start - last) * start).sum() / (taken * start.norm())
        goes_on = (first - last).norm() > rounding  # else they are put somewhere, as FTRL's at 0
        return bool(along > _ALONG and goes_on)

    return all(
        found is True
        for shape in shapes(like.ndim)
        for found in (tried(optimizer, group, scratch(shape, like.device, dtype), drawn),)
    )


def _steps(
    optimizer: Optimizer,
    group: dict[str, Any],
    like: Tensor,
    lr: float | None,
    dtype: torch.dtype,
    rates: Mapping[str, float],
) -> bool:
    """Whether gradients move the weights about as far with these rates as without them."""

    def moved(double: Double) -> float:
        gradient = random_like(double.theta.detach(), torch.Generator().manual_seed(0))
        far = []
        for chosen in (rates, {}):
            ends = []
            for one in (gradient, torch.zeros_like(gradient)):
                stepped = double.stepped(lr, chosen, one).stepped(lr, chosen, one)
                ends.append(stepped.theta.detach())
            far.append(float((ends[0] - ends[1]).norm()))
        return far[0] / far[1] if far[1] else math.nan

    found = tried(optimizer, group, scratch(shapes(like.ndim)[0], like.device, dtype), moved)
    return not isinstance(found, str) and 0.1 < found < 10
