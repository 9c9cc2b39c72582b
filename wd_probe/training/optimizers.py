"""Optimizers by name: those that timm registers, and any class by its dotted path."""

import importlib
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from ..decay.auditing import audit
from ..errors import InputError, first_line, near_names, shown, shown_line
from ..layering import decayed_parameters, named_parameters

LR, WEIGHT_DECAY = 0.1, 0.01  # of an audit: c = 1e-3 stands clear of rounding in float32


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float = LR,
    weight_decay: float = WEIGHT_DECAY,
    momentum: float | None = None,
    options: Mapping[str, Any] | None = None,
    filter_bias_and_bn: bool = False,
    layer_decay: float | None = None,
    partly: bool = False,
) -> Optimizer:
    """An optimizer over a model's parameters; every one of them decays, unless some are spared.

    Args:
        name: a timm name, or the dotted path of a class such as ``torch.optim.SGD``, whose module
            is imported.
        model: whose parameters.
        lr: η.
        weight_decay: λ.
        momentum: for those that have one; None for their own default.
        options: further arguments, such as ``fused=True``.
        filter_bias_and_bn: spare biases, norms and the model's own list, by timm's rule.
        layer_decay: timm's layer-wise ``lr_scale``, in the groups that timm makes for it.
        partly: make do, for an audit: a class that refuses the model's parameters is given its
            matrices alone, one without ``weight_decay`` does without.

    Raises:
        InputError: an unknown name, a class that is no optimizer, options it does not take.
    """
    given: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    given |= {} if momentum is None else {"momentum": momentum}
    options = options or {}
    for own in given:
        if own in options:
            raise InputError(f"--opt-kwargs {own}=... is given by --{own.replace('_', '-')}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if "." in name:
                groups = _groups(model, weight_decay, layer_decay)
                optimizer = _of_class(name, groups, given, options, partly)
            else:
                given |= options
                optimizer = _timms(name, model, given, filter_bias_and_bn, layer_decay)
    except InputError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{shown_line(name)} cannot be built here: {why}") from error
    if filter_bias_and_bn and layer_decay is None:
        _spare(optimizer, model)
    return optimizer


def _timms(
    name: str, model: nn.Module, given: dict[str, Any], spare: bool, layer_decay: float | None
) -> Optimizer:
    from timm.optim import create_optimizer_v2, list_optimizers

    if name.lower().removeprefix("lookahead_") not in list_optimizers():
        near = near_names(name, list_optimizers())
        raise InputError(
            f"unknown optimizer {shown(name)}{near or '; `wdprobe audit --all` names them all'}"
        )
    layered = layer_decay is not None
    built: Optimizer = create_optimizer_v2(
        model, name, filter_bias_and_bn=spare and layered, layer_decay=layer_decay, **given
    )
    if not layered:  # newer timm spares the model's own list even so
        for group in built.param_groups:
            group["weight_decay"] = given["weight_decay"]
    return built


def _groups(model: nn.Module, weight_decay: float, layer_decay: float | None) -> list[Any]:
    if layer_decay is None:
        return list(model.parameters())
    from timm.optim import param_groups_layer_decay

    wish = getattr(model, "no_weight_decay", None)
    return list(
        param_groups_layer_decay(
            model,
            weight_decay,
            no_weight_decay_list=wish() if callable(wish) else (),
            layer_decay=layer_decay,
        )
    )


def _of_class(
    path: str,
    groups: list[Any],
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    partly: bool,
) -> Optimizer:
    make: Any = _imported(path)
    taken = inspect.signature(make).parameters
    if "weight_decay" not in taken and given["weight_decay"] and not partly:
        raise InputError(f"{path} has no weight_decay; give 0 for it, or a --method that decays")
    asked = {key: value for key, value in given.items() if key in taken or key == "lr"}
    asked |= options
    try:
        built: Optimizer = make(groups, **asked)
    except ValueError:
        matrices = [p for p in groups if isinstance(p, torch.Tensor) and p.ndim == 2]
        if not (partly and matrices):
            raise
        built = make(matrices, **asked)
    if isinstance(built, LBFGS):
        audit(built)  # says why not
    if "lr" not in built.param_groups[0] and not partly:
        raise InputError(f"{path} keeps no lr in its parameter groups")
    return built


def _imported(path: str) -> type[Optimizer]:
    home, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(home)
    except ImportError as error:
        raise InputError(f"unknown optimizer {shown(path)}: {first_line(error)}") from error
    found = getattr(module, name, None)
    if found is None:
        raise InputError(f"{home} has no {shown(name)}{near_names(name, dir(module))}")
    if not (inspect.isclass(found) and issubclass(found, Optimizer)):
        raise InputError(f"{path} is no torch.optim.Optimizer")
    return found


def _spare(optimizer: Optimizer, model: nn.Module) -> None:
    """Put what is not to decay into parameter groups of its own."""
    chosen = set(decayed_parameters(model, filter_bias_and_bn=True))
    spared = {id(p) for name, p in named_parameters(model) if name not in chosen}
    if not spared:
        return
    for group in list(optimizer.param_groups):
        kept = [p for p in group["params"] if id(p) not in spared]
        rest = [p for p in group["params"] if id(p) in spared]
        if not kept:
            group["weight_decay"] = 0.0
        elif rest:
            group["params"] = kept
            optimizer.add_param_group({**group, "params": rest, "weight_decay": 0.0})
