"""`wdprobe audit`."""

from dataclasses import asdict
from typing import Annotated, Any

from rich.markup import escape

from wd_probe.errors import InputError, counted
from wd_probe.tables import plain_table
from wd_probe.training.option import AT_LEAST_1, POSITIVE, Option
from wd_probe.training.options import FilterBiasAndBn, ImgSize, WeightDecay

from . import options as o
from .console import loading, out, to_stdout


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
    from wd_probe.decay.audit_tables import audit_told

    out.print(
        f"[bold]{escape(result['optimizer'])}[/] ({escape(result['name'])}) on "
        f"{escape(result['model'])} · η {result['lr']:g} · λ {result['weight_decay']:g}"
    )
    out.print(audit_told(result["rule"], result["tensors"], result["warnings"]))


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
