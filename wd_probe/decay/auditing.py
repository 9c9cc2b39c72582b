"""What an optimizer's weight decay really does: by which rule, to which tensors, how strongly."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..arguments import check_type
from ..choices import Method
from ..errors import InputError, counted
from ..hooks import hooked
from ..layering import check_made, named_parameters, unwrap
from ..shown import Shown
from .methods import WeightDecay, attached
from .rules import Effect, Rule, decay_share, effect_at_work, is_adaptive

if TYPE_CHECKING:
    from ..tables import ByWidth

_SAMPLE = 4096  # weights of a tensor that are looked at
_Kind = tuple[int, int]  # parameter group and number of dimensions


@dataclass(frozen=True, slots=True)
class TensorAudit:
    """What decay does to one trainable tensor.

    Attributes:
        name: of the model's parameter, or its place in the optimizer.
        group: index of its parameter group.
        shape: its shape.
        dtype: how it is stored.
        weight_decay: λ as configured, under whatever name; NaN where it is unknown.
        lr: η, live.
        expected: ηλ; NaN where λ is unknown.
        factor: c as the rule has it at these η and λ; 0 where nothing decays, NaN where the rule
            has none ("l2", "other").
        observed: the mean share that a step really takes off a sample of the stored weights: of û
            for "rwd" and "proximal" (c / (1 + c) there), of θ else. NaN for "l2" and "other",
            where it is the gradient's affair.
        rule: by which rule it decays; "none" if it does not.
        power: c ∝ η**power.
    """

    name: str
    group: int
    shape: tuple[int, ...]
    dtype: str
    weight_decay: float
    lr: float
    expected: float
    factor: float
    observed: float
    rule: Rule | Method
    power: int

    @property
    def decays(self) -> bool:
        """Whether decay takes anything off it."""
        return self.rule not in ("none", "baseline")


@dataclass(frozen=True, slots=True)
class AuditReport(Shown):
    """What an optimizer's weight decay really does.

    Attributes:
        optimizer: the class that was audited; of a wrapper, what it wraps.
        rule: the one rule of all tensors that decay, "mixed" if there are several, "none" if
            nothing decays.
        factor: the observed share taken off in a step, mean over these tensors; NaN if there is
            none to take the mean of.
        tensors: every trainable tensor.
        warnings: what to look at, one line each.
    """

    optimizer: str
    rule: Rule | Method | Literal["mixed"]
    factor: float
    tensors: tuple[TensorAudit, ...]
    warnings: tuple[str, ...]

    def __rich__(self) -> "ByWidth":
        """The rule, tensors that are alike, and the warnings."""
        from .audit_tables import audit_told

        tensors = [asdict(tensor) for tensor in self.tensors]
        return audit_told(self.rule, tensors, self.warnings, f"{self.optimizer} · ")


def audit(optimizer: Optimizer, model: nn.Module | None = None) -> AuditReport:
    """Find by effect which decay rule an optimizer runs, on which tensors, and by how much.

    Doubles of the optimizer are stepped on scratch weights, and on samples of the real ones; an
    attached :class:`wd_probe.WeightDecay` says itself what it does. The optimizer, its state, its
    weights and the random state are left alone. Frozen tensors are left out.

    Args:
        optimizer: any torch optimizer; a wrapper such as Lookahead is audited at what it wraps.
        model: names the tensors, and lets the audit compare with the model's own wishes
            (``no_weight_decay()``) and with its trainable parameters.

    Returns:
        The rule, the share taken off, every tensor, and warnings in plain words.

    Raises:
        InputError: it is no optimizer, or it is LBFGS; the model is no module.

    Example:
        >>> import torch
        >>> net = nn.Linear(8, 2)
        >>> report = audit(torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=0.1), net)
        >>> report.rule
        'l2'
        >>> report = audit(torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1), net)
        >>> report.rule, round(report.factor, 6)
        ('wd', 0.001)
        >>> print(report.warnings[0])
        norms and biases decay: 1 tensor (e.g. bias); give them a group with weight_decay=0
    """
    if model is not None:
        check_type(model, "model", nn.Module, "a torch.nn.Module")
    looked_at, remarks = _unwrapped(optimizer)
    audited = _Audit(looked_at, model)
    tensors = tuple(audited.tensors())
    decayed = [t for t in tensors if t.decays]
    rules = {t.rule for t in decayed}
    shares = [t.observed for t in decayed if not math.isnan(t.observed)]
    advice = (line for check in _CHECKS for line in check(audited, tensors))
    return AuditReport(
        type(looked_at).__name__,
        "none" if not rules else rules.pop() if len(rules) == 1 else "mixed",
        sum(shares) / len(shares) if shares else math.nan,
        tensors,
        (*remarks, *advice),
    )


def _unwrapped(optimizer: Optimizer) -> tuple[Optimizer, list[str]]:
    try:
        inner = hooked(optimizer)
    except InputError as error:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LBFGS):
            raise
        return optimizer, [str(error)]
    if inner is optimizer:
        return optimizer, []
    outer = type(optimizer).__name__
    return inner, [
        f"{outer} is audited at the {type(inner).__name__} that it wraps; what {outer} itself does "
        "to the weights comes on top"
    ]


class _Audit:
    """One optimizer under audit; effects are found once for each group and kind of tensor."""

    def __init__(self, optimizer: Optimizer, model: nn.Module | None) -> None:
        self.optimizer, self.model = optimizer, model
        self.title = type(optimizer).__name__
        self.decay = attached(optimizer)
        self.effects: dict[_Kind, Effect] = {}
        self.likes: dict[_Kind, Tensor] = {}
        self.late = False  # the first step takes nothing off
        self.names = _names(optimizer, model)

    def tensors(self) -> Iterator[TensorAudit]:
        for number, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                check_made(self.names[p], p, with_numbers=False)
                if p.requires_grad:
                    yield (
                        self._own(number, group, p)
                        if self.decay is None
                        else _attached(self.decay, self.names[p], number, group, p)
                    )

    def _own(self, number: int, group: dict[str, Any], p: Tensor) -> TensorAudit:
        lr, effect = _number(group.get("lr")), self._effect(number, group, p)
        decays = effect.rule != "none"
        rate = effect.rate(group) if decays else _number(group.get("weight_decay", 0.0))
        return TensorAudit(
            self.names[p],
            number,
            tuple(p.shape),
            str(p.dtype).removeprefix("torch."),
            rate,
            lr,
            lr * rate,
            float(effect.factor(group)) if decays and effect.multiplier else 0.0,
            self._share(group, p, effect) if decays else 0.0,
            effect.rule,
            effect.power,
        )

    def _share(self, group: dict[str, Any], p: Tensor, effect: Effect) -> float:
        return decay_share(self.optimizer, group, _sample(p), effect.rule, effect.name)

    def effect(self, tensor: TensorAudit) -> Effect:
        """By what the tensor decays."""
        return self.effects[tensor.group, len(tensor.shape)]

    def _effect(self, number: int, group: dict[str, Any], p: Tensor) -> Effect:
        kind = (number, p.ndim)
        if kind not in self.effects:
            self.likes[kind] = p
            effect = effect_at_work(self.optimizer, group, p)
            if effect.rule == "other":
                later = effect_at_work(self.optimizer, group, p, first_step=2)
                self.late |= later.rule != "other"
                effect = later
            self.effects[kind] = effect
        return self.effects[kind]

    def option(self, tensor: TensorAudit) -> str:
        """The name of the option that holds the tensor's rate; "" if there is none."""
        return "weight_decay" if self.decay is not None else self.effect(tensor).name

    def is_adaptive_l2(self) -> bool:
        return any(
            is_adaptive(self.optimizer, self.optimizer.param_groups[kind[0]], self.likes[kind])
            for kind, effect in self.effects.items()
            if effect.rule == "l2"
        )


