"""Doubles of an optimizer, stepped on scratch weights to see what it does."""

import copy
import inspect
import math
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import first_line
from .aside import HOOKS, NOT_COPIED, aside, generators_of, random_kept
from .undecayed import set_rate

T = TypeVar("T")

_LEAST, _USUAL, _MOST = 1e-4, 1e-3, 10.0  # of learning rates


@dataclass(frozen=True, slots=True)
class Double:
    """An optimizer of the same class and options over one weight, sharing nothing with it.

    Attributes:
        optimizer: the double itself.
        generators: the random generators that it shares with the real one after all.
        with_graph: whether its gradients have a graph, as those who take a Hessian need.
    """

    optimizer: Optimizer
    generators: list[Any]
    with_graph: bool

    @property
    def group(self) -> dict[str, Any]:
        """Its one parameter group."""
        (group,) = self.optimizer.param_groups
        return group

    @property
    def theta(self) -> Tensor:
        """Its weights."""
        weights: Tensor = self.group["params"][0]
        return weights

    @property
    def memory(self) -> list[Tensor]:
        """What it remembers of the steps it has taken."""
        leaves = torch.utils._pytree.tree_leaves(list(self.optimizer.state.values()))
        return [leaf.double().cpu() for leaf in leaves if isinstance(leaf, Tensor)]

    def stepped(
        self, lr: float | None, rates: Mapping[str, float], gradient: Tensor | None
    ) -> "Double":
        """A copy of it after one step.

        Args:
            lr: η; None leaves it as it is.
            rates: decay rates by the names of the options that hold them.
            gradient: of the loss by the weights; None if they have none.
        """
        twin = _double(
            self.optimizer, self.group, _cloned(self.theta), self.generators, self.optimizer.state
        )
        (group,) = twin.param_groups
        if lr is not None:
            live = group["lr"]
            group["lr"] = torch.full_like(live, lr) if isinstance(live, Tensor) else lr
        for name, rate in rates.items():
            set_rate(twin, rate, name)
        theta = group["params"][0]
        if gradient is not None:
            theta.grad = gradient.clone()  # some add λθ to it in place
            if self.with_graph:
                theta.grad = theta.grad + (theta - theta.detach())
        with random_kept(self.generators):
            # The same numbers for every copy, and others in every step.
            size = float(theta.detach().abs().sum())
            seed = int(1e6 * size) % 2**32 if math.isfinite(size) else 0
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            twin.step()
        theta.grad = None
        return replace(self, optimizer=twin)


def tried(
    optimizer: Optimizer, group: dict[str, Any], theta: Tensor, use: Callable[[Double], T]
) -> T | str:
    """What ``use`` makes of a double that holds these weights, or why there is none."""
    if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
        return "it wraps another optimizer"
    first = ""
    generators = generators_of(optimizer)
    with aside(generators):
        for with_graph in (False, True):  # some take a Hessian
            for start in (_double, _rebuilt):
                try:
                    double = start(optimizer, group, theta, generators)
                    return use(Double(double, generators, with_graph))
                except Exception as error:
                    first = first or first_line(error)
    return first


def _double(
    optimizer: Optimizer,
    group: dict[str, Any],
    theta: Tensor,
    generators: list[Any],
    state: Any = None,
) -> Optimizer:
    double: Optimizer = object.__new__(type(optimizer))
    # Whatever else holds the optimizer's weights gets an empty one: nothing reaches the real ones.
    blank = torch.empty(0, device="meta")
    held = (p for other in optimizer.param_groups for p in other["params"])
    memo: dict[int, Any] = dict.fromkeys(map(id, held), blank)
    memo |= {id(optimizer): double, id(group["params"][0]): theta}
    memo |= {id(one): one for one in generators}
    replaced = {"state", "param_groups", *NOT_COPIED}
    own = {name: value for name, value in vars(optimizer).items() if name not in replaced}
    double.__dict__.update(copy.deepcopy(own, memo))
    double.__dict__.update({name: OrderedDict() for name in HOOKS})
    double.state = defaultdict(dict) if state is None else copy.deepcopy(state, memo)
    options = {name: value for name, value in group.items() if name != "params"}
    if state is None:
        options.pop("step", None)  # some count steps here, and set up their state at the first
    double.param_groups = [{**copy.deepcopy(options, memo), "params": [theta]}]
    return double


def _rebuilt(
    optimizer: Optimizer, group: dict[str, Any], theta: Tensor, generators: list[Any]
) -> Optimizer:
    """The same made by the class itself, for those that set up their state when they are made."""
    accepted = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in group.items() if name != "params"}
    defaults = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    shared = {id(one): one for one in generators}
    options, defaults = copy.deepcopy((options, defaults), shared)
    make: Callable[..., Optimizer] = type(optimizer)
    return make([{**options, "params": [theta]}], **defaults)


def _cloned(theta: Tensor) -> Tensor:
    clone = theta.detach().clone().requires_grad_()
    clone.__dict__.update(theta.__dict__)  # AdaHessian keeps a Hessian there
    return clone


def shapes(ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A wide and a tall one."""
    kernel = (3,) * (ndim - 2)
    return ((4, 6)[:ndim] + kernel, (5, 3)[:ndim] + kernel)


def scratch(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weights to step."""
    if device.type == "mps":
        dtype = torch.float32
    if device.type == "meta":  # nothing there can be compared
        device = torch.device("cpu")
    empty = torch.empty(shape, device=device, dtype=dtype)
    return random_like(empty, torch.Generator().manual_seed(1)).requires_grad_()


def random_like(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers away from zero, of both signs."""
    made: dict[str, Any] = {"generator": generator, "device": "cpu"}
    values = torch.rand(weights.shape, dtype=torch.float64, **made) + 0.5
    signs = torch.randint(0, 2, weights.shape, **made) * 2 - 1
    return (values * signs).to(weights)


def visible(group: dict[str, Any]) -> float | None:
    """A learning rate at which a step stands clear of rounding: the group's, if it does."""
    lr = group.get("lr")
    if lr is None:
        return None
    return live if _LEAST <= (live := float(lr)) <= _MOST else _USUAL


def maximizes(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """What an optimizer says of whether its steps follow the gradient."""
    holders = (group, vars(optimizer), optimizer.defaults)
    return next((bool(one["maximize"]) for one in holders if "maximize" in one), False)


def judged_near(group: dict[str, Any]) -> int | None:
    """The order of magnitude of the learning rate at which doubles of a group are stepped."""
    lr = group.get("lr")
    if isinstance(lr, Tensor) and not lr.is_cpu:  # to look would wait for the device
        return None
    live = visible(group)
    return None if live is None else round(math.log10(live))
