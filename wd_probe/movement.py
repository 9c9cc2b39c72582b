"""How far a step moved a weight, read from the optimizer's state after it."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .kernel import Moved
from .sharding import local


def tells_movement(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether :func:`movement` knows this optimizer's update: torch's SGD, Adam and AdamW."""
    if group.get("maximize") or group.get("differentiable"):
        return False
    if type(optimizer) is SGD:
        return not group["nesterov"]
    return type(optimizer) in (Adam, AdamW) and not group["amsgrad"]


def movement(optimizer: Optimizer, group: dict[str, Any], p: Tensor, c: float) -> Moved:
    """What gives θ again from θ' = (1 − c)θ − ηU, after the step.

    SGD's U is its momentum buffer, or the gradient where it has none; Adam's (Kingma & Ba,
    Algorithm 1) is m̂ / (√v̂ + ε). As exact as the step itself was rounded: to some units in the
    last place of the larger of θ and ηU.

    Args:
        optimizer: one that :func:`tells_movement`.
        group: the parameter's group.
        p: the parameter, after its step.
        c: the share of θ that was taken off.
    """
    state, lr, up = optimizer.state[p], float(group["lr"]), 1 / (1 - c)
    if isinstance(optimizer, SGD):
        buffer = state.get("momentum_buffer") if group["momentum"] else p.grad
        assert buffer is not None
        return Moved(local(buffer), None, lr, 1.0, 0.0, up)
    steps = float(local(torch.as_tensor(state["step"])))
    beta1, beta2 = map(float, group["betas"])
    return Moved(
        local(state["exp_avg"]),
        local(state["exp_avg_sq"]),
        lr / (1 - beta1**steps),
        1 / math.sqrt(1 - beta2**steps),
        float(group["eps"]),
        up,
    )
