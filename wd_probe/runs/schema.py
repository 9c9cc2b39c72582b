"""What the files of a run hold: the keys and columns that readers rest on, and of what kind.

Files are written by other versions and by hand: a key may be absent or null, and one that is not
here is kept as it is.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from ..errors import shown

#: Beyond these a figure's axes and numpy's integers overflow.
LARGEST, LARGEST_WHOLE = 1e300, 2**63 - 1


def _number(value: object) -> object:
    if isinstance(value, float) and abs(value) <= LARGEST:
        return value
    if type(value) is int and abs(value) <= LARGEST_WHOLE:
        return value
    raise PydanticCustomError("number_type", "a number")


def _forget(item: object) -> None:
    """Keep no checked item: as models, those of one file may take gigabytes."""


T = TypeVar("T")
Text = str | None
Whole = Annotated[int, Field(ge=-LARGEST_WHOLE, le=LARGEST_WHOLE)] | None
Number = Annotated[float, PlainValidator(_number)] | None
Items = Annotated[list[Annotated[T, AfterValidator(_forget)]], Field(fail_fast=True)] | None
_WORDS = {
    "string_type": "a text", "number_type": "a number", "dict_type": "an object",
    "model_type": "an object", "list_type": "a list",
}  # fmt: skip


class Contents(BaseModel):
    """The known keys of an object in a file."""

    model_config = ConfigDict(strict=True)

    @classmethod
    def fault(cls, value: Any) -> str | None:
        """What is wrong with an object, in one line; None if nothing is."""
        try:
            cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        else:
            return None
        where = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in first["loc"])[1:]
        if first["input"] is None:
            return f"{where} is null"
        kind = _WORDS.get(first["type"], "a whole number")
        return f"{where} must be {kind}, got {shown(first['input'])}"


class _Named(Contents):
    index: Whole = None
    name: Text = None


#: The ``command`` of runs that other code trains: a script that is watched, a loop of one's own.
OTHERS = ("watch", "loop")


class RunConfig(Contents):
    """``config.json``."""

    command: Text = None
    command_line: Text = None
    model: Text = None
    dataset: Text = None
    source: Text = None
    data_dir: Text = None
    opt: Text = None
    method: Text = None
    opt_kwargs: Text = None
    scale: Text = None
    convention: Text = None
    by: Text = None
    layer_definition: Text = None
    checkpoint: Text = None
    batch_size: Whole = None
    img_size: Whole = None
    num_classes: Whole = None
    seed: Whole = None
    epochs: Whole = None
    steps: Whole = None
    weights: Whole = None
    train_size: Whole = None
    validation_size: Whole = None
    test_size: Whole = None
    lr: Number = None
    weight_decay: Number = None
    momentum: Number = None
    val_split: Number = None
    hflip: Number = None
    layers: Items[_Named] = None
    parts: Items[str] = None
    versions: dict[str, Any] | None = None


class _Statistics(Contents):
    mean: Number = None
    max: Number = None
    last: Number = None
    late: Number = None


class _Best(Contents):
    mean: Number = None
    std: Number = None
    epochs: Whole = None


class _Chosen(Contents):
    epoch: Whole = None
    val_top1: Number = None
    top1: Number = None


class _Layer(_Named):
    rate: Number = None
    mass: Number = None
    flip_rate: Number = None
    norm: Number = None
    balance: Number = None
    angular_update: Number = None
    remaining: Number = None
    state: Text = None


class _Dynamics(Contents):
    state: Text = None
    remaining: Number = None
    timescale_steps: Number = None
    timescale_epochs: Number = None
    momentum: Number = None
    balance: _Statistics | None = None
    angular_update: _Statistics | None = None
    relative_update: _Statistics | None = None


class _BatchNorm(Contents):
    images: Whole = None
    running: Number = None
    updated: Number = None
    variance: Number = None


class _Point(Contents):
    step: Whole = None
    scale: Number = None
    top1: Number = None
    loss: Number = None
    agreement: Number = None
    kl: Number = None


class _Part(Contents):
    name: Text = None
    half_life: Number = None
    weights: Whole = None


class _Distortion(_Named):
    scale: Number = None
    distortion: Number = None
    norm_ratio: Number = None


class RunSummary(Contents):
    """``summary.json``."""

    command: Text = None
    status: Text = None
    model: Text = None
    method: Text = None
    metric: Text = None
    error: Text = None
    run: Text = None
    steps: Whole = None
    epochs: Whole = None
    images: Whole = None
    classes: Whole = None
    seed: Whole = None
    lr: Number = None
    weight_decay: Number = None
    half_life: Number = None
    seconds: Number = None
    train_loss: Number = None
    top1: Number = None
    loss: Number = None
    other_top1: Number = None
    val_top1: Number = None
    batch_norm: _BatchNorm | None = None
    batch_norms: Whole = None
    update_bn: bool | None = None
    rate: _Statistics | None = None
    mass: _Statistics | None = None
    flip_rate: _Statistics | None = None
    literal_rate: _Statistics | None = None
    best10: _Best | None = None
    chosen: _Chosen | None = None
    dynamics: _Dynamics | None = None
    verdict: Items[str] = None
    findings: Items[str] = None
    layers: Items[_Layer] = None
    curve: Items[_Point] = None
    parts: Items[_Part] = None
    distortion: Items[_Distortion] = None


#: The tables and the columns that each has at least.
TABLES: Mapping[str, tuple[str, ...]] = {
    "steps": ("step",),
    "epochs": ("epoch", "train_loss", "top1"),
    "layers": ("step", "index", "rate"),
    "profile": ("step", "rate", "opposing", "penalized"),
    "curve": ("step", "scale", "top1", "agreement"),
    "parts": ("index", "scale", "top1", "agreement"),
    "distortion": ("index", "scale", "distortion"),
}
