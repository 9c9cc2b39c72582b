"""Feature distortion: how far decay bends a layer's output, beyond making it smaller (Eq. 5, 6)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_finite, check_type
from ..errors import InputError
from ..layering import Layers, layers_or, unwrap
from .scan import Shrunk


@dataclass(frozen=True, slots=True)
class LayerDistortion:
    """What decay to one scale does to one layer's output.

    Attributes:
        index: the layer, 1 to n.
        name: its name.
        scale: what every weight of the model was multiplied by.
        distortion: 1 − cos² between decayed and undecayed output over all images: 0 where the one
            is a multiple of the other, NaN where an output is zero.
        norm_ratio: size of the decayed output over that of the undecayed one.
    """

    index: int
    name: str
    scale: float
    distortion: float
    norm_ratio: float


def feature_distortion(
    model: nn.Module,
    batches: Iterable[Tensor],
    scales: Sequence[float],
    *,
    groups: Layers | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> tuple[LayerDistortion, ...]:
    """Measure every layer's distortion when all weights are scaled (section 2.2, theory fact 19).

    Forward hooks compare each layer's output with what it was without decay, on the same images;
    one forward pass a batch and scale, and one without decay. Hooks and weights are as before when
    this returns or raises.

    Args:
        model: a trained model, wrapped by `torch.compile` or DDP too (its inside is run).
        batches: batches of images, as the model takes them.
        scales: what to multiply the weights by.
        groups: the model's layers, if not ``wd_probe.layers(model)``.
        total: adds a tensor up over the processes, where each has other images.

    Returns:
        For every scale, every layer that has an output, shallow to deep.

    Raises:
        InputError: no scales, one that is not finite, or no images.
    """
    check_type(model, "model", nn.Module, "a torch.nn.Module")
    check_type(batches, "batches", Iterable, "an iterable of batches of images")
    check_type(scales, "scales", Sequence, "a list of numbers")
    if not scales:
        raise InputError("scales is empty: feature_distortion needs at least one scale")
    for scale in scales:
        check_finite(scale, "each of scales")
    model = unwrap(model)
    groups = layers_or(groups, model)
    # (scale, layer): Σab, Σaa, Σbb in float64
    sums = torch.zeros(len(scales), len(groups), 3, dtype=torch.float64, device="cpu")
    owners = _owners(model, groups)
    seen = False
    with Shrunk(model) as shrunk, torch.no_grad():
        for images in batches:
            shrunk.to(1)
            undecayed = _outputs(model, images, owners, lambda _, output: output.clone())
            if not seen:  # the last module of each layer to finish speaks for it
                owners = {name: owners[name] for name in _last_of_each(undecayed, owners)}
                seen = True
            for number, scale in enumerate(scales):
                shrunk.to(scale)
                products = _outputs(
                    model,
                    images,
                    owners,
                    lambda name, b: _products(undecayed[name], b),  # noqa: B023
                )
                for name, product in products.items():
                    sums[number, owners[name]] += product
    if not seen:
        raise InputError("batches is empty: feature_distortion was given no images")
    sums = sums if total is None else total(sums)
    return tuple(
        LayerDistortion(layer.index, layer.name, scale, *_read(*sums[number, k].tolist()))
        for number, scale in enumerate(scales)
        for k, layer in enumerate(groups)
        if sums[number, k, 1] > 0
    )


def _products(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten().double(), b.flatten().double()
    return torch.stack([a @ b, a @ a, b @ b]).cpu()


def _read(ab: float, aa: float, bb: float) -> tuple[float, float]:
    cosine2 = ab * ab / (aa * bb) if aa * bb > 0 else math.nan
    return (cosine2 if math.isnan(cosine2) else max(0.0, 1 - cosine2)), math.sqrt(bb / aa)


def _owners(model: nn.Module, groups: Layers) -> dict[str, int]:
    """The largest modules that hold one layer's parameters and no other's, with its number."""
    owner: dict[str, int | None] = {}
    for number, layer in enumerate(groups):
        for name in layer.parameters:
            parts = name.split(".")[:-1]
            for length in range(len(parts) + 1):
                prefix = ".".join(parts[:length])
                owner[prefix] = number if owner.get(prefix, number) == number else None
    return {
        name: number
        for name, number in owner.items()
        if number is not None and (not name or owner[name.rpartition(".")[0]] is None)
    }


def _last_of_each(finished: Iterable[str], owners: dict[str, int]) -> Iterable[str]:
    return {owners[name]: name for name in finished}.values()


def _outputs(
    model: nn.Module,
    images: Tensor,
    owners: dict[str, int],
    see: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """``see`` of the named modules' outputs in one pass, in the order they finish."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                seen.pop(name, None)
                seen[name] = see(name, output)

        return keep

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if name in owners
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen
