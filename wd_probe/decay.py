"""Weight decay by name on any optimizer.

A method is two choices: *when* a share of a weight is taken off, and *how strongly* in each layer.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self, get_args
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import InputError, WdProbeWarning
from .hooks import ForwardHooks, StepHooks, hooked
from .layering import Layers, Scale, check_rate, chosen_parameters, layers, layerwise_rates

#: baseline: no decay. l1, l2: λ·sign(θ) or λθ goes into the gradient. wd: θ' = θ − ηU − cθ (Eq. 1).
#: rwd: (1 − c)(θ − ηU) (Eq. 7). pwd: θ is decayed before the forward pass (Algorithm 2). lpwd: pwd
#: with a rate for each layer (Algorithm 3).
Method = Literal["baseline", "l1", "l2", "wd", "rwd", "pwd", "lpwd"]
#: When it is taken off: in the gradient, with the step, after the update, before the forward pass.
Moment = Literal["never", "gradient", "step", "update", "forward"]
#: What c is: the paper's experiments and torch multiply by the live learning rate, Eq. 1 does not.
Convention = Literal["lr*rate", "rate"]

#: The methods that :class:`WeightDecay` knows.
METHODS: tuple[Method, ...] = get_args(Method)

_MOMENTS: dict[Method, Moment] = {
    "baseline": "never",
    "l1": "gradient",
    "l2": "gradient",
    "wd": "step",
    "rwd": "update",
    "pwd": "forward",
    "lpwd": "forward",
}
# The optimizer's hooks keep its WeightDecay alive; were this to, neither would ever be freed.
_ATTACHED: WeakKeyDictionary[Optimizer, ReferenceType["WeightDecay"]] = WeakKeyDictionary()


class WeightDecay:
    """A decay method on any torch, timm or third-party optimizer.

    The training loop stays as it is. Weights without a gradient are neither stepped nor decayed
    (before a forward pass, where gradients are yet to come: weights that require none); a step that
    `GradScaler` voids decays nothing. What an evaluation between two steps sees is what the paper's
    algorithms have there: rwd has decayed already, pwd and lpwd have not.

    Args:
        model: the model; names its parameters. For pwd and lpwd the one that the loop calls: wrap
            and compile it first.
        optimizer: its optimizer, whose own ``weight_decay`` must be 0 in every group.
        method: one of ``METHODS``.
        rate: λ ≥ 0. May be changed later, by assignment.
        scale: how the rate rises from layer to layer (see :func:`wd_probe.layerwise_rates`), with
            any method. Default: "max2" for lpwd, and the same rate everywhere for the others.
        convention: "lr*rate" (default): c = ηλ with the live learning rate of the parameter's
            group. "rate": c = λ, as Eq. 1 is printed. l1 and l2 have no c: they add λ to the
            gradient.
        parameters: names of the parameters to decay; default all.
        groups: the model's layers, if not ``wd_probe.layers(model)``.

    Raises:
        InputError: an unknown method, scale or convention; a rate that is negative or not finite,
            or so large that c > 1 would flip signs (also later, at the step that would); an
            optimizer that decays by itself, has a WeightDecay already, lacks a parameter that is
            to decay or is LBFGS; layers of a model that has only one; sparse gradients.

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
        scale: Scale | None = None,
        convention: Convention = "lr*rate",
        parameters: Iterable[str] | None = None,
        groups: Layers | None = None,
    ) -> None:
        _check_choice("method", method, METHODS)
        _check_choice("convention", convention, get_args(Convention))
        self.method: Method = method
        self.moment: Moment = _MOMENTS[method]
        self.convention: Convention = convention
        self.scale: Scale | None = scale or ("max2" if method == "lpwd" else None)
        self.optimizer = hooked(optimizer)
        _check_free(self.optimizer)
        chosen = chosen_parameters(model, parameters)
        _check_held(chosen, self.optimizer)
        _check_dense(model, chosen)
        self.layers = None if self.scale is None else layers(model) if groups is None else groups
        self._names = chosen
        self._shares = self._layer_shares(chosen)
        self._rate = check_rate(rate)
        self._check_live_rates()
        self._due = True  # the next training-mode forward pass is the first since the last step
        self._void: Tensor | None = None
        self._told = False
        self._snapshot: list[tuple[Tensor, Tensor, Any]] = []
        self._plain: list[tuple[Tensor, Tensor, Tensor]] = []
        in_gradient = self.moment == "gradient"
        self._hooks: list[StepHooks | ForwardHooks] = [
            StepHooks(
                self.optimizer,
                self._before,
                self._after,
                graded=self._into_gradient if in_gradient else None,
            )
        ]
        if self.moment == "forward":
            self._hooks.append(ForwardHooks(model, self._before_forward))
        _ATTACHED[self.optimizer] = ref(self)

    # --- how strongly in each layer -----------------------------------------------------------

    @property
    def rate(self) -> float:
        """λ."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._rate = check_rate(rate)

    def decays(self, parameter: Tensor) -> bool:
        """Whether this parameter is decayed at all."""
        return self.moment != "never" and self.rate > 0 and parameter in self._shares

    def factor(self, parameter: Tensor, group: dict[str, Any]) -> float | Tensor:
        """c, the share of this parameter that is taken off in a step, at its group's live rate.

        Raises:
            InputError: it is more than 1.
        """
        c = self._factor(parameter, group)
        if not isinstance(c, Tensor) and c > 1 and self.moment != "gradient":
            raise InputError(self._too_much(parameter, c))
        return c

    def _factor(self, parameter: Tensor, group: dict[str, Any]) -> float | Tensor:
        rate = self.rate * self._shares[parameter]
        c: float | Tensor = rate if self.convention == "rate" else group["lr"] * rate
        return c

    def _layer_shares(self, chosen: dict[str, nn.Parameter]) -> dict[Tensor, float]:
        """λ_i / λ of every parameter that decays."""
        if self.layers is None:
            return dict.fromkeys(chosen.values(), 1.0)
        assert self.scale is not None
        shares = layerwise_rates(len(self.layers), 1.0, self.scale)
        if len(self.layers) < 2:
            raise InputError(
                f"layer-wise decay needs a model of several layers, and this one has only "
                f"{self.layers[0].name or 'the model itself'!r}; give groups=, or a method with "
                "one rate"
            )
        by_name = {
            name: share
            for layer, share in zip(self.layers, shares, strict=True)
            for name in layer.parameters
        }
        for name in chosen:
            if name not in by_name:
                raise InputError(f"groups= has no layer that holds the parameter {name!r}")
        return {parameter: by_name[name] for name, parameter in chosen.items()}

    def _check_live_rates(self) -> None:
        """Find a c > 1 before the first step."""
        if self.moment == "gradient":
            return
        factors = [
            (float(self._factor(p, group)), p)
            for group in self.optimizer.param_groups
            for p in group["params"]
            if self.decays(p)
        ]
        c, parameter = max(factors, key=lambda item: item[0], default=(0.0, None))
        if parameter is not None and c > 1:
            raise InputError(self._too_much(parameter, c))

    def _too_much(self, parameter: Tensor, c: float) -> str:
        where = "the weights"
        if self.layers is not None:
            name = next(name for name, p in self._names.items() if p is parameter)
            layer = next(layer for layer in self.layers if name in layer.parameters)
            where = f"layer {layer.index} of {len(self.layers)} ({layer.name})"
        return (
            f"{self.method} with rate {self.rate:g} would take off {c:g} times {where}, which "
            f"flips signs; the largest allowed rate here is {self.rate / c:g}"
        )

    # --- when it is taken off -----------------------------------------------------------------

    def _jobs(self, needs_grad: bool = True) -> Iterator[tuple[float | Tensor, list[Tensor]]]:
        """Every factor and the parameters it falls on."""
        for group in self.optimizer.param_groups:
            for _, chosen in self._by_share(group, needs_grad):
                yield self.factor(chosen[0], group), chosen

    def _by_share(
        self, group: dict[str, Any], needs_grad: bool = True
    ) -> Iterable[tuple[float, list[Tensor]]]:
        """The parameters of a group that decay, by their layer's share of λ."""
        found: dict[float, list[Tensor]] = {}
        for p in group["params"]:
            wanted = p.grad is not None if needs_grad else p.requires_grad
            if wanted and self.decays(p):
                found.setdefault(self._shares[p], []).append(p)
        return found.items()

    def _take_off(self, void: Tensor | None, needs_grad: bool = True) -> None:
        for c, chosen in self._jobs(needs_grad):
            torch._foreach_mul_(chosen, 1 - c if void is None else 1 - c * (1 - void))

    @torch.no_grad()
    def _before(self, has_closure: bool) -> None:
        self._snapshot.clear()
        if self.moment != "step":
            return
        if has_closure:  # the gradient is yet to be taken, and is to be taken at θ
            self._snapshot = [
                (p, p.clone(), c) for c, chosen in self._jobs(needs_grad=False) for p in chosen
            ]
        else:
            self._take_off(voided(self.optimizer))

    @torch.no_grad()
    def _into_gradient(self) -> None:
        """Give the optimizer g + λθ, or g + λ·sign(θ), in the place of g."""
        scale = getattr(self.optimizer, "grad_scale", None)  # of gradients not yet unscaled
        for group in self.optimizer.param_groups:
            for share, chosen in self._by_share(group):
                terms = chosen if self.method == "l2" else torch._foreach_sign(chosen)
                if scale is not None:
                    terms = torch._foreach_mul(terms, scale)
                plain = [p.grad for p in chosen if p.grad is not None]
                added = torch._foreach_add(plain, terms, alpha=self.rate * share)
                for p, g, ours in zip(chosen, plain, added, strict=True):
                    p.grad = ours
                    self._plain.append((p, g, ours))

    @torch.no_grad()
    def _after(self) -> None:
        for p, theta, c in self._snapshot:
            if p.grad is not None:
                p.sub_(theta * c)
        self._snapshot.clear()
        for p, g, ours in self._plain:
            if p.grad is ours:
                p.grad = g
        self._plain.clear()
        if self.moment == "update":
            self._take_off(voided(self.optimizer))
        if self.moment == "forward" and self._due and self.rate and not self._told:
            self._told = True
            warnings.warn(
                f"{self.method} took nothing off in this step: no forward pass of the model in "
                "training mode came before it; attach to the module that the loop calls",
                WdProbeWarning,
                stacklevel=4,
            )
        self._due, self._void = True, voided(self.optimizer)

    @torch.no_grad()
    def _before_forward(self) -> None:
        if self._due:
            self._due = False
            self._take_off(self._void, needs_grad=False)

    @property
    def has_other_moment(self) -> bool:
        """Whether the method is one of rwd, pwd and lpwd, which are one trajectory read twice."""
        return self.moment in ("update", "forward")

    @contextmanager
    def at_other_moment(self) -> Iterator[None]:
        """The weights as the other of rwd and pwd has them between two steps (theory fact 8).

        For pwd and lpwd: decayed already, with the next step's c. For rwd: not yet. They are back,
        bit for bit, on leaving; do not step inside.
        """
        kept = []
        with torch.no_grad():
            for c, chosen in self._jobs(needs_grad=False) if self.has_other_moment else ():
                kept += [(p, p.clone()) for p in chosen]
                torch._foreach_mul_(chosen, 1 - c if self.moment == "forward" else 1 / (1 - c))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, was in kept:
                    p.copy_(was)

    # --- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; plain values."""
        return {
            "method": self.method,
            "scale": self.scale,
            "convention": self.convention,
            "rate": self.rate,
            "due": self._due,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the run that made ``state`` stopped.

        Raises:
            InputError: it is of another method, scale or convention.
        """
        for name in ("method", "scale", "convention"):
            if state.get(name) != getattr(self, name):
                raise InputError(
                    f"this state is of {name} {state.get(name)!r}, and the WeightDecay has "
                    f"{getattr(self, name)!r}"
                )
        self.rate, self._due = state["rate"], bool(state["due"])

    def detach(self) -> None:
        """Stop decaying; safe to call twice."""
        for hooks in self._hooks:
            hooks.remove()
        self._snapshot.clear()
        if attached(self.optimizer) is self:
            del _ATTACHED[self.optimizer]

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()


def _check_choice(what: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise InputError(f"unknown {what} {value!r}; choose from {', '.join(known)}")


def _check_free(optimizer: Optimizer) -> None:
    for number, group in enumerate(optimizer.param_groups):
        if group.get("weight_decay", 0):
            raise InputError(
                f"the optimizer decays by itself (weight_decay={group['weight_decay']} in "
                f"parameter group {number}); build it with weight_decay=0"
            )
    if attached(optimizer) is not None:
        raise InputError("this optimizer has a WeightDecay already; detach() that one first")


def _check_held(chosen: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
    held = {p for group in optimizer.param_groups for p in group["params"]}
    lacking = [name for name, p in chosen.items() if p.requires_grad and p not in held]
    if lacking:
        raise InputError(
            f"the optimizer lacks {len(lacking)} of the {len(chosen)} parameters to decay "
            f"({lacking[0]!r} first); build it from all of model.parameters(), or name those it "
            "holds with parameters="
        )


def _check_dense(model: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
    parameters = set(chosen.values())
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and getattr(module, "weight", None) in parameters:
            raise InputError(
                f"{name or type(module).__name__} has sparse gradients, which say nothing of the "
                "weights a step leaves alone; build it with sparse=False, or leave it out with "
                "parameters="
            )


def attached(optimizer: Optimizer) -> WeightDecay | None:
    """The WeightDecay at work on this optimizer, if there is one."""
    found = _ATTACHED.get(optimizer)
    return None if found is None else found()


def voided(optimizer: Optimizer) -> Tensor | None:
    """1 where `GradScaler` found an overflow that makes a fused optimizer skip this step."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found
