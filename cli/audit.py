"""`wdprobe audit`."""

from dataclasses import asdict
from typing import Annotated

import typer

from . import options as o

_LR, _WEIGHT_DECAY = 0.1, 0.01


def audit(
    opt: Annotated[
        str | None,
        typer.Option(
            help="A timm optimizer, or the dotted path of a class: torch.optim.SGD.",
            show_default=False,
        ),
    ] = None,
    every_one: Annotated[
        bool, typer.Option("--all", help="Every optimizer that timm and torch.optim know.")
    ] = False,
    opt_kwargs: Annotated[
        list[str] | None,
        typer.Option(help="key=value for the optimizer; repeatable.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A timm model (default: a convolution, a norm, a linear layer).",
            show_default=False,
        ),
    ] = None,
    img_size: o.ImgSize = 32,
    lr: Annotated[float, typer.Option(help="Learning rate η.")] = _LR,
    weight_decay: o.WeightDecay = _WEIGHT_DECAY,
    filter_bias_and_bn: o.FilterBiasAndBn = False,
    layer_decay: Annotated[
        float | None, typer.Option(help="timm's layer-wise lr_scale.", show_default=False)
    ] = None,
    json: o.Json = False,
) -> None:
    """Find by effect which decay rule an optimizer runs, on which tensors, and by how much."""
    from wd_probe.errors import InputError

    from . import console

    if (opt is None) != every_one:
        raise InputError("give either --opt NAME or --all")
    console.show_warnings()
    with console.loading():
        from wd_probe.runs.folder import dumps
        from wd_probe.training import optimizers
    if opt is None:
        rows = []
        names = optimizers.known_optimizers()
        with console.ScanProgress() as progress:
            for row in optimizers.survey(names, lr=lr, weight_decay=weight_decay):
                rows.append(asdict(row))
                progress.progress("audit", len(rows), len(names), row.name)
        result = {"command": "audit", "lr": lr, "weight_decay": weight_decay, "optimizers": rows}
    else:
        result = optimizers.audit_by_name(
            opt,
            model_name=model,
            img_size=img_size,
            lr=lr,
            weight_decay=weight_decay,
            options=opt_kwargs or (),
            filter_bias_and_bn=filter_bias_and_bn,
            layer_decay=layer_decay,
        )
    if json:
        console.to_stdout(dumps(result))
    elif opt is None:
        console.survey_table(result)
    else:
        console.audit_report(result)
