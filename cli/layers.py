"""`wdprobe layers`."""

from . import options as o


def layers(
    model: o.Model = "convnext_tiny",
    img_size: o.ImgSize = 32,
    weight_decay: o.WeightDecay = 0.01,
    scale: o.ScaleOption = o.Scale.max2,
    filter_bias_and_bn: o.FilterBiasAndBn = False,
    json: o.Json = False,
) -> None:
    """List a model's layers, shallow to deep, with their rates (Eq. 9) and what decays in them."""
    from . import console

    console.show_warnings()
    from wd_probe.runs.folder import dumps
    from wd_probe.training.models import describe_layers

    result = describe_layers(
        model,
        img_size=img_size,
        weight_decay=weight_decay,
        scale=scale.value,
        filter_bias_and_bn=filter_bias_and_bn,
    )
    if json:
        console.to_stdout(dumps(result))
    else:
        console.layers_table(result)
