"""A model's layers from shallow to deep, and the decay rates of Eq. 9."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .arguments import check_choice, check_count, check_rate, check_type
from .choices import Scale
from .errors import InputError, shown

Definition = Literal["timm", "forward", "registration"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a model.

    Attributes:
        index: 1 (shallowest) to n (the head).
        name: the modules it consists of, e.g. ``stages.1.{downsample,blocks.0}``.
        parameters: names of its parameters, as in ``model.named_parameters()`` without the
            prefixes that `torch.compile` and DDP add.
    """

    index: int
    name: str
    parameters: tuple[str, ...]


class Layers(tuple[Layer, ...]):
    """A tuple of :class:`Layer` that knows how they were found.

    Attributes:
        definition: "timm" (its own grouping of the model), "forward" (modules in the order the
            forward pass first calls them) or "registration" (in the order they were registered).
    """

    definition: Definition

    def __new__(cls, items: Iterable[Layer], definition: Definition) -> "Layers":
        """Make the tuple."""
        self = super().__new__(cls, items)
        self.definition = definition
        return self

    def __getnewargs__(self) -> tuple[tuple[Layer, ...], Definition]:
        return tuple(self), self.definition


def layers(model: nn.Module, inputs: Any = None, *, coarse: bool = False) -> Layers:
    """The layers of a model, shallow to deep, every parameter in exactly one (theory fact 13).

    timm models are grouped as timm groups them (`group_matcher`). Any other model, and the few
    timm models without a grouping, yield the modules that own parameters, in the order the forward
    pass first calls them. That order is found on a weightless copy on torch's meta device, so the
    model itself is not run; modules the pass never calls come last.

    Args:
        model: any module; wrapped by `torch.compile` or DDP too.
        inputs: what the model is called with (a tensor, or a tuple of positional arguments). timm
            models know their own. Without it other models come in the order of registration.
        coarse: timm's coarse groups (stem, stages, head), else the top-level modules.

    Returns:
        A tuple of :class:`Layer`; its ``definition`` says which way they were found.

    Raises:
        InputError: it is no module, or has no parameters.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> for layer in layers(net, torch.randn(1, 4)):
        ...     print(layer.index, layer.name, layer.parameters)
        1 0 ('0.weight', '0.bias')
        2 2 ('2.weight', '2.bias')
    """
    check_type(model, "model", nn.Module, "a torch.nn.Module")
    model = unwrap(model)
    names = {raw: clean_name(raw, model) for raw, _ in model.named_parameters()}
    if not names:
        raise InputError(f"{type(model).__name__} has no parameters, so it has no layers")
    if hasattr(model, "group_matcher"):
        groups = _timm_groups(model, coarse)
        if groups is not None:
            return _named(groups, names, "timm")
    if coarse:
        tops = _grouped((name.partition(".")[0], raw) for raw, name in names.items())
        return _named(tops, names, "registration")
    owners = _grouped((_owner(raw, model), raw) for raw in names)
    if inputs is None:
        inputs = _timm_inputs(model)
    order = None if inputs is None else _forward_order(model, inputs)
    if order is None:
        return _named(owners, names, "registration")
    rank = {name: position for position, name in enumerate(order)}
    owners = dict(sorted(owners.items(), key=lambda item: rank.get(item[0], math.inf)))
    return _named(owners, names, "forward")


def blocks(model: nn.Module) -> Layers:
    """A model's layers by block: each numbered block, and what stands beside them.

    Args:
        model: a model whose blocks stand in a ``ModuleList`` or a ``Sequential``.

    Returns:
        A tuple of :class:`wd_probe.Layer` in the order of registration: one for each numbered
        block, one for each other module that owns parameters. Tied weights belong to the first.

    Example:
        >>> layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        >>> encoder = nn.TransformerEncoder(layer, 2)
        >>> net = nn.ModuleDict({"embed": nn.Embedding(8, 4), "encoder": encoder})
        >>> for layer in blocks(net):
        ...     print(layer.index, layer.name)
        1 embed
        2 encoder.layers.0
        3 encoder.layers.1
    """
    owned = (
        (_block(_owner(raw, model)) or clean_name(raw, model), clean_name(raw, model))
        for raw, _ in model.named_parameters()
    )
    return Layers(
        (
            Layer(index, name, tuple(members))
            for index, (name, members) in enumerate(_grouped(owned).items(), start=1)
        ),
        "registration",
    )


def _block(module: str) -> str:
    """The numbered block that a module is in, by name; itself if it is in none."""
    parts = module.split(".")
    ends = next((k for k, part in enumerate(parts, start=1) if part.isdigit()), len(parts))
    return ".".join(parts[:ends])


