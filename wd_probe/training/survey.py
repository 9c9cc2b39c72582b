"""The audit of optimizers by name, over a tiny model or one of timm's."""

import inspect
import math
import re
import statistics
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..decay.auditing import AuditReport, TensorAudit, audit
from ..errors import InputError, counted
from ..probe.dynamics import remaining
from ..wording import decimal, percent
from .optimizers import LR, WEIGHT_DECAY, build_optimizer
from .options import parse_options


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
            optimizer = build_optimizer(name, model, lr=lr, weight_decay=weight_decay, partly=True)
            report = audit(optimizer, model)
        except InputError as error:
            yield Surveyed(
                name, "", "", (), str(error).removeprefix(f"{name} cannot be built here: ")
            )
            continue
        has_decay = any("weight_decay" in group for group in optimizer.param_groups)
        has_decay |= report.rule != "none"
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
    known = (t for t in report.tensors if t.decays and t.observed == t.observed and t.expected > 0)
    found = {_rounded(t) for t in known}
    return " to ".join(f"{value:g}" for value in sorted({min(found), max(found)})) if found else ""


def _rounded(tensor: TensorAudit) -> float:
    return float(f"{tensor.observed / tensor.expected:.2g}")


def _remarks(report: AuditReport) -> tuple[str, ...]:
    """The gist of each warning, without what holds for this model alone."""
    kept = [line for line in report.warnings if not line.startswith("norms and biases decay")]
    gists = [re.split(r"[:;] ", line)[0] for line in kept]
    return tuple(re.sub(r",? in \d+ tensors? \(e\.g\. [\w.]+\)", "", gist) for gist in gists)


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
    steps: int | None = None,
) -> dict[str, Any]:
    """The audit of one optimizer over one model, as `wdprobe audit --json` prints it.

    With ``steps`` a warning says what decay comes to in a run of so many.

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
        partly=True,
    )
    report = audit(optimizer, model)
    return {
        "command": "audit",
        "name": name,
        "model": model_name or "conv-norm-linear",
        "lr": lr,
        "weight_decay": weight_decay,
        **asdict(report),
        "tensors": [asdict(t) | {"expected": decimal(t.expected)} for t in report.tensors],
        "warnings": (*report.warnings, *_in_a_run(report, steps)),
    }


def _in_a_run(report: AuditReport, steps: int | None) -> Iterator[str]:
    """What decay takes off in so many steps."""
    decayed = [t for t in report.tensors if t.decays]
    if steps is None or not decayed:
        return
    if any(math.isnan(t.factor) for t in decayed):
        yield (
            "how much decay takes off in a run goes by its gradients: `wdprobe rop` and `wdprobe "
            "train --every 10` measure it"
        )
        return
    c = statistics.fmean(t.factor if t.observed else 0.0 for t in decayed)
    if not c:
        yield f"decay would take nothing off in {counted(steps, 'step')}: rounding undoes it"
        return
    is_product = all(math.isclose(t.expected, c, rel_tol=1e-6) for t in decayed)
    yield (
        f"1/{'(ηλ)' if is_product else 'c'} is {counted(float(f'{1 / c:.3g}'), 'step')}, the run "
        f"has {steps:,}: decay would take {percent(1 - remaining(c, steps))} off"
    )
