"""What decides a training run: the options of `wdprobe train` and `wdprobe rop`."""

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..decay.methods import METHODS, Convention
from ..errors import InputError
from ..layering import Scale

#: What does not change a run's result, or only where it lies.
ELSEWHERE = ("output", "device", "data_dir", "dataset_download", "recovery_interval")
#: The learning rates of the paper's base settings (Table 2).
_SGD_LIKE = ("sgd", "momentum", "sgdp", "nesterov")


def autocast_dtype(amp: bool, name: str) -> torch.dtype | None:
    """What ``--amp`` and ``--amp-dtype`` compute in; None for full precision.

    Raises:
        InputError: a type that autocast is not made for.
    """
    if name not in ("bfloat16", "float16"):
        raise InputError(f"--amp-dtype must be bfloat16 or float16, got {name!r}")
    return getattr(torch, name) if amp else None


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["betas=(0.9, 0.95)", "nesterov=True"]`` as keyword arguments.

    Raises:
        InputError: one that is not ``key=value``.
    """
    parsed = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--opt-kwargs wants key=value, got {pair!r}")
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            parsed[key] = value
    return parsed


def keywords(pairs: Sequence[str]) -> str:
    """The same as one text, which ``parse_options(text.split())`` reads."""
    parsed = parse_options(pairs).items()
    return " ".join(f"{key}={value!r}".replace(" ", "") for key, value in parsed)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Everything that decides a run; the command line's options by the same names.

    ``method`` is "own" for the optimizer's own ``weight_decay``, else a method of
    :class:`wd_probe.WeightDecay`. ``lr`` None takes the paper's base rate: 0.01 for SGD, else
    0.0001. ``opt_kwargs`` are more of the optimizer's own: ``"fused=True betas=(0.9,0.95)"``.
    ``steps`` None trains ``epochs`` whole epochs. ``every`` 0 measures nothing.
    """

    command: str = "train"
    model: str = "convnext_tiny"
    pretrained: bool = False
    checkpoint: Path | None = None
    img_size: int = 32
    dataset: str = "digits"
    data_dir: Path | None = None
    dataset_download: bool = False
    hflip: float | None = None
    val_split: float = 0.0
    train_samples: int | None = None
    opt: str = "adamw"
    opt_kwargs: str = ""
    lr: float | None = None
    weight_decay: float = 0.01
    momentum: float = 0.9
    method: str = "own"
    scale: Scale | None = None
    convention: Convention = "lr*rate"
    filter_bias_and_bn: bool = False
    batch_size: int = 64
    epochs: int = 4
    steps: int | None = None
    every: int = 0
    both_moments: bool = False
    seed: int = 0
    device: str = "auto"
    amp: bool = False
    amp_dtype: str = "bfloat16"
    channels_last: bool = False
    torchcompile: bool = False
    output: Path | None = None
    recovery_interval: int | None = None

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "epochs": 1, "steps": 1, "img_size": 1, "train_samples": 1,
                 "recovery_interval": 0}  # fmt: skip
        for name, smallest in (least | {"every": 0 if self.command == "train" else 1}).items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(f"{_flag(name)} must be at least {smallest}, got {value}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"--lr must be a finite number > 0, got {self.lr}")
        for name in ("weight_decay", "momentum"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{_flag(name)} must be a finite number ≥ 0, got {value}")
        if self.hflip is not None and not 0 <= self.hflip <= 1:
            raise InputError(f"--hflip must be a probability, got {self.hflip}")
        if not 0 <= self.val_split < 1:
            raise InputError(f"--val-split must be a share below 1, got {self.val_split}")
        autocast_dtype(self.amp, self.amp_dtype)
        parse_options(self.opt_kwargs.split())
        self._check_method()

    def _check_method(self) -> None:
        if self.method not in ("own", *METHODS):
            known = ", ".join(("own", *METHODS))
            raise InputError(f"unknown method {self.method!r}; choose from {known}")
        if self.command == "rop" and (self.weight_decay == 0 or self.method == "baseline"):
            raise InputError(
                "nothing would be penalized, so R_op is undefined; give --weight-decay above 0 "
                "and a method that decays"
            )
        if self.method == "own" and (self.convention == "rate" or self.scale is not None):
            raise InputError(
                "an optimizer's own weight_decay takes off lr*rate, the same from every layer; "
                "--convention rate and --scale need a --method"
            )
        taken = self.weight_decay * (1 if self.convention == "rate" else self.learning_rate)
        if taken >= 1 and self.method not in ("baseline", "l1", "l2"):
            raise InputError(
                f"a step would take off {taken:g} times the weight (--weight-decay "
                f"{self.weight_decay:g}, --lr {self.learning_rate:g}); it must be less than 1"
            )

    @property
    def learning_rate(self) -> float:
        """``lr``, or the paper's base rate for this optimizer."""
        return self.lr or (0.01 if self.opt in _SGD_LIKE else 1e-4)

    def hparams(self) -> dict[str, Any]:
        """What TensorBoard's HParams tab compares runs by."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "opt": self.opt,
            "method": self.method,
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