def _attached(
    decay: WeightDecay, name: str, number: int, group: dict[str, Any], p: Tensor
) -> TensorAudit:
    """What an attached WeightDecay does, and what is left of it in the tensor's own precision."""
    lr, decays = _number(group.get("lr")), decay.decays(p)
    c = float(decay.factor(p, group)) if decays else 0.0
    in_gradient = decay.moment == "gradient"
    weights = _sample(p).detach()
    weights = torch.view_as_real(weights) if weights.is_complex() else weights
    taken = weights.double() - (weights * (1 - c)).double()
    share = float((taken * weights).sum() / weights.double().square().sum())
    observed = (math.nan if in_gradient else share) if decays else 0.0
    rate = c if decay.convention == "rate" else c / lr if lr else decay.rate
    return TensorAudit(
        name,
        number,
        tuple(p.shape),
        str(p.dtype).removeprefix("torch."),
        rate if decays else 0.0,
        lr,
        c,
        math.nan if in_gradient and decays else c,
        observed,
        decay.method if decays else "none",
        0 if decay.convention == "rate" else 1,
    )


def _names(optimizer: Optimizer, model: nn.Module | None) -> dict[Tensor, str]:
    names = {
        p: f"param_groups[{number}]['params'][{place}]"
        for number, group in enumerate(optimizer.param_groups)
        for place, p in enumerate(group["params"])
    }
    for group in optimizer.param_groups:
        names |= dict(zip(group["params"], group.get("param_names", ()), strict=False))
    if model is not None:
        names |= {p: name for name, p in named_parameters(model)}
    return names


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _sample(p: Tensor) -> Tensor:
    """The leading corner of a tensor."""
    local: Tensor = p.to_local() if hasattr(p, "to_local") else p  # a shard
    if local.ndim == 0 or local.numel() <= _SAMPLE:
        return local
    side = round(_SAMPLE ** (1 / local.ndim))
    return local[tuple(slice(side) for _ in range(local.ndim))]


