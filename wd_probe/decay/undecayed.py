"""A step taken again on a copy of the optimizer, without the penalty."""

import copy
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

#: What torch keeps the hooks of an optimizer in.
HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# A scheduler's patch of "step" would step the original.
NOT_COPIED = {"step", *HOOKS}


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
    memo: dict[int, Any] = {id(optimizer): twin}
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
    with random_kept({p.device for p in copies}):
        twin.step()
    return {p: copied.detach() for p, copied in copies.items()}


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give ``weight_decay`` this value wherever an optimizer may look it up."""
    for holder in (*optimizer.param_groups, optimizer.defaults, vars(optimizer)):
        if "weight_decay" in holder:
            holder["weight_decay"] = rate


@contextmanager
def random_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Python's, numpy's and torch's random numbers go on afterwards as if none had been drawn."""
    python, numbers = random.getstate(), np.random.get_state()
    cuda = [device for device in devices if device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
