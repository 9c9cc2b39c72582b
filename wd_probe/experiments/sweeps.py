"""Grids of training runs: one run folder a cell, to be killed and gone on with at any time."""

import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError, RunError
from .data import load_data
from .models import create_model
from .options import TrainOptions
from .runs import dumps
from .train import train
from .training import pick_device

#: More cells than this want a word of consent.
MANY = 10_000
#: What does not change a cell's result, or only where it lies.
_ELSEWHERE = ("output", "device", "data_dir", "dataset_download")
_AXES = ("dataset", "model", "opt", "method", "lr", "weight_decay", "seed")

Summary = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a grid; its name tells its options apart from every other's."""

    name: str
    options: TrainOptions


class SweepListener(Protocol):
    """Is told how a sweep goes."""

    def begun(self, total: int, kept: int) -> None:
        """``kept`` of ``total`` cells had been finished before."""

    def cell_started(self, cell: Cell) -> None:
        """A cell is begun."""

    def cell_ended(self, cell: Cell, summary: Summary) -> None:
        """A cell came to its end, whatever that was."""


class Runner(Protocol):
    """Runs cells, in whatever order and place, and yields each with its summary."""

    def __call__(
        self, cells: Sequence[Cell], folder: Path, listener: SweepListener
    ) -> Iterator[tuple[Cell, Summary]]:
        """Run them."""
        ...


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
            raise InputError(f"unknown axis {name!r}; choose from {', '.join(known)}")
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


def _cell(options: TrainOptions) -> Cell:
    # Only what differs from the defaults: an option that is new in a later version changes no name.
    chosen = {
        field.name: value
        for field in fields(options)
        if field.name not in _ELSEWHERE and (value := getattr(options, field.name)) != field.default
    }
    key = hashlib.sha256(dumps(chosen).encode()).hexdigest()[:8]
    shown = f"{options.model}-{options.dataset}-{options.opt}-{options.method}"
    shown += f"-lr{options.learning_rate:g}-wd{options.weight_decay:g}-s{options.seed}"
    safe = "".join(ch if ch.isalnum() or ch in "._-" else "_" for ch in shown)
    return Cell(f"{safe}-{key}", options)


def sweep(
    cells: Sequence[Cell],
    folder: Path,
    listener: SweepListener,
    *,
    runner: Runner | None = None,
    consent: bool = False,
) -> list[Summary]:
    """Run every cell that is not finished, and return the summaries of all, in order.

    A cell that was cut short is begun anew; one that diverged has a result: that it diverged. One
    that failed (out of memory, say) does not stop the others, and is tried again next time.

    Args:
        cells: from :func:`grid`.
        folder: holds ``cells/NAME`` for each, and ``cells.csv``; cells of other grids there are
            left alone.
        listener: is told how it goes.
        runner: runs them; default one after another in this process.
        consent: to more than ``MANY`` cells.

    Raises:
        InputError: no cells or too many; a dataset, model or device that cannot be had, found out
            before the first cell; a folder that cannot be written to.
        RunError: interrupted; what was finished is kept.
    """
    if not cells:
        raise InputError("the grid is empty")
    if len(cells) > MANY and not consent:
        raise InputError(f"the grid has {len(cells):,} cells; --yes runs them all the same")
    done = {cell.name: found for cell in cells if (found := _finished(folder, cell)) is not None}
    missing = [cell for cell in cells if cell.name not in done]
    _check_ahead([cell.options for cell in missing])
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"output folder {folder} cannot be written to ({error.strerror}); choose another "
            "--output"
        ) from error
    listener.begun(len(cells), len(done))
    try:
        for cell, summary in (runner or in_turn)(missing, folder / "cells", listener):
            done[cell.name] = summary
            listener.cell_ended(cell, summary)
            if summary["status"] == "interrupted":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise RunError(
            f"interrupted: {len(done)} of {len(cells)} cells are in {folder}; the same command "
            "goes on with the rest"
        ) from None
    return [done[cell.name] for cell in cells]


