"""What the files of a run hold: the keys and columns that readers rest on, and of what kind."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .reading import NUMBER, damaged

_STATISTICS = dict.fromkeys(("mean", "max", "last"), NUMBER)
_METRICS = dict.fromkeys(("top1", "loss", "agreement", "kl"), NUMBER)

#: Of ``config.json``; see :func:`.files.read_json`.
CONFIG: Mapping[str, Any] = {
    **dict.fromkeys(("command", "model", "dataset", "source", "data_dir", "opt", "method"), str),
    **dict.fromkeys(
        ("opt_kwargs", "scale", "convention", "by", "layer_definition", "checkpoint"), str
    ),
    **dict.fromkeys(("batch_size", "img_size", "num_classes", "seed", "epochs", "steps"), int),
    **dict.fromkeys(("weights", "train_size", "validation_size", "test_size"), int),
    **dict.fromkeys(("lr", "weight_decay", "momentum", "val_split", "hflip"), NUMBER),
    "layers": [{"index": int, "name": str}],
    "parts": [str],
    "versions": {},
}
#: Of ``summary.json``.
SUMMARY: Mapping[str, Any] = {
    **dict.fromkeys(("command", "status", "model", "method", "metric", "error", "run"), str),
    **dict.fromkeys(("steps", "epochs", "images", "classes", "seed"), int),
    **dict.fromkeys(("lr", "weight_decay", "half_life", "seconds", "train_loss"), NUMBER),
    **dict.fromkeys(("top1", "loss", "other_top1", "val_top1"), NUMBER),
    **dict.fromkeys(("rate", "mass", "flip_rate", "literal_rate"), _STATISTICS),
    "best10": {"mean": NUMBER, "std": NUMBER, "epochs": int},
    "chosen": {"epoch": int, "val_top1": NUMBER, "top1": NUMBER},
    "findings": [str],
    "layers": [{"index": int, "name": str, "rate": NUMBER, "mass": NUMBER, "flip_rate": NUMBER}],
    "curve": [{"step": int, "scale": NUMBER, **_METRICS}],
    "parts": [{"name": str, "half_life": NUMBER, "weights": int}],
    "distortion": [
        {"index": int, "name": str, "scale": NUMBER, "distortion": NUMBER, "norm_ratio": NUMBER}
    ],
}
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


def check_table(
    path: Path, columns: Mapping[str, Sequence[float]], names: Sequence[str] | None
) -> None:
    """See that a table has its columns, and counts that are counts.

    Args:
        path: of the file, named after its table.
        columns: as read; none where there is no file.
        names: what the column ``index`` points into, from 1; None where there is no such column.

    Raises:
        InputError: it does not.
    """
    if not columns:
        return
    for name in TABLES[path.stem]:
        if name not in columns:
            raise damaged(path, f"it has no column {name}")
    for name in ("step", "epoch"):
        if not all(value >= 0 and value.is_integer() for value in columns.get(name, ())):
            raise damaged(path, f"the column {name} must hold whole numbers")
    if names is not None:
        for value in columns["index"]:
            if not (1 <= value <= len(names) and value.is_integer()):
                raise damaged(
                    path, f"index {value:g} is none of the {len(names)} names in config.json"
                )
