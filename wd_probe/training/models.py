"""timm models, by name, with weights from nowhere, a hub or a file."""

import argparse
import contextlib
import math
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..arguments import check_rate
from ..choices import Scale
from ..errors import (
    InputError,
    RunError,
    WdProbeWarning,
    counted,
    first_line,
    near_names,
    printable,
    shown,
    shown_line,
)
from ..layering import decayed_parameters, layers, layerwise_rates
from ..probe.dynamics import remaining, timescale
from ..wording import decimal


def create_model(
    name: str,
    *,
    num_classes: int,
    img_size: int,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    reset_head: bool = False,
    check_size: bool = True,
) -> nn.Module:
    """A timm model for square images of ``img_size``, on the CPU.

    Args:
        name: a timm name, or ``hf-hub:...`` / ``local-dir:...`` as timm takes them.
        num_classes: outputs of the head.
        img_size: given to models that are built for one size (ViT, Swin, ...).
        pretrained: take timm's pretrained weights from the hub.
        checkpoint: take the weights of this safetensors or torch file, or of such a file in this
            folder; half precision is widened.
        reset_head: leave the classifier untrained where the checkpoint's has another shape or is
            missing; a warning says so.
        check_size: try one image, so that a model that cannot take the size is found out here.

    Raises:
        InputError: an unknown name, no pretrained weights, a file that cannot be read or does not
            fit, a model that cannot take such images.
        RunError: the hub cannot be reached.
    """
    told = shown_line(name, 80)
    if pretrained and checkpoint is not None:
        raise InputError("--pretrained and --checkpoint exclude each other")
    if ":" not in name and not timm.is_model(name):
        raise InputError(f"unknown model {shown(name)}{_near(name)}")
    try:
        if checkpoint is not None:  # what does not fit is found before memory is taken for it
            drawn = _weightless(lambda: _build(name, num_classes, img_size, False))
            state, reset = _fitting(drawn, checkpoint, reset_head)
        model = _build(name, num_classes, img_size, pretrained)
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:
        if "pretrained" in str(error).lower() and "tag" in str(error).lower():
            raise InputError(f"{told}: {first_line(error)}") from error
        if pretrained or ":" in name:
            raise RunError(
                f"the weights of {told} could not be fetched from the hub ({first_line(error)}); "
                "use --checkpoint with a local file, or leave --pretrained out"
            ) from error
        raise InputError(f"timm cannot build {told}: {first_line(error)}") from error
    if pretrained and not (getattr(model, "pretrained_cfg", None) or {}).get("architecture"):
        raise InputError(f"timm has no pretrained weights for {told}; leave --pretrained out")
    if checkpoint is not None:
        model.load_state_dict(state, strict=not reset)
        if reset:
            warnings.warn(
                f"the head {', '.join(reset)} starts anew: that of {checkpoint} does not fit "
                f"{counted(num_classes, 'class', 'classes')}",
                WdProbeWarning,
                stacklevel=2,
            )
    if check_size:
        _check_size(model, name, img_size)
    return model


def _weightless(build: Callable[[], nn.Module]) -> nn.Module:
    """On torch's meta device; on the CPU where an older timm reads numbers as it builds."""
    try:
        with torch.device("meta"):
            return build()
    except Exception:  # any other fault shows again
        return build()


def _build(name: str, num_classes: int, img_size: int, pretrained: bool) -> nn.Module:
    options: dict[str, Any] = {"num_classes": num_classes, "pretrained": pretrained}
    try:
        model: nn.Module = timm.create_model(name, img_size=img_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = timm.create_model(name, **options)
    return model


def _check_size(model: nn.Module, name: str, img_size: int) -> None:
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, img_size, img_size))
    except Exception as error:
        own = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 224, 224))
        raise InputError(
            f"{name} cannot take {img_size}×{img_size} images ({first_line(error)}); "
            f"try --img-size {own[-1]}"
        ) from error
    finally:
        model.train(was_training)


