"""`wdprobe audit`."""

from dataclasses import asdict
from typing import Annotated, Any

from rich.markup import escape

from wd_probe.errors import InputError, counted
from wd_probe.training.options import (
    AT_LEAST_1,
    POSITIVE,
    FilterBiasAndBn,
    ImgSize,
    Option,
    WeightDecay,
)

from . import options as o
from .console import loading, out, plain_table, to_stdout


@o.command()
def audit(
    opt: Annotated[
        str | None, Option("A timm optimizer, or the dotted path of a class: torch.optim.SGD.")
    ] = None,
    every_one: Annotated[
        bool, Option("Every optimizer that timm and torch.optim know.", flag="--all")
    ] = False,
    opt_kwargs: Annotated[
        list[str] | None, Option("key=value for the optimizer; repeatable.")
    ] = None,
    model: Annotated[
        str | None, Option("A timm model (default: a convolution, a norm, a linear layer).")
    ] = None,
    img_size: ImgSize = 32,
    lr: Annotated[float, Option("Learning rate η.", must=POSITIVE)] = 0.1,
    weight_decay: WeightDecay = 0.01,
    filter_bias_and_bn: FilterBiasAndBn = False,
    layer_decay: Annotated[float | None, Option("timm's layer-wise lr_scale.")] = None,
    steps: Annotated[
        int | None, Option("Of a run; says what decay takes off in it.", must=AT_LEAST_1)
    ] = None,
    json: o.Json = False,
) -> None:
    """Find by effect which decay rule an optimizer runs, on which tensors, and by how much."""
    if (opt is None) != every_one:
        raise InputError("give either --opt NAME or --all")
    if every_one and steps is not None:
        raise InputError("--steps needs --opt NAME")
    with loading():
        from wd_probe.training import survey
    if opt is None:
        result = _survey(lr, weight_decay)
    else:
        result = survey.audit_by_name(
            opt,
            model_name=model,
            img_size=img_size,
            lr=lr,
            weight_decay=weight_decay,
            options=opt_kwargs or (),
            filter_bias_and_bn=filter_bias_and_bn,
            layer_decay=layer_decay,
            steps=steps,
        )
    if json:
        to_stdout(result)
    elif opt is None:
        _show_survey(result)
    else:
        _show(result)


def _survey(lr: float, weight_decay: float) -> dict[str, Any]:
    from wd_probe.training import survey

    from .progress import ScanProgress

    rows: list[dict[str, Any]] = []
    names = survey.known_optimizers()
    with ScanProgress() as progress:
        for row in survey.survey(names, lr=lr, weight_decay=weight_decay):
            rows.append(asdict(row))
            progress.progress("audit", len(rows), len(names), row.name)
    return {"command": "audit", "lr": lr, "weight_decay": weight_decay, "optimizers": rows}


def _show(result: dict[str, Any]) -> None:
    """The result of `wdprobe audit --opt` for a person."""
    out.print(
        f"[bold]{escape(result['optimizer'])}[/] ({escape(result['name'])}) on "
        f"{escape(result['model'])} · η {result['lr']:g} · λ {result['weight_decay']:g}\n"
        f"[bold]{result['rule']}[/]: {_RULES[result['rule']]}"
    )
    table = plain_table()
    table.add_column("groups", justify="right", no_wrap=True)
    table.add_column("tensors", justify="right")
    table.add_column("such as", overflow="ellipsis", no_wrap=True, max_width=out.width // 3)
    table.add_column("rule")
    for title in ("ηλ", "takes off", "× ηλ"):
        table.add_column(title, justify="right", no_wrap=True)
    for alike in _alike(result["tensors"]):
        first, shares = alike[0], [t["observed"] for t in alike if t["observed"] == t["observed"]]
        share = sum(shares) / len(shares) if shares else None
        expected = first["expected"]
        table.add_row(
            _span([t["group"] for t in alike]), str(len(alike)), escape(first["name"]),
            first["rule"],
            f"{expected:.3g}",
            "–" if share is None else f"{share:.3g}",
            f"{share / expected:.3g}" if share is not None and expected else "–",
        )  # fmt: skip
    out.print(table)
    for warning in result["warnings"]:
        out.print(f"• {escape(warning)}")


_RULES = {
    "none": "nothing decays",
    "baseline": "nothing decays",
    "mixed": "tensors decay by several rules",
    "l1": "L1: λ·sign(θ) is added to the gradient",
    "l2": "L2: λθ is added to the gradient and goes through the step",
    "wd": "decoupled: ηλθ is taken off beside the step",
    "rwd": "decoupled: c·û is taken off after the step",
    "pwd": "decoupled: c·θ is taken off before the forward pass",
    "lpwd": "decoupled, with a rate for each layer: c·θ is taken off before the forward pass",
    "cautious": "decoupled: ηλθ is taken off where the step draws the weight in, too",
    "corrected": "decoupled: ηλθ·η/η_max is taken off beside the step",
    "proximal": "decoupled: û is divided by 1 + ηλ after the step",
    "scaled": "decoupled: a multiple of ηλθ is taken off beside the step",
    "other": "no closed rule",
}


def _alike(tensors: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Tensors of one rule, one strength and one number of dimensions together."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for tensor in tensors:
        kind = (tensor["rule"], len(tensor["shape"]), tensor["expected"])
        found.setdefault(kind, []).append(tensor)
    return list(found.values())


def _span(numbers: list[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least}–{most}"


def _show_survey(result: dict[str, Any]) -> None:
    """The result of `wdprobe audit --all` for a person."""
    rows = result["optimizers"]
    audited = [row for row in rows if not row["error"]]
    out.print(
        f"{len(audited)} of {counted(len(rows), 'optimizer')} audited · η {result['lr']:g} · "
        f"λ {result['weight_decay']:g}"
    )
    table = plain_table()
    table.add_column("optimizer", no_wrap=True)
    table.add_column("rule")
    table.add_column("× ηλ", justify="right", no_wrap=True)
    table.add_column("remarks")
    for row in audited:
        table.add_row(
            escape(row["name"]), row["rule"], row["multiple"] or "–",
            escape("; ".join(row["remarks"])),
        )  # fmt: skip
    out.print(table)
    if len(audited) < len(rows):
        out.print("\n[bold]Not audited here[/]")
    for row in rows:
        if row["error"]:
            out.print(f"{escape(row['name'])}: {escape(row['error'])}", soft_wrap=True)
