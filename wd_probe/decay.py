"""Weight decay by name on any optimizer."""

from collections.abc import Iterable
from typing import Any, Literal, Self, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import InputError
from .hooks import StepHooks, hooked
from .layering import check_rate, chosen_parameters

#: baseline: no decay. wd: θ' = θ − ηU(θ) − cθ (Eq. 1).
Method = Literal["baseline", "wd"]
#: What c is: the paper's experiments and torch multiply by the live learning rate, Eq. 1 does not.
Convention = Literal["lr*rate", "rate"]

_ATTACHED: WeakKeyDictionary[Optimizer, "WeightDecay"] = WeakKeyDictionary()


class WeightDecay:
    """Decoupled weight decay on any torch, timm or third-party optimizer.

    The training loop stays as it is. Weights without a gradient are neither stepped nor decayed;
    a step that `GradScaler` voids decays nothing.

    Args:
        model: the model; names its parameters.
        optimizer: its optimizer, whose own ``weight_decay`` must be 0 in every group.
        method: "wd" takes c·θ off beside the step (Eq. 1, and what torch's AdamW does);
            "baseline" takes nothing off.
        rate: λ ≥ 0.
        convention: "lr*rate" (default): c = ηλ with the live learning rate of the parameter's
            group. "rate": c = λ, as Eq. 1 is printed.
        parameters: names of the parameters to decay; default all.

    Raises:
        InputError: an unknown method or convention, a rate that is negative or not finite, an
            optimizer that decays by itself, or that has a WeightDecay already.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> with torch.no_grad():
        ...     _ = net.weight.fill_(1.0)
        >>> net.weight.grad = torch.zeros(1, 1)
        >>> with WeightDecay(net, optimizer, "wd", rate=0.5):
        ...     optimizer.step()
        >>> round(net.weight.item(), 6)
        0.95
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: Method,
        *,
        rate: float = 0.0,
        convention: Convention = "lr*rate",
        parameters: Iterable[str] | None = None,
    ) -> None:
        if method not in get_args(Method):
            raise InputError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
        if convention not in get_args(Convention):
            known = ", ".join(repr(name) for name in get_args(Convention))
            raise InputError(f"unknown convention {convention!r}; choose from {known}")
        self.method: Method = method
        self.rate = check_rate(rate)
        self.convention: Convention = convention
        self.optimizer = hooked(optimizer)
        for number, group in enumerate(self.optimizer.param_groups):
            if group.get("weight_decay", 0):
                raise InputError(
                    f"the optimizer decays by itself (weight_decay={group['weight_decay']} in "
                    f"parameter group {number}); build it with weight_decay=0"
                )
        if self.optimizer in _ATTACHED:
            raise InputError("this optimizer has a WeightDecay already; detach() that one first")
        self._decayed = set(chosen_parameters(model, parameters).values())
        self._snapshot: list[tuple[Tensor, Tensor, Any]] = []
        self._hooks = StepHooks(self.optimizer, self._before, self._after)
        _ATTACHED[self.optimizer] = self

    def decays(self, parameter: Tensor) -> bool:
        """Whether this parameter is decayed at all."""
        return self.method != "baseline" and self.rate > 0 and parameter in self._decayed

    def factor(self, parameter: Tensor, group: dict[str, Any]) -> float | Tensor:
        """c, the share of this parameter that the next step takes off."""
        return self.rate if self.convention == "rate" else group["lr"] * self.rate

    def _jobs(self, needs_grad: bool) -> Iterable[tuple[Any, list[Tensor]]]:
        """The factor and the parameters it falls on, for each group."""
        for group in self.optimizer.param_groups:
            chosen = [
                p
                for p in group["params"]
                if self.decays(p) and (p.grad is not None or not needs_grad)
            ]
            if chosen:
                yield self.factor(chosen[0], group), chosen

    @torch.no_grad()
    def _before(self, has_closure: bool) -> None:
        self._snapshot.clear()
        if has_closure:  # the gradient is yet to be taken, and is to be taken at θ
            self._snapshot = [
                (p, p.clone(), c) for c, chosen in self._jobs(needs_grad=False) for p in chosen
            ]
            return
        void = voided(self.optimizer)
        for c, chosen in self._jobs(needs_grad=True):
            torch._foreach_mul_(chosen, 1 - c if void is None else 1 - c * (1 - void))

    @torch.no_grad()
    def _after(self) -> None:
        for p, theta, c in self._snapshot:
            if p.grad is not None:
                p.sub_(theta * c)
        self._snapshot.clear()

    def detach(self) -> None:
        """Stop decaying; safe to call twice."""
        self._hooks.remove()
        self._snapshot.clear()
        if _ATTACHED.get(self.optimizer) is self:
            del _ATTACHED[self.optimizer]

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()


#: The methods that :class:`WeightDecay` knows.
METHODS: tuple[Method, ...] = get_args(Method)


def attached(optimizer: Optimizer) -> WeightDecay | None:
    """The WeightDecay at work on this optimizer, if there is one."""
    return _ATTACHED.get(optimizer)


def voided(optimizer: Optimizer) -> Tensor | None:
    """1 where `GradScaler` found an overflow that makes a fused optimizer skip this step."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found