def _near(name: str) -> str:
    return near_names(name, timm.list_models()) or "; `timm.list_models()` names them all"


def _fitting(model: nn.Module, path: Path, reset_head: bool) -> tuple[dict[str, Tensor], list[str]]:
    """A checkpoint's tensors under the model's names, and the heads among them that are reset.

    Prefixes of DDP, `torch.compile` and Lightning are taken off; an older layout of the keys, and
    position tables of another image size, go through timm's own filter for the model.
    """
    state, own = under_names_of(model, read_weights(path)[0]), model.state_dict()
    fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if fit is not None and (set(state) != set(own) or _differing(state, own)):
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # and what it cannot convert is named below
            state = dict(fit(dict(state), model))
    reset = [name for name in classifiers(model) if reset_head and not _fits(state, own, name)]
    for key in {key for key in (*state, *own) if key.rpartition(".")[0] in reset}:
        state.pop(key, None)
        own.pop(key, None)
    differing = _differing(state, own)
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    shapes = [
        f"{key} is {tuple(state[key].shape)} there and {tuple(own[key].shape)} here"
        for key in differing
    ]
    complaints = [
        *([f"{len(missing)} missing ({_some(missing)})"] if missing else []),
        *([f"{len(unexpected)} unexpected ({_some(unexpected)})"] if unexpected else []),
        *([f"{len(shapes)} of another shape ({_some(shapes)})"] if shapes else []),
    ]
    if complaints:
        told = printable("; ".join(complaints))
        raise InputError(f"checkpoint {path} is of another model: tensors {told}")
    return state, reset


