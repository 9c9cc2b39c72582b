"""How far a step moved a weight, read from the optimizer's state after it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..sharding import local


class Moved(NamedTuple):
    """How far a step moved a tensor, by the optimizer's state after it.

    θ = (θ' + rate·first / (√second·root + eps)) · up; without ``second``, (θ' + rate·first) · up.
    """

    first: Tensor
    second: Tensor | None
    rate: float
    root: float
    eps: float
    up: float

    def before(self, stepped: Tensor) -> Tensor:
        """θ; 0 where it is no more than rounding may have left of a zero."""
        moved = self.rate * self.first.float()
        if self.second is not None:
            moved = moved / (self.second.float().sqrt() * self.root + self.eps)
        theta = (stepped.float() + moved) * self.up
        still = (theta.abs() <= 1e-6 * moved.abs()) & moved.isfinite()
        return torch.where(still, 0.0, theta)


def tells_movement(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether :func:`movement` knows this optimizer's update: torch's SGD, Adam and AdamW."""
    if group.get("maximize") or group.get("differentiable"):
        return False
    if type(optimizer) is SGD:
        return not group["nesterov"]
    return type(optimizer) in (Adam, AdamW) and not group["amsgrad"]


def movements(
    optimizer: Optimizer, stepped: Sequence[tuple[Tensor, dict[str, Any], float]]
) -> list[Moved]:
    """What gives θ again from θ' = (1 − c)θ − ηU, after the step.

    SGD's U is its momentum buffer, or the gradient where it has none; Adam's (Kingma & Ba,
    Algorithm 1) is m̂ / (√v̂ + ε). As exact as the step itself was rounded: to some units in the
    last place of the larger of θ and ηU. Waits once for the device where Adam counts its steps
    there (``fused``, ``capturable``).

    Args:
        optimizer: one that :func:`tells_movement`.
        stepped: parameters after their step, each with its group and c, the share of θ that was
            taken off.
    """
    if not isinstance(optimizer, SGD):
        states = [optimizer.state[p] for p, _, _ in stepped]
        steps = _numbers([state["step"] for state in states])
        return [
            _adams(state, group, count, c)
            for state, count, (_, group, c) in zip(states, steps, stepped, strict=True)
        ]
    moved = []
    for p, group, c in stepped:
        buffer = optimizer.state[p].get("momentum_buffer") if group["momentum"] else p.grad
        assert buffer is not None
        moved.append(Moved(local(buffer), None, float(group["lr"]), 1.0, 0.0, 1 / (1 - c)))
    return moved


def _adams(state: dict[str, Any], group: dict[str, Any], steps: float, c: float) -> Moved:
    beta1, beta2 = map(float, group["betas"])
    stepped = steps > 0  # else `GradScaler` has voided the first
    return Moved(
        local(state["exp_avg"]),
        local(state["exp_avg_sq"]),
        float(group["lr"]) / (1 - beta1**steps) if stepped else 0.0,
        1 / math.sqrt(1 - beta2**steps) if stepped else 1.0,
        float(group["eps"]),
        1 / (1 - c),
    )


def _numbers(scalars: Sequence[float | Tensor]) -> list[float]:
    """The values, brought from a device together."""
    there = [local(x) for x in scalars if isinstance(x, Tensor) and not x.is_cpu]
    fetched = iter(torch.stack(there).tolist() if there else ())
    return [next(fetched) if isinstance(x, Tensor) and not x.is_cpu else float(x) for x in scalars]
