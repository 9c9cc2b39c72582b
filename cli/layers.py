"""`wdprobe layers`."""

import math
from typing import Annotated, Any

from rich.markup import escape

from wd_probe.choices import Scale
from wd_probe.errors import counted
from wd_probe.tables import plain_table
from wd_probe.training.option import AT_LEAST_1, POSITIVE, Option
from wd_probe.training.options import SCALE_HELP, FilterBiasAndBn, ImgSize, ModelName, WeightDecay
from wd_probe.wording import percent

from . import options as o
from .console import out, to_stdout


@o.command("model")
def layers(
    model: ModelName = "convnext_tiny",
    img_size: ImgSize = 32,
    weight_decay: WeightDecay = 0.01,
    scale: Annotated[Scale, Option(SCALE_HELP)] = "max2",
    lr: Annotated[
        float | None,
        Option("Learning rate η; tells the layers' timescales 1/(ηλᵢ).", must=POSITIVE),
    ] = None,
    steps: Annotated[
        int | None, Option("Of a run; tells what --lr and λᵢ take off in it.", must=AT_LEAST_1)
    ] = None,
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
        lr=lr,
        steps=steps,
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
    if result["lr"] is not None:
        out.print(_of_one_rate(result["lr"], result["weight_decay"], result["steps"]))
    timed = [
        title
        for title, key in (("1/(ηλᵢ)", "lr"), ("taken off", "steps"))
        if result[key] is not None
    ]
    table = plain_table()
    table.add_column("i", justify="right", no_wrap=True)
    name_width = max(16, out.width // 3 - 5 * len(timed))
    table.add_column("layer", overflow="ellipsis", no_wrap=True, max_width=name_width)
    for title in ("tensors", "weights", "λᵢ", *timed):
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    # What is left beside the columns before it, so that rich drops none of them.
    left = max(10, out.width - name_width - 38 - 13 * len(timed))
    title = "decaying tensors" if left >= 16 else "decaying"
    table.add_column(title, overflow="ellipsis", no_wrap=True, max_width=left)
    for layer in result["layers"]:
        decaying, count = layer["decayed"], layer["tensors"]
        shown = "all" if len(decaying) == count else f"{len(decaying)} of {count}"
        named = "" if len(decaying) in (0, count) or left < 16 else ": " + ", ".join(_tails(layer))
        table.add_row(
            str(layer["index"]),
            escape(layer["name"]),
            str(count),
            f"{layer['weights']:,}",
            f"{layer['rate']:.3g}",
            *(_timed(layer)[: len(timed)]),
            escape(("none" if not decaying else shown) + named),
        )
    out.print(table)


def _of_one_rate(lr: float, rate: float, steps: int | None) -> str:
    """What decay comes to that is the same for all layers, as an optimizer's own."""
    from wd_probe.probe.dynamics import remaining, timescale

    told = (
        f"η {lr:g} · with λ for every layer alike, 1/(ηλ) is {_rough(timescale(lr * rate))} steps"
    )
    if steps is None:
        return told
    off = percent(1 - remaining(lr * rate, steps))
    return f"{told}: {counted(steps, 'step')} would take {off} off"


def _timed(layer: dict[str, Any]) -> tuple[str, str]:
    left = layer["remaining"]
    return _rough(layer["timescale_steps"]), percent(None if left is None else 1 - left)


def _rough(steps: float) -> str:
    return f"{float(f'{steps:.3g}'):,.15g}" if math.isfinite(steps) else "∞"


def _tails(layer: dict[str, Any]) -> list[str]:
    """The decaying tensors' names without what they share."""
    parts = [name.split(".") for name in layer["decayed"]]
    shared = 0
    while len(parts) > 1 and len({tuple(p[: shared + 1]) for p in parts}) == 1:
        shared += 1
    return [".".join(p[shared:] or p[-1:]) for p in parts]