# --- what is worth a warning ------------------------------------------------------------------


def _some(tensors: Sequence[TensorAudit]) -> str:
    return f"{counted(len(tensors), 'tensor')} (e.g. {tensors[0].name})"


def _not_held(audited: _Audit, _: Sequence[TensorAudit]) -> Iterator[str]:
    held = {p for group in audited.optimizer.param_groups for p in group["params"]}
    named = () if audited.model is None else named_parameters(audited.model)
    missing = [name for name, p in named if p.requires_grad and p not in held]
    if missing:
        yield (
            f"{counted(len(missing), 'trainable parameter')} of the model (e.g. {missing[0]}) not "
            "in the optimizer: neither trained nor decayed; hand it all of model.parameters()"
        )


def _without_effect(audited: _Audit, tensors: Sequence[TensorAudit]) -> Iterator[str]:
    idle = [t for t in tensors if t.weight_decay and not t.decays]
    if idle:
        yield (
            f"weight_decay={idle[0].weight_decay:g} changes nothing in {_some(idle)}: "
            f"{audited.title} does not apply it there; attach wd_probe.WeightDecay"
        )


def _l2_in_adaptive(audited: _Audit, _: Sequence[TensorAudit]) -> Iterator[str]:
    if audited.is_adaptive_l2():
        yield (
            f"L2 inside an adaptive step: in {audited.title} weights with large gradients hardly "
            "decay; take a decoupled optimizer (AdamW for Adam) or attach wd_probe.WeightDecay"
        )


def _lost_to_rounding(_: _Audit, tensors: Sequence[TensorAudit]) -> Iterator[str]:
    lost = [t for t in tensors if t.factor > 0 and abs(t.observed / _share(t) - 1) > 0.5]
    if lost:
        yield (
            f"rounding changes the decay of {_some(lost)}: in {lost[0].dtype} a step takes off "
            f"{lost[0].observed:.2g} instead of {_share(lost[0]):.2g}; keep weights in a "
            "wider dtype"
        )


def _share(tensor: TensorAudit) -> float:
    c = tensor.factor
    return c / (1 + c) if tensor.rule == "proximal" else c


def _too_strong(audited: _Audit, tensors: Sequence[TensorAudit]) -> Iterator[str]:
    strong = [t for t in tensors if t.factor >= 1]
    if strong:
        yield (
            f"c = {max(t.factor for t in strong):.3g} in {_some(strong)}: a step takes off the "
            f"whole weight or more; lower {audited.option(strong[0]) or 'it'} or the learning rate"
        )


def _no_rate(audited: _Audit, tensors: Sequence[TensorAudit]) -> Iterator[str]:
    groups = audited.optimizer.param_groups
    odd = [t for t in tensors if not t.lr >= 0 and groups[t.group].get("lr") is not None]
    if odd:
        yield f"the learning rate of {_some(odd)} is {odd[0].lr:g}; give them one above zero"


def _other_power(_: _Audit, tensors: Sequence[TensorAudit]) -> Iterator[str]:
    powers = {t.power for t in tensors if t.decays}
    if 2 in powers:
        yield (
            "c follows η²: a schedule that halves the learning rate quarters the decay; choose "
            "weight_decay for it, or the uncorrected optimizer"
        )
    if 0 in powers:
        yield (
            "c does not follow η: a schedule that lowers the learning rate leaves the decay as it "
            "is; choose weight_decay for the end of the schedule"
        )


