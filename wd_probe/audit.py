"""Which decay rule an optimizer really runs, found by its effect on scratch weights."""

import itertools
import warnings
from collections import OrderedDict, defaultdict
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
    theta, decayed = _last_step(optimizer, group, like, lr, age, rate, rate)
    _, plain = _last_step(optimizer, group, like, lr, age, rate, 0.0)
    taken = plain - decayed

    def close(expected: Tensor) -> bool:
        return torch.allclose(taken, expected, rtol=1e-3, atol=1e-5 * _STRENGTH)

    if close(torch.zeros_like(taken)):
        return "none"
    if close(_STRENGTH * theta):
        return "wd"
    if close(_STRENGTH * plain):
        return "rwd"
    _, with_l2 = _last_step(optimizer, group, like, lr, age, rate, 0.0, l2=rate)
    return "l2" if close(plain - with_l2) else "other"


def _last_step(
    optimizer: Optimizer,
    group: dict[str, Any],
    like: Tensor,
    lr: float,
    age: int,
    rate: float,
    last_rate: float,
    l2: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Scratch weights before and after step ``age``, whose own rates are the last three."""
    generator = torch.Generator().manual_seed(0)
    shape = (4,) * min(like.ndim, 2) + (3,) * max(like.ndim - 2, 0)

    def scratch() -> Tensor:
        values = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        on_mps = like.device.type == "mps"
        return (values * signs).to(like.device, torch.float32 if on_mps else torch.float64)

    theta = scratch().requires_grad_()
    live_lr = group.get("lr", lr)
    own_lr = torch.full_like(live_lr, lr) if isinstance(live_lr, Tensor) else lr
    double = object.__new__(type(optimizer))
    double.__dict__.update(vars(optimizer))
    double.__dict__.pop("step", None)  # a scheduler's patch of it would step the original
    double.__dict__.update({name: OrderedDict() for name in _HOOKS})
    double.state = defaultdict(dict)
    options = {key: list(v) if isinstance(v, list) else v for key, v in group.items()}
    double.param_groups = [{**options, "params": [theta], "lr": own_lr}]
    before = theta.detach().clone()
    for number in itertools.count(1):
        double.param_groups[0]["weight_decay"] = last_rate if number == age else rate
        before = theta.detach().clone()
        theta.grad = scratch()
        if number < age:
            double.step()
            continue
        theta.grad += l2 * before
        double.step()
        return before, theta.detach()
    raise AssertionError
