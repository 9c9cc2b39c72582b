"""`wdprobe layers`."""

from typing import Annotated, Any

from rich.markup import escape

from wd_probe.choices import Scale
from wd_probe.errors import counted
from wd_probe.training.options import (
    SCALE_HELP,
    FilterBiasAndBn,
    ImgSize,
    ModelName,
    Option,
    WeightDecay,
)

from . import options as o
from .console import out, plain_table, to_stdout


@o.command()
def layers(
    model: ModelName = "convnext_tiny",
    img_size: ImgSize = 32,
    weight_decay: WeightDecay = 0.01,
    scale: Annotated[Scale, Option(SCALE_HELP)] = "max2",
    filter_bias_and_bn: FilterBiasAndBn = False,
    json: o.Json = False,
) -> None:
    """List a model's layers, shallow to deep, with their rates (Eq. 9) and what decays in them."""
    from wd_probe.training.models import describe_layers

    result = describe_layers(
        model,
        img_size=img_size,
        weight_decay=weight_decay,
        scale=scale,
        filter_bias_and_bn=filter_bias_and_bn,
    )
    if json:
        to_stdout(result)
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    """The result of `wdprobe layers` for a person."""
    out.print(
        f"[bold]{escape(result['model'])}[/] · n = {counted(len(result['layers']), 'layer')} "
        f"({result['definition']}) · {counted(result['weights'], 'weight')} with "
        f"{counted(result['classes'], 'class', 'classes')} · λ {result['weight_decay']:g}, "
        f"scale {result['scale']}, mean λᵢ {result['mean_rate']:.4g}"
    )
    table = plain_table()
    table.add_column("i", justify="right", no_wrap=True)
    table.add_column("layer", overflow="ellipsis", no_wrap=True, max_width=max(20, out.width // 3))
    for title in ("tensors", "weights", "λᵢ"):
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    # What is left beside the five columns before it, so that rich drops none of them.
    left = max(16, out.width - out.width // 3 - 40)
    table.add_column("decaying tensors", overflow="ellipsis", no_wrap=True, max_width=left)
    for layer in result["layers"]:
        decaying, count = layer["decayed"], layer["tensors"]
        shown = "all" if len(decaying) == count else f"{len(decaying)} of {count}"
        named = "" if len(decaying) in (0, count) else ": " + ", ".join(_tails(layer))
        table.add_row(
            str(layer["index"]),
            escape(layer["name"]),
            str(count),
            f"{layer['weights']:,}",
            f"{layer['rate']:.3g}",
            escape(("none" if not decaying else shown) + named),
        )
    out.print(table)


def _tails(layer: dict[str, Any]) -> list[str]:
    """The decaying tensors' names without what they share."""
    parts = [name.split(".") for name in layer["decayed"]]
    shared = 0
    while len(parts) > 1 and len({tuple(p[: shared + 1]) for p in parts}) == 1:
        shared += 1
    return [".".join(p[shared:] or p[-1:]) for p in parts]