def _differing(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    return [key for key in own if key in state and state[key].shape != own[key].shape]


def _fits(state: Mapping[str, Tensor], own: Mapping[str, Tensor], module: str) -> bool:
    """Whether a module of the model is in the state as it is."""
    named = [key for key in own if key.rpartition(".")[0] == module]
    return all(key in state and state[key].shape == own[key].shape for key in named)


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that make the classes, as timm knows them."""
    names = (getattr(model, "default_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _some(items: list[str]) -> str:
    return ", ".join(shown_line(item, 120) for item in items[:3]) + (
        ", ..." if len(items) > 3 else ""
    )


def read_weights(path: Path) -> tuple[Mapping[str, Tensor], str]:
    """The tensors of a safetensors or torch checkpoint by name, and which entry they are.

    Pickles are read with ``weights_only=True``: a file with code in it is refused, not run. Where
    a training checkpoint keeps averaged weights beside the others, the averaged ones are taken, as
    timm does.

    Raises:
        InputError: the file is missing, damaged, holds code or holds no weights.
    """
    if path.is_dir():
        inside = [path / "model.safetensors", path / "pytorch_model.bin"]
        path = next((file for file in inside if file.is_file()), inside[0])
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        if _is_safetensors(path):
            held: Any = load_file(path)
        else:
            # timm's own checkpoints keep the training options beside the weights
            with torch.serialization.safe_globals([argparse.Namespace]):
                held = load_torch(path)
    except InputError:
        raise
    except Exception as error:
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise InputError(
                f"checkpoint {path} holds more than weights and is refused, since reading it could "
                "run code; save its state_dict as safetensors"
            ) from error
        raise InputError(
            f"checkpoint {path} is damaged or no checkpoint ({first_line(error)})"
        ) from error
    entry = ""
    if isinstance(held, Mapping):
        entries = ("state_dict_ema", "model_ema", "state_dict", "model")
        found = (key for key in entries if isinstance(held.get(key), Mapping))
        entry = next((key for key in found if held[key]), "")
    state = held[entry] if entry else held
    tensors = isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors or not state or not all(isinstance(key, str) for key in state):
        raise InputError(f"checkpoint {path} holds no state_dict of tensors")
    for key, value in state.items():
        if not is_plain(value):
            raise InputError(
                f"checkpoint {path} holds no plain numbers in {shown_line(key)}; save its "
                "state_dict as safetensors"
            )
    return state, entry


def _is_safetensors(path: Path) -> bool:
    """Whether a file is one, whatever it is called: a length, and that much JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return (start[8:] == b"{" and length < path.stat().st_size) or path.suffix == ".safetensors"


def under_names_of(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state without the prefix that what held the model (DDP, Lightning, an EMA) has put before.

    The prefix is the one that gives the most names of the model; what does not have it belongs to
    whatever held the model (a loss, a counter), and is left out.
    """
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    own = set(model.state_dict())
    last = {name.rpartition(".")[2] for name in own}
    found: Counter[str] = Counter()
    for name in state:
        if name.rpartition(".")[2] in last:
            parts = name.split(".")
            tails = ((k, ".".join(parts[k:])) for k in range(len(parts)))
            found.update(".".join(parts[:k]) for k, tail in tails if tail in own)
    prefix, count = found.most_common(1)[0] if found else ("", 0)
    if not prefix or found[""] == count:
        return state
    return {
        name.removeprefix(f"{prefix}."): value
        for name, value in state.items()
        if name.startswith(f"{prefix}.")
    }


def load_torch(path: Path) -> Any:
    """A torch file, read onto the CPU without running code or unfolding what is packed in it.

    Raises:
        InputError: it is compressed, which `torch.save` never does.
        Exception: whatever torch raises over a file it cannot read.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise InputError(f"{path} is compressed, which torch.save never does")
    return torch.load(path, map_location="cpu", weights_only=True)


def is_plain(tensor: Tensor) -> bool:
    """Real numbers that a file holds one by one: none expanded, sparse or without storage."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    held = tensor.untyped_storage().nbytes()
    return not tensor.is_complex() and tensor.numel() * tensor.element_size() <= held


def describe_layers(
    name: str,
    *,
    img_size: int,
    weight_decay: float,
    scale: Scale,
    filter_bias_and_bn: bool,
    lr: float | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """What `wdprobe layers` prints; the model is built without memory for its weights.

    Args:
        name: of a timm model.
        img_size: side of its images.
        weight_decay: λ.
        scale: of the layers' rates.
        filter_bias_and_bn: whether biases and norms are spared.
        lr: η, by which each layer's timescale is told.
        steps: of a run, after which it is told how much is left.

    Raises:
        InputError: an unknown model, a rate that is negative or not finite; steps without ``lr``.
    """
    check_rate(weight_decay, "--weight-decay")
    if steps is not None and lr is None:
        raise InputError("--steps needs --lr: a step takes ηλ off")
    model = _weightless(
        lambda: create_model(name, num_classes=1000, img_size=img_size, check_size=False)
    )
    found = layers(model)
    rates = layerwise_rates(len(found), weight_decay, scale)
    decayed = set(decayed_parameters(model, filter_bias_and_bn=filter_bias_and_bn))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    eta = math.nan if lr is None else lr
    taken = [
        eta * rate if decayed.intersection(layer.parameters) else 0.0
        for layer, rate in zip(found, rates, strict=True)
    ]
    return {
        "command": "layers",
        "model": name,
        "definition": found.definition,
        "classes": getattr(model, "num_classes", 1000),
        "weights": sum(sizes.values()),
        "weight_decay": weight_decay,
        "scale": scale,
        "mean_rate": decimal(sum(rates) / len(rates)),
        "lr": lr,
        "steps": steps,
        "layers": [
            {
                "index": layer.index,
                "name": layer.name,
                "tensors": len(layer.parameters),
                "weights": sum(sizes[name] for name in layer.parameters),
                "rate": decimal(rate),
                "parameters": layer.parameters,
                "decayed": [name for name in layer.parameters if name in decayed],
                "timescale_steps": timescale(c),
                "remaining": None if steps is None else remaining(c, steps),
            }
            for layer, rate, c in zip(found, rates, taken, strict=True)
        ],
    }