def _other_multiple(audited: _Audit, tensors: Sequence[TensorAudit]) -> Iterator[str]:
    odd = [t for t in tensors if t.power == 1 and t.factor > 0 and t.expected > 0]
    odd = [t for t in odd if not math.isclose(t.factor, t.expected, rel_tol=1e-3)]
    if odd:
        yield (
            f"c is {odd[0].factor / odd[0].expected:.3g} times ηλ in {_some(odd)}; divide "
            f"{audited.option(odd[0])} by that for the usual strength"
        )


def _unknown(audited: _Audit, tensors: Sequence[TensorAudit]) -> Iterator[str]:
    other = [t for t in tensors if t.rule == "other" and audited.option(t)]
    if other:
        why = audited.effect(other[0]).why
        yield f"{why} in {_some(other)}: no closed rule; attach wd_probe.WeightDecay for one"


def _under_another_name(audited: _Audit, tensors: Sequence[TensorAudit]) -> Iterator[str]:
    decayed = [t for t in tensors if t.decays] if audited.decay is None else []
    named = [t for t in decayed if audited.option(t) not in ("", "weight_decay")]
    for name in sorted({audited.option(t) for t in named}):
        some = [t for t in named if audited.option(t) == name]
        yield (
            f"{audited.title} decays by its option {name}={some[0].weight_decay:g}, not by "
            f"weight_decay, in {_some(some)}"
        )
    unnamed = [t for t in decayed if not audited.option(t)]
    if unnamed:
        yield (
            f"{audited.title} decays, rate unknown, in {_some(unnamed)}: none of its options ends "
            "that; attach wd_probe.WeightDecay to an optimizer that does not decay"
        )


def _without_gradient(audited: _Audit, tensors: Sequence[TensorAudit]) -> Iterator[str]:
    decayed = [t for t in tensors if t.decays] if audited.decay is None else []
    some = [t for t in decayed if audited.effect(t).ungraded]
    if some:
        yield (
            f"{audited.title} decays weights that have no gradient too, in {_some(some)}: layers "
            "that are frozen, or that a loss does not reach, shrink with every step; leave them "
            "out of the optimizer"
        )


def _starts_late(audited: _Audit, _: Sequence[TensorAudit]) -> Iterator[str]:
    if audited.late:
        yield f"the first step takes nothing off: decay in {audited.title} begins with the second"


def _layer_decay(audited: _Audit, _: Sequence[TensorAudit]) -> Iterator[str]:
    groups = audited.optimizer.param_groups
    scales = [float(group.get("lr_scale", 1.0)) for group in groups]
    if set(scales) != {1.0} and len({float(group["lr"]) for group in groups}) == 1:
        yield (
            f"layer_decay has no effect yet: lr_scale is {min(scales):.2g} to {max(scales):.2g} "
            "and the learning rate the same in every group; only timm's own schedulers apply "
            "lr_scale: use one, or multiply each group's lr by it"
        )


def _against_the_model(audited: _Audit, tensors: Sequence[TensorAudit]) -> Iterator[str]:
    wish = (
        None if audited.model is None else getattr(unwrap(audited.model), "no_weight_decay", None)
    )
    spared = {str(name) for name in wish()} if callable(wish) else set()
    decayed = [t for t in tensors if t.decays and t.name in spared]
    if decayed:
        yield (
            f"the model's no_weight_decay() would spare {_some(decayed)}, and decay acts there; "
            "give them a group with weight_decay=0"
        )


def _norms_and_biases(audited: _Audit, tensors: Sequence[TensorAudit]) -> Iterator[str]:
    small = [t for t in tensors if t.decays and len(t.shape) <= 1]
    if small:
        name = audited.option(small[0])
        advice = f"; give them a group with {name}=0" if name else ""
        yield f"norms and biases decay: {_some(small)}{advice}"


_CHECKS: tuple[Callable[[_Audit, Sequence[TensorAudit]], Iterator[str]], ...] = (
    _not_held,
    _without_effect,
    _l2_in_adaptive,
    _lost_to_rounding,
    _too_strong,
    _no_rate,
    _other_power,
    _other_multiple,
    _unknown,
    _under_another_name,
    _without_gradient,
    _starts_late,
    _layer_decay,
    _against_the_model,
    _norms_and_biases,
)
