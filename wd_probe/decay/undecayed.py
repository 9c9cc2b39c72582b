"""A step taken again on a copy of the optimizer, without the penalty."""

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .aside import HOOKS, NOT_COPIED, generators_of, random_kept, unhooked


@torch.no_grad()
def undecayed(
    optimizer: Optimizer, rates: Iterable[str] = ("weight_decay",)
) -> dict[Tensor, Tensor]:
    """û of every parameter: where this step would put it without weight decay.

    Copies weights, gradients and state, sets decay rates to 0 and steps the copy; the random
    numbers it draws are those that the step itself will draw. Costs the step again, and memory for
    all that is copied.

    Args:
        optimizer: about to step.
        rates: the options that hold decay rates.

    Returns:
        For each parameter the weights after the copy's step.
    """
    twin: Optimizer = object.__new__(type(optimizer))
    generators = generators_of(optimizer)
    memo: dict[int, Any] = {id(one): one for one in generators} | {id(optimizer): twin}
    copies: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            copied = torch.nn.Parameter(p.detach().clone(), p.requires_grad)
            if p.grad is not None:
                copied.grad = p.grad.detach().clone()
            memo[id(p)] = copies[p] = copied
    own = {name: value for name, value in vars(optimizer).items() if name not in NOT_COPIED}
    twin.__dict__.update(copy.deepcopy(own, memo))
    twin.__dict__.update({name: OrderedDict() for name in HOOKS})
    for name in rates:
        set_rate(twin, 0.0, name)
    with random_kept(generators), unhooked():
        twin.step()
    return {p: copied.detach() for p, copied in copies.items()}


def set_rate(optimizer: Optimizer, rate: float, name: str = "weight_decay") -> None:
    """Give an option this value wherever an optimizer may look it up."""
    for holder in holders(optimizer):
        if name in holder:
            was = holder[name]
            holder[name] = torch.full_like(was, rate) if isinstance(was, Tensor) else rate
    if isinstance(getattr(type(optimizer), name, None), int | float):
        vars(optimizer)[name] = rate


def holders(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The dictionaries in which an optimizer may look up its options."""
    own = vars(optimizer)
    held = (value if isinstance(value, dict) else _settings(value) for value in own.values())
    return [*optimizer.param_groups, own, *held]


def _settings(value: Any) -> dict[str, Any]:
    """The attributes of a plain object, such as a configuration."""
    is_more = isinstance(value, Tensor | torch.nn.Module | Optimizer) or callable(value)
    return {} if is_more else getattr(value, "__dict__", {})