def layers_or(groups: Layers | None, model: nn.Module) -> Layers:
    """The layers that are given, else the model's.

    Raises:
        InputError: what is given are no layers.
    """
    if groups is None:
        return layers(model)
    check_type(groups, "groups", Layers, "what wd_probe.layers gives")
    return groups


#: Under which name a wrapper keeps the module it wraps, by the wrapper's package and class.
_WRAPPERS = {
    ("torch", "OptimizedModule"): "_orig_mod",
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "DataParallel"): "module",
    ("torch", "AveragedModel"): "module",
    ("torch", "ActivationWrapper"): "_checkpoint_wrapped_module",
    ("apex", "DistributedDataParallel"): "module",
    ("deepspeed", "DeepSpeedEngine"): "module",
    ("lightning", "_FabricModule"): "_forward_module",
    ("lightning_fabric", "_FabricModule"): "_forward_module",
}


def _wrapped(module: nn.Module | None) -> str:
    """Under which name a module keeps the one that it wraps; empty if it is no wrapper."""
    bases = ((base.__module__.partition(".")[0], base.__name__) for base in type(module).__mro__)
    return next((_WRAPPERS[base] for base in bases if base in _WRAPPERS), "")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, DDP and other wrappers."""
    while isinstance(inner := model._modules.get(_wrapped(model)), nn.Module):
        model = inner
    return model


def clean_name(name: str, model: nn.Module) -> str:
    """A parameter's name in a model without what wrappers (`torch.compile`, DDP) add to it.

    What is no wrapper keeps its name, were it ``module``.
    """
    kept = (part for part, module in _steps(name, model) if part != _wrapped(module))
    return ".".join(kept) if name else ""


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A model's parameters by clean name, each once."""
    return ((clean_name(name, model), p) for name, p in model.named_parameters())