def _finished(folder: Path, cell: Cell) -> Summary | None:
    """The summary of a cell that needs no more running."""
    try:
        summary: Summary = json.loads((folder / "cells" / cell.name / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if summary.get("status") in ("finished", "diverged") else None


def _check_ahead(options: Iterable[TrainOptions]) -> None:
    """Open every dataset and build every model once, before hours are spent on the others."""
    seen: dict[Any, TrainOptions] = {}
    for o in options:
        seen.setdefault((o.dataset, o.model, o.img_size, o.pretrained, o.checkpoint, o.device), o)
    for o in seen.values():
        data = load_data(
            o.dataset,
            batch_size=o.batch_size,
            img_size=o.img_size,
            device=pick_device(o.device),
            seed=o.seed,
            data_dir=o.data_dir,
            download=o.dataset_download,
            val_split=o.val_split,
            train_samples=o.train_samples,
        )
        create_model(
            o.model,
            num_classes=data.num_classes,
            img_size=o.img_size,
            pretrained=o.pretrained,
            checkpoint=o.checkpoint,
        )


def in_turn(
    cells: Sequence[Cell], folder: Path, listener: SweepListener
) -> Iterator[tuple[Cell, Summary]]:
    """One cell after another in this process."""
    for cell in cells:
        listener.cell_started(cell)
        yield cell, run_cell(cell, folder)


class _Quiet:
    def started(self, *_: Any) -> None: ...

    def stepped(self, *_: Any) -> None: ...

    def scored(self, *_: Any) -> None: ...


def run_cell(cell: Cell, folder: Path) -> Summary:
    """Train one cell in ``folder/NAME``, anew if it was begun before; never raises for a failure.

    Returns:
        The run's summary; one with status "failed" and the reason where training raised.
    """
    own = folder / cell.name
    shutil.rmtree(own, ignore_errors=True)
    begun = time.monotonic()
    try:
        return train(replace(cell.options, output=own), _Quiet())
    except Exception as error:  # the other cells go on
        lines = str(error).strip().splitlines() or [type(error).__name__]
        failed = {
            **{name: getattr(cell.options, name) for name in (*_AXES, "scale", "command")},
            "status": "failed",
            "error": lines[0],
            "seconds": time.monotonic() - begun,
            "run": str(own),
        }
        own.mkdir(parents=True, exist_ok=True)
        (own / "summary.json").write_text(dumps(failed, indent=2) + "\n")
        return failed


# --- what a grid came to --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """The cells of a grid that differ in nothing but their seed, by rising seed."""

    dataset: str
    model: str
    opt: str
    method: str
    lr: float
    weight_decay: float
    cells: tuple[Summary, ...]

    def values(self, *path: str) -> list[float]:
        """A figure of every cell, NaN where it has none, e.g. ``("best10", "mean")``."""
        found: list[float] = []
        for cell in self.cells:
            value: Any = cell
            for key in path:
                value = None if value is None else value.get(key)
            found.append(math.nan if value is None else float(value))
        return found

    @property
    def diverged(self) -> int:
        """How many of the cells came to no usable model."""
        return sum(cell["status"] != "finished" for cell in self.cells)


def settings(cells: Sequence[Cell], summaries: Sequence[Summary]) -> list[Setting]:
    """The cells of a grid gathered over seeds, in the order of the grid."""
    gathered: dict[tuple[str, str, str, str, float, float], list[tuple[int, Summary]]] = {}
    for cell, summary in zip(cells, summaries, strict=True):
        o = cell.options
        key = (o.dataset, o.model, o.opt, o.method, o.learning_rate, o.weight_decay)
        gathered.setdefault(key, []).append((o.seed, summary))
    return [
        Setting(*key, cells=tuple(s for _, s in sorted(found, key=lambda item: item[0])))
        for key, found in gathered.items()
    ]
