"""Optimizers by name, timm's and any other's, and the audit of many of them."""

import importlib
import inspect
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from ..decay.auditing import AuditReport, TensorAudit, audit
from ..errors import InputError, near_names
from .options import parse_options

LR, WEIGHT_DECAY = 0.1, 0.01  # c = 1e-3 stands clear of rounding in float32


@dataclass(frozen=True, slots=True)
class Surveyed:
    """One optimizer of a survey.

    Attributes:
        name: as it was asked for.
        rule: in words: the rule, or each rule with the kinds of tensors it acts on.
        multiple: the observed share as a multiple of ηλ: one number, or a range; "" if there is
            none.
        remarks: what is special, in short.
        error: why it could not be audited; "" if it was.
    """

    name: str
    rule: str
    multiple: str
    remarks: tuple[str, ...]
    error: str


def tiny_model() -> nn.Module:
    """A convolution, a norm and a linear layer: tensors of 4, 2 and 1 dimensions."""
    conv, norm, head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)
    return nn.Sequential(OrderedDict(conv=conv, norm=norm, flat=nn.Flatten(), head=head))


def known_optimizers() -> tuple[str, ...]:
    """Every optimizer that timm registers, and every class that torch.optim ships."""
    from timm.optim import list_optimizers

    classes = vars(torch.optim).items()
    shipped = sorted(
        f"torch.optim.{name}"
        for name, item in classes
        if inspect.isclass(item) and issubclass(item, Optimizer) and item is not Optimizer
    )
    return (*list_optimizers(), *shipped)


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float = LR,
    weight_decay: float = WEIGHT_DECAY,
    options: Mapping[str, Any] | None = None,
    filter_bias_and_bn: bool = False,
    layer_decay: float | None = None,
) -> Optimizer:
    """An optimizer over a model's parameters.

    Args:
        name: a timm name, or the dotted path of a class such as ``torch.optim.SGD``. A class that
            refuses the model's parameters is given its matrices alone.
        model: whose parameters.
        lr: η.
        weight_decay: λ; a class without it does without.
        options: further arguments.
        filter_bias_and_bn: spare biases, norms and the model's own list, by timm's rule.
        layer_decay: timm's layer-wise ``lr_scale``.

    Raises:
        InputError: an unknown name, a class that is no optimizer, options it does not take.
    """
    given: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, **(options or {})}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if "." not in name:
                return _timms(name, model, given, filter_bias_and_bn, layer_decay)
            groups = _groups(model, weight_decay, filter_bias_and_bn, layer_decay)
            return _of_class(_imported(name), groups, given)
    except InputError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{name} cannot be built here: {why}") from error


def _timms(
    name: str, model: nn.Module, given: dict[str, Any], spare: bool, layer_decay: float | None
) -> Optimizer:
    from timm.optim import create_optimizer_v2, list_optimizers

    if name.lower().removeprefix("lookahead_") not in list_optimizers():
        near = near_names(name, list_optimizers())
        raise InputError(
            f"unknown optimizer {name!r}{near or '; `wdprobe audit --all` names them all'}"
        )
    built: Optimizer = create_optimizer_v2(
        model, name, filter_bias_and_bn=spare, layer_decay=layer_decay, **given
    )
    return built


def _groups(
    model: nn.Module, weight_decay: float, spare: bool, layer_decay: float | None
) -> list[Any]:
    if not spare and layer_decay is None:
        return list(model.parameters())
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    wish = getattr(model, "no_weight_decay", None)
    spared = wish() if callable(wish) else ()
    if layer_decay is not None:
        return list(
            param_groups_layer_decay(
                model, weight_decay, no_weight_decay_list=spared, layer_decay=layer_decay
            )
        )
    return list(param_groups_weight_decay(model, weight_decay, spared))


