"""Which decay rule an optimizer really runs, found by its effect on scratch weights."""

import warnings
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

#: "none": weight_decay changes nothing. "l2": the gradient becomes g + λθ. "wd": exactly ηλθ is
#: taken off beside the step. "rwd": ηλû is taken off after it. "other": none of these.
Rule = Literal["none", "l2", "wd", "rwd", "other"]

_STRENGTH = 0.1  # ηλ on the scratch weights: large enough to stand clear of rounding
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
)


def decay_rule(optimizer: Optimizer, group: dict[str, Any], like: Tensor) -> Rule:
    """The rule by which one parameter group's own ``weight_decay`` acts.

    Steps a double of the optimizer, with no state and one scratch weight, with and without decay
    from the same state, at two learning rates and at different ages; what decay changed tells the
    rule. The optimizer, its state, its parameters and the random state are left alone.

    Args:
        optimizer: any optimizer whose ``step()`` needs no closure.
        group: one of its parameter groups.
        like: a parameter of that group: optimizers may treat matrices and vectors differently.

    Returns:
        The rule; "other" also where the double cannot be stepped.
    """
    if "weight_decay" not in group:
        return "none"
    if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
        return "other"  # a wrapper's double would step the wrapped optimizer itself
    lr = float(group.get("lr") or 1e-3)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = {
                _rule_at(optimizer, group, like, lr * factor, age)
                for factor, age in ((1.0, 1), (1.0, 3), (0.5, 2))
            }
    except Exception:  # an optimizer that a scratch weight cannot drive has no rule known here
        return "other"
    return found.pop() if len(found) == 1 else "other"


def _rule_at(
    optimizer: Optimizer, group: dict[str, Any], like: Tensor, lr: float, age: int
) -> Rule:
    rate = _STRENGTH / lr
    double = _Double(optimizer, group, like, lr, age, rate)
    theta, decayed, memory = double.last_step(rate)
    _, plain, plain_memory = double.last_step(0.0)
    taken = plain - decayed

    def close(expected: Tensor) -> bool:
        return torch.allclose(taken, expected, rtol=1e-3, atol=1e-5 * _STRENGTH)

    if close(torch.zeros_like(taken)):
        return "none"
    # L2 under momentum takes off the same at first, but leaves it in the momentum too.
    unremembered = all(map(torch.allclose, memory, plain_memory))
    if close(_STRENGTH * theta) and unremembered:
        return "wd"
    if close(_STRENGTH * plain) and unremembered:
        return "rwd"
    _, with_l2, _ = double.last_step(0.0, l2=rate)
    return "l2" if close(plain - with_l2) else "other"


@dataclass(frozen=True, slots=True)
class _Double:
    """An optimizer of the same class and options over one scratch weight, stepped ``age`` times."""

    optimizer: Optimizer
    group: dict[str, Any]
    like: Tensor
    lr: float
    age: int
    rate: float

    def last_step(self, rate: float, l2: float = 0.0) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Weights before and after the last step, and the state it leaves.

        ``rate`` is the decay rate of that step alone; ``l2``·θ is added to its gradient.
        """
        generator = torch.Generator().manual_seed(0)
        theta = self._scratch(generator).requires_grad_()
        double = self._empty(theta)
        before = theta.detach().clone()
        for number in range(1, self.age + 1):
            double.param_groups[0]["weight_decay"] = rate if number == self.age else self.rate
            before = theta.detach().clone()
            gradient = self._scratch(generator)
            if self.age % 2:
                # Some optimizers decay differently where the gradient is orthogonal to the weights.
                row = tuple(range(1, theta.ndim)) or 0
                along = (gradient * before).sum(row, keepdim=True) / before.square().sum(
                    row, keepdim=True
                )
                gradient = gradient - along * before
            theta.grad = gradient + (l2 * before if number == self.age else 0)
            double.step()
        state = double.state[theta].values()
        memory = [v for v in state if isinstance(v, Tensor) and v.is_floating_point()]
        return before, theta.detach(), memory

    def _scratch(self, generator: torch.Generator) -> Tensor:
        shape = (4,) * min(self.like.ndim, 2) + (3,) * max(self.like.ndim - 2, 0)
        values = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        on_mps = self.like.device.type == "mps"
        return (values * signs).to(self.like.device, torch.float32 if on_mps else torch.float64)

    def _empty(self, theta: Tensor) -> Optimizer:
        live_lr = self.group.get("lr", self.lr)
        lr = torch.full_like(live_lr, self.lr) if isinstance(live_lr, Tensor) else self.lr
        options = {k: list(v) if isinstance(v, list) else v for k, v in self.group.items()}
        double: Optimizer = object.__new__(type(self.optimizer))
        double.__dict__.update(vars(self.optimizer))
        double.__dict__.pop("step", None)  # a scheduler's patch of it would step the original
        double.__dict__.update({name: OrderedDict() for name in _HOOKS})
        double.state = defaultdict(dict)
        double.param_groups = [{**options, "params": [theta], "lr": lr}]
        return double
