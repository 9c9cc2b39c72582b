"""A step taken again on a copy of the optimizer, without the penalty."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .aside import HOOKS, NOT_COPIED, generators_of, random_kept, unhooked


@torch.no_grad()
def undecayed(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """û of every parameter with a gradient: where this step would put it without weight decay.

    Copies weights, gradients and state, sets ``weight_decay`` to 0 and steps the copy; the random
    numbers it draws are those that the step itself will draw. Costs the step again, and memory for
    all that is copied.

    Args:
        optimizer: about to step.

    Returns:
        For each parameter that has a gradient the weights after the copy's step.
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
                copies[p] = copied
            memo[id(p)] = copied
    own = {name: value for name, value in vars(optimizer).items() if name not in NOT_COPIED}
    twin.__dict__.update(copy.deepcopy(own, memo))
    twin.__dict__.update({name: OrderedDict() for name in HOOKS})
    set_rate(twin, 0.0)
    with random_kept(generators), unhooked():
        twin.step()
    return {p: copied.detach() for p, copied in copies.items()}


def set_rate(optimizer: Optimizer, rate: float, name: str = "weight_decay") -> None:
    """Give the option this value wherever an optimizer may look it up."""
    for holder in (*optimizer.param_groups, optimizer.defaults, vars(optimizer)):
        if name in holder:
            holder[name] = rate