def _steps(name: str, model: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
    """The parts of a name, each with the module that it is looked up in."""
    module: nn.Module | None = model
    for part in name.split("."):
        yield part, module
        module = None if module is None else module._modules.get(part)


def _owner(name: str, model: nn.Module) -> str:
    """The clean name of the module that a parameter belongs to.

    What parametrizes a weight (`weight_norm`, `orthogonal`), and what PEFT puts around a layer,
    belongs to the layer.
    """
    parts = name.split(".")
    inside = (n for n, step in enumerate(_steps(name, model)) if _is_part_of_a_layer(*step))
    return clean_name(".".join(parts[: next(inside, len(parts) - 1)]), model)


def _is_part_of_a_layer(part: str, module: nn.Module | None) -> bool:
    if module is None:
        return False
    parametrizes = part == "parametrizations" and parametrize.is_parametrized(module)
    return parametrizes or any(b.__name__ == "BaseTunerLayer" for b in type(module).__mro__)


def _timm_groups(model: nn.Module, coarse: bool) -> list[list[str]] | None:
    from timm.models import group_parameters

    try:
        matcher: Any = model.group_matcher
        return list(group_parameters(model, matcher(coarse=coarse)).values())
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _timm_inputs(model: nn.Module) -> Tensor | None:
    size = (getattr(model, "default_cfg", None) or {}).get("input_size")
    return None if size is None else torch.zeros(1, *size, device="meta")


def _grouped(owned: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names by their owner."""
    groups: dict[str, list[str]] = {}
    for owner, name in owned:
        groups.setdefault(owner, []).append(name)
    return groups


def _forward_order(model: nn.Module, inputs: Any) -> list[str] | None:
    """Module names in the order a forward pass first calls them; None if the pass fails."""
    tensors = (*model.parameters(), *model.buffers())
    # Seeding the memo keeps deepcopy from copying the weights themselves.
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    order: list[str] = []
    try:
        ghost = copy.deepcopy(model, memo).eval()
        for raw, module in ghost.named_modules():
            name = clean_name(raw, ghost)
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            module.register_forward_pre_hook(lambda _m, _i, name=name: order.append(name))
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        with torch.no_grad():
            ghost(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments))
    except Exception:  # a model that cannot run weightless is still a model with layers
        return None
    return list(dict.fromkeys(order))


def _named(
    groups: dict[str, list[str]] | list[list[str]],
    names: Mapping[str, str],
    definition: Definition,
) -> Layers:
    """Layers of groups of names, which are looked up in ``names``."""
    members = list(groups.values()) if isinstance(groups, dict) else groups
    members = [[names.get(name, name) for name in group] for group in members if group]
    titles = _titles(members)
    found = Layers(
        (
            Layer(index, title, tuple(group))
            for index, (title, group) in enumerate(zip(titles, members, strict=True), start=1)
        ),
        definition,
    )
    placed = [name for layer in found for name in layer.parameters]
    if sorted(placed) != sorted(names.values()):
        raise InputError("the model's own grouping does not hold every parameter exactly once")
    return found


def _titles(groups: Sequence[Sequence[str]]) -> list[str]:
    """For each group the shortest prefixes that none of the other groups' names share."""
    owner: dict[str, int | None] = {}
    for number, group in enumerate(groups):
        for name in group:
            parts = name.split(".")
            for length in range(1, len(parts) + 1):
                prefix = ".".join(parts[:length])
                owner[prefix] = number if owner.get(prefix, number) == number else None
    return [_braced([_own_prefix(name, n, owner) for name in g]) for n, g in enumerate(groups)]


def _own_prefix(name: str, number: int, owner: dict[str, int | None]) -> str:
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return next(prefix for prefix in prefixes if owner[prefix] == number)


def _braced(prefixes: Sequence[str]) -> str:
    unique = [prefix.split(".") for prefix in dict.fromkeys(prefixes)]
    if len(unique) == 1:
        return ".".join(unique[0])
    shared = 0
    while len({tuple(parts[: shared + 1]) for parts in unique}) == 1:
        shared += 1
    tails = [".".join(parts[shared:]) for parts in unique]
    shown = tails if len(tails) <= 4 else [*tails[:2], "…", tails[-1]]
    head = ".".join(unique[0][:shared])
    return f"{head}.{{{','.join(shown)}}}" if head else ",".join(shown)


def layerwise_rates(n: int, rate: float, scale: Scale = "max2") -> tuple[float, ...]:
    """The decay rates λ_i of n layers, which rise with depth (Eq. 9, theory fact 12).

    Args:
        n: number of layers.
        rate: λ.
        scale: "eq9": λ_i = λ·i/n, mean λ(n+1)/(2n). "max2" (the paper's section 4, and default):
            2λ·i/n, mean λ(n+1)/n. "mean": 2λ·i/(n+1), mean exactly λ. "falling": the rates of
            "max2" in reverse, a control that the paper does not run.

    Returns:
        n rates, for layer 1 to n.

    Raises:
        InputError: n < 1, a rate that is negative or not finite, an unknown scale.

    Example:
        >>> layerwise_rates(4, 0.1)
        (0.05, 0.1, 0.15000000000000002, 0.2)
    """
    check_count(n, "n")
    check_rate(rate)
    check_choice(scale, "scale", get_args(Scale))
    top = {"eq9": 1 / n, "max2": 2 / n, "mean": 2 / (n + 1), "falling": 2 / n}[scale]
    rising = tuple(rate * i * top for i in range(1, n + 1))
    return rising[::-1] if scale == "falling" else rising


def decayed_parameters(model: nn.Module, *, filter_bias_and_bn: bool = False) -> tuple[str, ...]:
    """Names of the parameters that decay (theory fact 14).

    Args:
        model: any module.
        filter_bias_and_bn: leave out what timm's optimizer factory leaves out under this name:
            biases, norms and every other one-dimensional tensor, and the model's own
            ``no_weight_decay()`` list. The default decays everything, as the paper does.

    Returns:
        Names in the order of ``named_parameters()``.
    """
    model = unwrap(model)
    own = getattr(model, "no_weight_decay", None)
    spared = set(own()) if filter_bias_and_bn and callable(own) else set()
    return tuple(
        name
        for name, parameter in named_parameters(model)
        if not filter_bias_and_bn
        or not (parameter.ndim <= 1 or name.endswith(".bias") or name in spared)
    )


def chosen_parameters(
    model: nn.Module, names: Iterable[str] | None = None
) -> dict[str, nn.Parameter]:
    """A model's parameters by clean name, or those of the given names.

    Raises:
        InputError: the model has no parameter of such a name, or one that is yet to be made.
    """
    check_type(model, "model", nn.Module, "a torch.nn.Module")
    own = dict(named_parameters(model))
    if names is None:
        for name, p in own.items():
            check_made(name, p)
        return own
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InputError(f"parameters must be a list of names, got {shown(names)}")
    wanted = dict.fromkeys(names)
    for name in wanted:
        if not isinstance(name, str):
            raise InputError(
                f"parameters are chosen by name, such as {next(iter(own))!r}, got a "
                f"{type(name).__name__}"
            )
        if name not in own:
            raise InputError(f"parameters: the model has no parameter named {shown(name)}")
        check_made(name, own[name])
    return {name: own[name] for name in wanted}


def check_made(name: str, p: Tensor, *, with_numbers: bool = True) -> None:
    """Refuse a parameter that is yet to be made.

    Args:
        name: of the parameter.
        p: the parameter itself.
        with_numbers: whether it must have numbers, beside a shape.

    Raises:
        InputError: it is of a lazy module that has seen no batch; it is on the meta device.
    """
    if is_lazy(p):
        raise InputError(f"{name} has no shape yet: run a batch through the lazy modules first")
    if with_numbers and p.is_meta:
        raise InputError(
            f"{name} is on the meta device, without numbers: load them first, then build the "
            "optimizer"
        )