def _imported(path: str) -> type[Optimizer]:
    home, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(home)
    except ImportError as error:
        raise InputError(f"unknown optimizer {path!r}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        raise InputError(f"{home} has no {name!r}{near_names(name, dir(module))}")
    if not (inspect.isclass(found) and issubclass(found, Optimizer)):
        raise InputError(f"{path} is no torch.optim.Optimizer")
    return found


def _of_class(optimizer: type[Optimizer], groups: list[Any], given: dict[str, Any]) -> Optimizer:
    if "weight_decay" not in inspect.signature(optimizer).parameters:
        given = {key: value for key, value in given.items() if key != "weight_decay"}
    make: Any = optimizer
    try:
        return _checked(make(groups, **given))
    except ValueError:
        matrices = [p for p in groups if isinstance(p, torch.Tensor) and p.ndim == 2]
        if not matrices:
            raise
        return _checked(make(matrices, **given))


def _checked(optimizer: Optimizer) -> Optimizer:
    if isinstance(optimizer, LBFGS):
        audit(optimizer)  # says why not
    return optimizer


def survey(
    names: Sequence[str], *, lr: float = LR, weight_decay: float = WEIGHT_DECAY
) -> Iterator[Surveyed]:
    """Audit optimizers by name over :func:`tiny_model`, one after another.

    Yields:
        One :class:`Surveyed` each, also for those that cannot be built or stepped here.
    """
    for name in names:
        torch.manual_seed(0)
        model = tiny_model()
        try:
            optimizer = build_optimizer(name, model, lr=lr, weight_decay=weight_decay)
            report = audit(optimizer, model)
        except InputError as error:
            yield Surveyed(
                name, "", "", (), str(error).removeprefix(f"{name} cannot be built here: ")
            )
            continue
        has_decay = any("weight_decay" in group for group in optimizer.param_groups)
        remarks = _remarks(report) if has_decay else ("it has no weight_decay",)
        yield Surveyed(name, _rules(report), _multiple(report), remarks, "")


def _rules(report: AuditReport) -> str:
    kinds: dict[str, set[int]] = {}
    for tensor in report.tensors:
        kinds.setdefault(tensor.rule, set()).add(len(tensor.shape))
    if len(kinds) == 1:
        return next(iter(kinds))
    return ", ".join(
        f"{rule} ({', '.join(f'{n}-d' for n in sorted(dims))})" for rule, dims in kinds.items()
    )


def _multiple(report: AuditReport) -> str:
    found = {_rounded(t) for t in report.tensors if t.decays and t.observed == t.observed}
    return " to ".join(f"{value:g}" for value in sorted({min(found), max(found)})) if found else ""


def _rounded(tensor: TensorAudit) -> float:
    return float(f"{tensor.observed / tensor.expected:.2g}")


def _remarks(report: AuditReport) -> tuple[str, ...]:
    """The gist of each warning, without what holds for this model alone."""
    kept = [line for line in report.warnings if not line.startswith("norms and biases decay")]
    gists = [re.split(r"[:;] ", line)[0] for line in kept]
    return tuple(re.sub(r" in \d+ tensors? \(e\.g\. [\w.]+\)", "", gist) for gist in gists)


def audit_by_name(
    name: str,
    *,
    model_name: str | None = None,
    img_size: int = 32,
    lr: float = LR,
    weight_decay: float = WEIGHT_DECAY,
    options: Sequence[str] = (),
    filter_bias_and_bn: bool = False,
    layer_decay: float | None = None,
) -> dict[str, Any]:
    """The audit of one optimizer over one model, as `wdprobe audit --json` prints it.

    Raises:
        InputError: an unknown optimizer or model, or options it does not take.
    """
    if model_name is None:
        model = tiny_model()
    else:
        from .models import create_model

        model = create_model(model_name, num_classes=10, img_size=img_size, check_size=False)
    optimizer = build_optimizer(
        name,
        model,
        lr=lr,
        weight_decay=weight_decay,
        options=parse_options(options),
        filter_bias_and_bn=filter_bias_and_bn,
        layer_decay=layer_decay,
    )
    report = audit(optimizer, model)
    return {
        "command": "audit",
        "name": name,
        "model": model_name or "conv-norm-linear",
        "lr": lr,
        "weight_decay": weight_decay,
        **asdict(report),
    }
