"""Whether a step decays weights that have no gradient, found by its effect on scratch weights.

Most leave them alone. Some take a missing gradient for zeros, as Muons that keep several processes
in step do; some shrink all their weights ahead of the step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .doubles import Double, scratch, shapes, tried, visible

_STRENGTH = 0.05  # ηλ on the scratch weights
_DTYPES = (torch.float64, torch.float32)  # fused and 8-bit kernels may know only the second


def decays_ungraded(optimizer: Optimizer, group: dict[str, Any], like: Tensor, name: str) -> bool:
    """Whether weights without a gradient decay too.

    Args:
        optimizer: one that decays.
        group: one of its parameter groups.
        like: a parameter of that group.
        name: the option that holds λ; "" if there is none.
    """
    lr = visible(group)

    def decays(double: Double) -> bool:
        still = double.theta
        rates = {name: _STRENGTH / (lr or 1.0)} if name else {}
        if name:
            still = double.stepped(lr, {name: 0.0}, None).theta
        return not torch.equal(double.stepped(lr, rates, None).theta, still)

    shape = shapes(like.ndim)[0]
    found = (
        tried(optimizer, group, scratch(shape, like.device, dtype), decays) for dtype in _DTYPES
    )
    return next((one for one in found if isinstance(one, bool)), False)
