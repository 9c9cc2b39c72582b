"""Weight decay by name on any optimizer.

A method is two choices: *when* a share of a weight is taken off, and *how strongly* in each layer.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Self, get_args
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import check_choice, check_rate
from ..choices import METHODS, Convention, Method, Scale
from ..errors import InputError, Teller, shown
from ..hooks import ForwardHooks, Missing, StepHooks, classes, hooked_all, weakly
from ..layering import Layers, chosen_parameters, layers_or, layerwise_rates, named_parameters
from ..sharding import local, refuse_flat
from .moments import AfterStep, AheadOfForward, InGradient, WithStep
from .moments import Moment as AtMoment
from .rules import effect_at_work, options_of
from .updates import Updates

#: When it is taken off: in the gradient, with the step, after the update, before the forward pass.
Moment = Literal["never", "gradient", "step", "update", "forward"]

_MOMENTS: dict[Method, Moment] = {
    "baseline": "never",
    "l1": "gradient",
    "l2": "gradient",
    "wd": "step",
    "rwd": "update",
    "pwd": "forward",
    "lpwd": "forward",
    "cautious": "step",
    "corrected": "step",
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
        optimizer: its optimizer, or several that share its parameters; their own ``weight_decay``
            must be 0 in every group.
        method: one of ``METHODS``.
        rate: λ ≥ 0. May be changed later, by assignment.
        scale: how the rate rises from layer to layer (see :func:`wd_probe.layerwise_rates`), with
            any method. Default: "max2" for lpwd, and the same rate everywhere for the others.
        convention: "lr*rate" (default): c = ηλ with the live learning rate of the parameter's
            group. "rate": c = λ, as Eq. 1 is printed. l1 and l2 have no c: they add λ to the
            gradient. "corrected" multiplies either by η/η_max, of the group's largest learning rate
            so far, or the one that its schedule starts from (``initial_lr``, ``max_lr``).
        parameters: names of the parameters to decay; default all, those that join an optimizer
            later included.
        groups: the model's layers, if not ``wd_probe.layers(model)``.

    Raises:
        InputError: an unknown method, scale or convention; a rate that is negative or not finite,
            or so large that c > 1 would flip signs; a learning rate that is negative or none (both
            also later, at the step that would); an
            optimizer that decays by itself, has a WeightDecay already, lacks a parameter that is
            to decay or is LBFGS; layers of a model that has only one; sparse gradients; FSDP1.

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
        optimizer: Optimizer | Sequence[Optimizer],
        method: Method,
        *,
        rate: float = 0.0,
        scale: Scale | None = None,
        convention: Convention = "lr*rate",
        parameters: Iterable[str] | None = None,
        groups: Layers | None = None,
    ) -> None:
        check_choice(method, "method", METHODS)
        check_choice(convention, "convention", get_args(Convention))
        if scale is not None:
            check_choice(scale, "scale", get_args(Scale))
        self.method: Method = method
        self.moment: Moment = _MOMENTS[method]
        self.convention: Convention = convention
        self.scale: Scale | None = scale or ("max2" if method == "lpwd" else None)
        refuse_flat(model)
        self.optimizers = hooked_all(optimizer)
        _check_free(self.optimizers)
        self._model, self._groups = model, groups
        self._names: dict[str, nn.Parameter] = {}
        self._shares: dict[Tensor, float] = {}
        self._choose(parameters)
        self._parameters = None if parameters is None else list(self._names)
        _check_held(self._names, set(self._held()))
        self._rate = check_rate(rate)
        self._tops: dict[Optimizer, dict[int, float | Tensor]] = {
            one: {} for one in self.optimizers
        }
        self._check_live_rates()
        self._tell = Teller()
        self._looked_through = {one: _all_of(one) for one in self.optimizers}
        self._updates = Updates()
        self._try_updates()
        self._moments = {one: self._made(one) for one in self.optimizers}
        self._hooks = [self._around(one, moment) for one, moment in self._moments.items()]
        self._loading = [
            one.register_load_state_dict_post_hook(partial(_forget, moment))
            for one, moment in self._moments.items()
        ]
        self._forwards = None
        if self.moment == "forward":
            self._forwards = ForwardHooks(model, self._before_forward)
        self._missing = Missing(self._names.values(), weakly(self._miss))
        for one in self.optimizers:
            _ATTACHED[one] = ref(self)

    def _held(self) -> Iterator[Tensor]:
        return (p for one in self.optimizers for p in _all_of(one))

    def _try_updates(self) -> None:
        """Find out what steps depend on before the first of them."""
        updates = self._updates
        asks = {"step": updates.reads_weights, "gradient": updates.climbs}
        for ask in (asks[self.moment],) if self.moment in asks else ():
            for one in self.optimizers:
                for group in one.param_groups:
                    for p in group["params"]:
                        ask(one, group, p)

    def _choose(self, names: Iterable[str] | None) -> None:
        """Which parameters decay, and their layers' shares of λ."""
        chosen = chosen_parameters(self._model, names)
        _check_dense(self._model, chosen)
        _check_trainable(chosen)
        self.layers = None
        if self.scale is not None:
            self.layers = layers_or(self._groups, self._model)
        self._names, self._shares = chosen, self._layer_shares(chosen)

    def _take_in(self, optimizer: Optimizer) -> None:
        """Parameters that have joined the optimizer decay too, if they are or have been chosen.

        Those that were replaced are let go.
        """
        held = _all_of(optimizer)
        if held == self._looked_through[optimizer]:
            return
        self._looked_through[optimizer] = held
        own = {name for name, _ in named_parameters(self._model)}
        chosen = self._parameters
        self._choose(chosen if chosen is None else [name for name in chosen if name in own])

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

    def share(self, parameter: Tensor) -> float | None:
        """λ_i / λ of this parameter's layer; None where it is not to decay."""
        return self._shares.get(parameter)

    def factor(self, parameter: Tensor, group: dict[str, Any]) -> float | Tensor:
        """c, the share of this parameter that is taken off in a step, at its group's live rate.

        Raises:
            InputError: it is more than 1; or there is no learning rate, or none that c could
                follow. One on a GPU is not looked at: that would wait for the device.
        """
        self._check_lr(group)
        c = self._factor(parameter, group)
        seen = not isinstance(c, Tensor) or c.is_cpu
        if seen and c > 1 and self.moment != "gradient":
            raise InputError(self._too_much(parameter, float(c)))
        return c

    def _check_lr(self, group: dict[str, Any]) -> None:
        """Refuse a learning rate with which decay would not draw weights towards zero."""
        lr = group.get("lr")
        if self.convention == "rate" and self.moment != "gradient":
            return
        if lr is None:
            if self.moment == "gradient":
                return
            why = "is the optimizer's own affair (lr=None), and c = ηλ needs one: "
            why += "take convention='rate'"
        elif (isinstance(lr, Tensor) and not lr.is_cpu) or 0 <= float(lr) < math.inf:
            return
        elif float(lr) < 0:
            why = f"is {float(lr):g}, with which decay would push weights away from zero"
            why += "; to follow the gradient, take maximize=True"
        else:
            why = f"is {float(lr):g}"
        place = self._place_of(group)
        named = "the group" if place is None else f"parameter group {place[1]}"
        raise InputError(f"the learning rate of {named} {why}")

    def _place_of(self, group: dict[str, Any]) -> tuple[Optimizer, int] | None:
        """Whose parameter group it is, and which."""
        places = (
            (one, k, own) for one in self.optimizers for k, own in enumerate(one.param_groups)
        )
        return next(((one, k) for one, k, own in places if own is group), None)

    def took_nothing(self, optimizer: Optimizer) -> bool:
        """Whether no forward pass, and so no decay of pwd and lpwd, came before its last step."""
        return self._moments[optimizer].idle

    def _factor(self, parameter: Tensor, group: dict[str, Any]) -> float | Tensor:
        rate: float | Tensor = self.rate * self._shares[parameter]
        if self.method == "corrected":
            rate = rate * self._of_top(group)
        if self.convention == "rate":
            return rate
        c: float | Tensor = math.nan if group.get("lr") is None else group["lr"] * rate
        return c

    def _of_top(self, group: dict[str, Any]) -> float | Tensor:
        """η/η_max of a parameter group; 0 where η_max is 0."""
        lr, place = group.get("lr"), self._place_of(group)
        if lr is None or place is None:
            return 1.0
        optimizer, number = place
        tops = self._tops[optimizer]
        begun = group.get("initial_lr", 0) * group.get("lr_scale", 1)  # of timm's layer decay
        known = (tops.get(number, 0.0), begun, group.get("max_lr", 0))
        tops[number] = top = _largest(lr, *known)
        if isinstance(top, Tensor):
            return torch.as_tensor(lr / top).nan_to_num(0.0)
        return float(lr) / top if top else 0.0

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
                raise InputError(f"groups= has no layer that holds the parameter {shown(name)}")
        return {parameter: by_name[name] for name, parameter in chosen.items()}

    def _check_live_rates(self) -> None:
        """Find a c > 1, or a rate that is none, before the first step."""
        if self.moment == "gradient":
            return
        factors = []
        for one in self.optimizers:
            for group in one.param_groups:
                for p in filter(self.decays, group["params"]):
                    self._check_lr(group)
                    factors.append((float(self._factor(p, group)), p))
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

    def jobs(
        self, optimizer: Optimizer, needs_grad: bool = True
    ) -> Iterator[tuple[float | Tensor, list[Tensor], dict[str, Any]]]:
        """Every c, the parameters that it falls on, and their group."""
        for group in optimizer.param_groups:
            for _, chosen in self._by_share(group, needs_grad):
                yield self.factor(chosen[0], group), chosen, group

    def penalties(self, optimizer: Optimizer) -> Iterator[tuple[float, list[Tensor]]]:
        """What times θ or its sign goes into which gradients: −λ where steps follow gradients."""
        for group in optimizer.param_groups:
            for share, chosen in self._by_share(group):
                self._check_lr(group)
                rate = self.rate * share
                yield (-rate if self._updates.climbs(optimizer, group, chosen[0]) else rate), chosen

    def needs_both(self, optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> bool:
        """Whether what is taken off, or the optimizer's step, depends on the weights before it."""
        return self.method == "cautious" or self._updates.reads_weights(optimizer, group, p)

    def decayed(self, stands: Tensor, theta: Tensor) -> Tensor:
        """What of θ it is that a share is taken off, after a step that put it where it stands."""
        if self.method != "cautious":
            return theta
        if theta.is_complex():
            parts = self.decayed(torch.view_as_real(stands), torch.view_as_real(theta))
            return torch.view_as_complex(parts)
        # the step and the weight agree where it was not moved away from zero
        away = ((stands > theta) & (theta > 0)) | ((stands < theta) & (theta < 0))
        return theta.masked_fill(away, 0)

    def _by_share(
        self, group: dict[str, Any], needs_grad: bool = True
    ) -> Iterable[tuple[float, list[Tensor]]]:
        """The parameters of a group that decay, by their layer's share of λ."""
        found: dict[float, list[Tensor]] = {}
        for p in group["params"]:
            wanted = p.grad is not None if needs_grad else p.requires_grad
            if wanted and self.decays(p):
                if p.grad is not None and (p.grad.is_sparse or not p.is_floating_point()):
                    self._refuse_odd(p)
                found.setdefault(self._shares[p], []).append(p)
        return found.items()

    def _refuse_odd(self, p: Tensor) -> None:
        name = next(name for name, own in self._names.items() if own is p)
        if p.grad is not None and p.grad.is_sparse:
            raise InputError(_sparse(name))
        if not p.is_complex():
            raise InputError(
                f"{name} has a gradient, and is of whole numbers, of which no share can be taken "
                "off; leave it out with parameters="
            )

    def _made(self, optimizer: Optimizer) -> AtMoment:
        if self.moment == "gradient":
            return InGradient(optimizer, self, signs=self.method == "l1")
        kinds: dict[Moment, type[AtMoment]] = {
            "never": AtMoment,
            "step": WithStep,
            "update": AfterStep,
            "forward": AheadOfForward,
        }
        return kinds[self.moment](optimizer, self)

    def _around(self, optimizer: Optimizer, moment: AtMoment) -> StepHooks:
        graded, ungraded, early = None, None, None
        if isinstance(moment, InGradient):
            graded, ungraded = _quietly(moment.graded), moment.ungraded
            early = self._early
        elif isinstance(moment, WithStep):
            graded = _quietly(moment.graded)
        return StepHooks(
            optimizer,
            partial(self._before, optimizer),
            partial(self._after, optimizer),
            graded=graded,
            ungraded=ungraded,
            early=early,
            stopped=_quietly(moment.stopped),
        )

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, has_closure: bool) -> None:
        self._take_in(optimizer)
        self._moments[optimizer].before(has_closure)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer) -> None:
        self._missing.remove()
        moment = self._moments[optimizer]
        moment.after()
        if moment.idle and self.rate:
            self._tell(
                f"{self.method} took nothing off in this step: no forward pass of the model in "
                "training mode came before it; attach to the module that the loop calls"
            )

    def _early(self) -> None:
        self._tell(
            f"a compiled step calls hooks registered after {self.method} when it has added to the "
            "gradients: where they change those (clipping), register them before it, or change "
            "gradients ahead of optimizer.step()"
        )

    def _miss(self, passes: int) -> None:
        if self.rate and self.moment != "never":
            self._tell(
                f"the weights move, and in {passes} backward passes no step() of "
                f"{classes(self.optimizers)} was seen: {self.method} takes nothing off; attach to "
                "the optimizer whose step() the loop, or what it calls, calls"
            )

    @torch.no_grad()
    def _before_forward(self) -> None:
        self._settle()
        for optimizer, moment in self._moments.items():
            if moment.due:
                self._take_in(optimizer)
                moment.forward()

    def _settle(self) -> None:
        """See to the steps that have stopped before their end."""
        for hooks in self._hooks:
            hooks.settle()

    @property
    def has_other_moment(self) -> bool:
        """Whether the method is one of rwd, pwd and lpwd, which are one trajectory read twice."""
        return self.moment in ("update", "forward")

    @contextmanager
    def at_other_moment(self) -> Iterator[None]:
        """The weights as the other of rwd and pwd has them between two steps (theory fact 8).

        For pwd and lpwd: decayed already, with the next step's c. For rwd: not yet. They are back,
        bit for bit, on leaving; do not step inside.

        Raises:
            InputError: rwd with c = 1 has left nothing that could be undone.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        self._settle()
        try:
            with torch.no_grad():
                for one in self.optimizers if self.has_other_moment else ():
                    for c, chosen, _ in self.jobs(one, needs_grad=False):
                        if self.moment == "update" and float(c) == 1:
                            raise InputError(
                                f"{self.method} with c = 1 leaves nothing but zeros: there are no "
                                "weights before its decay to go back to"
                            )
                        parts = [local(p) for p in chosen]
                        kept += [(part, part.clone()) for part in parts]
                        factor = 1 - c if self.moment == "forward" else 1 / (1 - c)
                        torch._foreach_mul_(parts, factor)
            yield
        finally:
            with torch.no_grad():
                for p, was in reversed(kept):  # two optimizers may hold one parameter
                    p.copy_(was)

    # --- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; plain values."""
        self._settle()
        ahead = {p for moment in self._moments.values() for p in moment.taken_ahead()}
        names = [name for name, p in self._names.items() if p in ahead]
        return {
            "method": self.method,
            "scale": self.scale,
            "convention": self.convention,
            "rate": self.rate,
            "due": [k for k, one in enumerate(self.optimizers) if self._moments[one].due],
            **({"ahead": names} if names else {}),
            **({"tops": self._top_rates()} if self.method == "corrected" else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the run that made ``state`` stopped.

        Raises:
            InputError: it is of another method, scale or convention.
        """
        for name in ("method", "scale", "convention"):
            if state.get(name) != getattr(self, name):
                raise InputError(
                    f"this state is of {name} {shown(state.get(name))}, and the WeightDecay has "
                    f"{getattr(self, name)!r}"
                )
        self.rate = state["rate"]
        for one, tops in zip(self.optimizers, state.get("tops", ()), strict=False):
            self._tops[one] = dict(enumerate(tops))
        for number, moment in enumerate(self._moments.values()):
            moment.forget()
            moment.due = number in state["due"]
            moment.given = {self._names[name] for name in state.get("ahead", ())}

    def _top_rates(self) -> list[list[float]]:
        groups = ((tops, range(len(one.param_groups))) for one, tops in self._tops.items())
        return [[float(tops.get(k, 0.0)) for k in numbers] for tops, numbers in groups]

    def detach(self) -> None:
        """Stop decaying; safe to call twice."""
        self._settle()
        self._missing.look()
        self._missing.remove()
        for hooks in self._hooks:
            hooks.remove()
        for handle in self._loading:
            handle.remove()
        if self._forwards is not None:
            self._forwards.remove()
        for one in self.optimizers:
            if attached(one) is self:
                del _ATTACHED[one]

    def __repr__(self) -> str:
        """Method and rate."""
        scale = "" if self.scale is None else f", scale={self.scale!r}"
        return f"WeightDecay({self.method!r}, rate={self.rate:g}{scale})"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()


def _largest(*rates: float | Tensor) -> float | Tensor:
    """The largest; a tensor if one is, which the host does not wait for."""
    made = [rate for rate in rates if isinstance(rate, Tensor)]
    if not made:
        return max(map(float, rates))
    own = [torch.as_tensor(rate, dtype=made[0].dtype).to(made[0].device) for rate in rates]
    return torch.stack([rate.reshape(()) for rate in own]).amax()


def _all_of(optimizer: Optimizer) -> set[Tensor]:
    return {p for group in optimizer.param_groups for p in group["params"]}


def _check_free(optimizers: Iterable[Optimizer]) -> None:
    """Refuse those that have a WeightDecay, or decay by themselves: as they say, or by effect."""
    seen = set()
    for optimizer in optimizers:
        if attached(optimizer) is not None:
            raise InputError("this optimizer has a WeightDecay already; detach() that one first")
        for number, group in enumerate(optimizer.param_groups):
            rate = group.get("weight_decay", 0)
            if rate:
                raise InputError(_not_free(f"weight_decay={rate}", number, "weight_decay"))
            for like in {p.ndim: p for p in group["params"]}.values():
                kind = (*options_of(optimizer, group), like.ndim, like.device)
                if kind in seen:  # as of one optimizer for each tensor
                    continue
                seen.add(kind)
                effect = effect_at_work(optimizer, group, like)
                if effect.rule != "none":
                    said = (
                        f"{effect.name}={effect.rate(group):g}" if effect.name else "rate unknown"
                    )
                    raise InputError(_not_free(said, number, effect.name))


def _not_free(said: str, number: int, name: str) -> str:
    advice = f"build it with {name}=0" if name else "none of its options ends that; take another"
    return f"the optimizer decays by itself ({said} in parameter group {number}); {advice}"


def _check_held(chosen: dict[str, nn.Parameter], held: set[Tensor]) -> None:
    lacking = [name for name, p in chosen.items() if p.requires_grad and p not in held]
    if lacking:
        raise InputError(
            f"the optimizer lacks {len(lacking)} of the {len(chosen)} parameters to decay "
            f"({lacking[0]!r} first); build it from all of model.parameters(), give a list of all "
            "the optimizers, or name those it holds with parameters="
        )


def _check_dense(model: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
    parameters = set(chosen.values())
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and getattr(module, "weight", None) in parameters:
            raise InputError(_sparse(name or type(module).__name__))


def _sparse(name: str) -> str:
    return (
        f"{name} has sparse gradients, which say nothing of the weights a step leaves alone; build "
        "it with sparse=False, or leave it out with parameters="
    )


def _check_trainable(chosen: dict[str, nn.Parameter]) -> None:
    for name, p in chosen.items():
        if p.requires_grad and p.is_inference():
            raise InputError(
                f"{name} was made under torch.inference_mode(), and cannot be trained; make the "
                "model outside of it, or leave it out with parameters="
            )


def attached(optimizer: Optimizer) -> WeightDecay | None:
    """The WeightDecay at work on this optimizer, if there is one."""
    found = _ATTACHED.get(optimizer)
    return None if found is None else found()


def _forget(moment: AtMoment, _: Optimizer) -> None:
    """The optimizer has loaded another state: what a stopped step has left is of no account."""
    moment.forget()


def _quietly(call: Callable[..., None]) -> Callable[..., None]:
    """The call, without gradients."""
    return torch.no_grad()(call)
