"""Options in files: one's own in YAML or TOML, a run's ``config.json``, timm's ``args.yaml``."""

import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..runs.reading import JSON_BYTES, damaged, read_text
from .option import options_in
from .options import TrainOptions
from .recipe_options import NEEDS

_BYTES, _DEPTH = 16 << 10, 3
#: Of a run that is over: another lies elsewhere, and on what there is.
_PLACES = ("output", "device")


def parsed(path: Path) -> dict[str, Any]:
    """The keys and values of a TOML, YAML or JSON file, by its name's ending.

    Raises:
        InputError: it is none of them, cannot be read, or holds something else.
    """
    kind = path.suffix.lower()
    if kind not in (".toml", ".yaml", ".yml", ".json"):
        raise InputError(f"{path} must end in .toml, .yaml, .yml or .json")
    try:
        text = read_text(path, JSON_BYTES if kind == ".json" else _BYTES)
        if kind == ".toml":
            found = tomllib.loads(text)
        else:
            found = json.loads(text) if kind == ".json" else _yaml(text)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{path} must hold keys and values, such as: method: lpwd")
    return found


def _yaml(text: str) -> Any:
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):  # as far as it is sound, and no further
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _DEPTH:
                raise ValueError("it uses an alias (*name) or lists within lists within lists")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True, slots=True)
class OptionFile:
    """What a file asks for.

    Attributes:
        values: by the name of an option.
        strict: whether every key has to be an option.
        rest: by name what matters of the keys that are no options, whatever the command.
    """

    values: Mapping[str, Any]
    strict: bool = False
    rest: tuple[str, ...] = ()

    def missed(self, known: Collection[str]) -> list[str]:
        """What it asks for that a command cannot do which takes these options."""
        usual = {field.name: field.default for field in fields(TrainOptions)}
        own = [
            name
            for name, value in self.values.items()
            if name in options_in(TrainOptions) and name not in known
            if value not in (None, "", {}, usual[name])
        ]
        return [] if self.strict else [*own, *self.rest]


def read_options(path: Path) -> OptionFile:
    """The options in a file, whoever wrote it.

    Raises:
        InputError: it cannot be read.
    """
    found = parsed(path)
    if {"log_interval", "workers", "aug_splits"} <= set(found):
        return _timms(found)
    if isinstance(found.get("versions"), dict) and "command" in found:
        measured = found.get("every") != 0  # of `train`, which another command may not take over
        left = _PLACES if measured else (*_PLACES, "every")
        return OptionFile({k: v for k, v in found.items() if k not in left})
    return OptionFile({name.replace("-", "_"): v for name, v in found.items()}, strict=True)


# --- timm's args.yaml -----------------------------------------------------------------------------

#: Whose names mean something else here, or that say where and not what.
_OTHERS = ("scale", "val_split", "resume", "recovery_interval", *_PLACES)
#: Options without a counterpart that change what a run comes to, where they are at work.
_MISSED = (
    "drop", "drop_path", "drop_block", "model_kwargs", "in_chans", "reprob", "color_jitter",
    "scale", "ratio", "vflip", "aug_repeats", "aug_splits", "jsd_loss", "bce_loss",
    "cutmix_minmax", "mixup_off_epoch", "mixup_prob", "mixup_switch_prob", "mixup_mode",
    "lr_noise", "lr_cycle_limit", "lr_k_decay", "cooldown_epochs", "warmup_prefix",
    "bn_momentum", "bn_eps", "sync_bn", "mean", "std", "crop_pct", "layer_decay_min_scale",
    "kd_model_name",
)  # fmt: skip
#: What those of them come to that are never off.
_USUAL = {
    "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "lr_cycle_limit": 1,
    "lr_k_decay": 1.0,
}  # fmt: skip
#: Schedules that ask for ``decay_epochs``.
_FALLS = ("step", "wsd", "rsqrt")


def _timms(args: Mapping[str, Any]) -> OptionFile:
    """What timm's own ``train.py`` has written down of a run, as our options."""
    found = {name: value for name, value in args.items() if _given(value) and name not in _OTHERS}
    found["filter_bias_and_bn"] = True  # as train.py has it
    if "dataset" not in found:
        found["data_dir"] = found.get("data_dir") or found.get("data")
        found["dataset"] = "folder" if found["data_dir"] else None
    if "initial_checkpoint" in found:
        found["checkpoint"] = found["initial_checkpoint"]
    if isinstance(size := found.get("input_size"), list):
        found["img_size"] = size[-1]
    found["lr"] = found.get("lr") or _rate(found)
    found["opt_kwargs"] = _optimizers(found)
    if "torchcompile" in found:
        found["torchcompile"] = True
    if found.get("sched") != "multistep":
        found.pop("decay_milestones", None)
    if found.get("sched") not in _FALLS:
        found.pop("decay_epochs", None)
    for name, needed in NEEDS.items():
        if found.get(needed) in (None, False, "none"):
            found.pop(name, None)
    told = {name: args[name] for name in _MISSED if _given(args.get(name))}
    rest = tuple(name for name, value in told.items() if value != _USUAL.get(name, 0))
    return OptionFile(found, rest=rest)


def _given(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


def _rate(args: Mapping[str, Any]) -> float | None:
    """η of timm's rule for so many images in a step, where none is given."""
    base, size = args.get("lr_base"), args.get("lr_base_size")
    if not (isinstance(base, float | int) and isinstance(size, int) and size > 0):
        return None
    ratio = args.get("batch_size", 128) * args.get("grad_accum_steps", 1) / size
    adaptive = any(kind in str(args.get("opt", "sgd")).lower() for kind in ("ada", "lamb"))
    how = args.get("lr_base_scale") or ("sqrt" if adaptive else "linear")
    return float(base * (ratio**0.5 if how == "sqrt" else ratio))


def _optimizers(args: Mapping[str, Any]) -> dict[str, Any]:
    own = {"betas": args.get("opt_betas"), "eps": args.get("opt_eps")}
    found = {name: value for name, value in own.items() if value is not None}
    more = args.get("opt_kwargs")
    return found | (more if isinstance(more, dict) else {})
