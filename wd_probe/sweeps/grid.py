"""What a grid is made of: its cells, values from a file or a command, a folder that knows them."""

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from ..errors import InputError, shown, shown_line
from ..runs.folder import dumps, write_whole
from ..runs.locks import Lock, unwritable
from ..runs.reading import read_json
from ..runs.schema import Contents, Items, Text
from ..training.option_files import parsed
from ..training.options import ELSEWHERE, TrainOptions, fitted, typed

#: More cells than this want a word of consent.
MANY = 10_000
#: The options that every row of a grid tells, in the order of their columns.
AXES = ("dataset", "model", "opt", "method", "lr", "weight_decay", "seed")
_SEEDS = 2**31
#: The order of the axes, the outermost first, however a grid is written.
_NESTED = (
    *AXES[:-1], *(field.name for field in fields(TrainOptions) if field.name not in AXES), AXES[-1],
)  # fmt: skip
_SHOWN = 20  # values of an axis, in a message

#: What a cell's run ended with; see `runs.schema.RunSummary`.
Summary = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a grid; its name tells its options apart from every other's."""

    name: str
    options: TrainOptions


def grid(base: TrainOptions, axes: Mapping[str, Sequence[Any]]) -> tuple[Cell, ...]:
    """Every combination of the axes' values over the base options, each once.

    Args:
        base: the options that all cells share.
        axes: values by the name of an option. Where the method is baseline, λ has no meaning and
            is one.

    Raises:
        InputError: an axis without values or of an unknown name; options that do not fit.
    """
    known = asdict(base)
    for name, values in axes.items():
        if name not in known:
            raise InputError(f"unknown axis {shown(name)}; choose from {', '.join(known)}")
        if not values:
            raise InputError(f"the grid is empty: {name} has no values")
    found = {}
    for values in itertools.product(*axes.values()):
        options = replace(base, **dict(zip(axes, values, strict=True)))
        if options.method == "baseline":
            options = replace(options, weight_decay=0.0)
        cell = _cell(options)
        found[cell.name] = cell
    return tuple(found.values())


def other_axes(cells: Sequence[Cell]) -> list[str]:
    """The options besides the usual ones in which cells differ."""
    names = [f.name for f in fields(TrainOptions) if f.name not in (*AXES, *ELSEWHERE)]
    return [name for name in names if len({getattr(c.options, name) for c in cells}) > 1]


def _cell(options: TrainOptions) -> Cell:
    # Only what differs from the defaults: an option that is new in a later version changes no name.
    chosen = {
        field.name: value
        for field in fields(options)
        if field.name not in ELSEWHERE and (value := getattr(options, field.name)) != field.default
    }
    key = hashlib.sha256(dumps(chosen).encode()).hexdigest()[:8]
    text = f"{options.model}-{options.dataset}-{options.opt}-{options.method}"
    text += f"-lr{options.learning_rate:g}-wd{options.weight_decay:g}-s{options.seed}"
    safe = "".join(ch if ch.isalnum() or ch in "._-" else "_" for ch in text)
    return Cell(f"{safe}-{key}", options)


def require_consent(count: int, consent: bool) -> None:
    """Refuse more than ``MANY`` cells without consent.

    Raises:
        InputError: they are too many.
    """
    if count > MANY and not consent:
        raise InputError(f"the grid has {count:,} cells; --yes runs them all the same")


@dataclass(frozen=True, slots=True)
class Plan:
    """A grid: what all cells share, and the axes over it."""

    base: TrainOptions
    axes: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Lists are axes; a text may stand for a number; ``seeds`` n is ``seed`` 0 to n - 1.

        Raises:
            InputError: an unknown name, a value of the wrong kind, options that do not fit.
        """
        found = {name: typed(name, value) for name, value in seeded(values).items()}
        axes = {name: found[name] for name in _NESTED if isinstance(found.get(name), tuple | range)}
        for name, value in axes.items():
            if not value:
                raise InputError(f"the grid is empty: {name} has no values")
        base = TrainOptions(**found | {name: value[0] for name, value in axes.items()})
        base.check_moments(*axes.get("method", ()))
        return cls(base, axes)

    def cells(self, consent: bool) -> tuple[Cell, ...]:
        """Its cells, seeds last, see :func:`grid`.

        Raises:
            InputError: too many without consent, or options that do not fit.
        """
        require_consent(math.prod(map(len, self.axes.values())), consent)
        return grid(self.base, self.axes)

    def values(self) -> dict[str, list[Any]]:
        """The values of every option that decides a result, in rising order."""
        found = {}
        for field in fields(TrainOptions):
            apart = field.name == "data_dir" and self.base.dataset == "folder"
            if field.name not in ELSEWHERE or apart:
                values = self.axes.get(field.name, (getattr(self.base, field.name),))
                found[field.name] = _plain(values)
        return found

    def key(self) -> str:
        """Eight digits that are the same for the same grid."""
        chosen = {
            field.name: values
            for field in fields(TrainOptions)
            if (values := self.values().get(field.name, [])) not in ([], [field.default])
        }
        return hashlib.sha256(dumps(chosen).encode()).hexdigest()[:8]


def _plain(values: Sequence[Any]) -> list[Any]:
    plain = {dumps(value): json.loads(dumps(value)) for value in values}
    return sorted(plain.values(), key=lambda v: (str(type(v)), v if v is not None else 0))


def seeded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with ``seeds`` n as ``seed`` 0 to n - 1."""
    found = {name.replace("-", "_"): value for name, value in values.items()}
    if "seeds" in found:
        count = fitted("seeds", found.pop("seeds"), int)
        if count > _SEEDS:
            raise InputError(f"seeds must be at most {_SEEDS:,}, got {shown(count)}")
        found["seed"] = range(count)
    return found


def read_grid(path: Path) -> dict[str, Any]:
    """A TOML or YAML file whose keys are options; lists are axes.

    Raises:
        InputError: it cannot be read, or a key or value in it is not understood.
    """
    if path.suffix.lower() not in (".toml", ".yaml", ".yml"):
        raise InputError(f"{path} is no grid: its name must end in .toml, .yaml or .yml")
    try:
        found = parsed(path)
    except InputError as error:
        raise InputError(f"grid {error}") from error
    try:
        values = seeded(found)
        for name, value in values.items():
            typed(name, value)
    except InputError as error:
        raise InputError(f"grid {path}: {error}") from error
    return values


# --- the folder of a grid -------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(folder: Path, plan: Plan, cells: Sequence[Cell]) -> Iterator[Sequence[Cell]]:
    """A folder taken by one grid, and by one process at a time.

    Yields:
        The cells, in the order that the folder's first command gave them.

    Raises:
        InputError: another grid's folder, one that another process writes to, or one that cannot
            be written to.
    """
    with Lock(folder, "sweep"):
        try:
            names = _recorded(folder, plan, cells)
        except OSError as error:
            raise unwritable(folder, error) from error
        places = {name: number for number, name in enumerate(names)}
        yield sorted(cells, key=lambda cell: places.get(cell.name, len(places)))


class _Record(Contents):
    """``sweep.json``."""

    command: Text = None
    axes: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    cells: Items[str] = None


def _recorded(folder: Path, plan: Plan, cells: Sequence[Cell]) -> Sequence[str]:
    """The names of the cells in the folder's ``sweep.json``, which is written if there is none."""
    file, values, names = folder / "sweep.json", plan.values(), [cell.name for cell in cells]
    if file.exists():
        record = read_json(file, _Record)
        _compare(folder, record, values)
        return record.get("cells") or names
    record = {
        "command": "sweep",
        "axes": {name: found for name, found in values.items() if name in plan.axes},
        "options": {name: found[0] for name, found in values.items() if name not in plan.axes},
        "cells": names,
    }
    write_whole(file, dumps(record, indent=2) + "\n")
    return names


def _compare(folder: Path, record: Mapping[str, Any], values: Mapping[str, list[Any]]) -> None:
    there = {name: [value] for name, value in (record.get("options") or {}).items()}
    for name, found in (record.get("axes") or {}).items():
        there[name] = found if isinstance(found, list) else [found]
    defaults = {field.name: [field.default] for field in fields(TrainOptions)}
    differing = [
        f"{name} is {_shown(was)} there and {_shown(now)} here"
        for name, now in values.items()
        if (was := there.get(name, defaults[name])) != now
    ]
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise InputError(
            f"{folder} holds another grid: {'; '.join(differing[:3])}{more}; choose another "
            "--output"
        )


def _shown(values: Sequence[Any]) -> str:
    told = ", ".join("none" if v is None else f"{v}" for v in values[:_SHOWN])
    return shown_line(told) + (", ..." if len(values) > _SHOWN else "")
