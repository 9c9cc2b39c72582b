"""Grids of training runs: one run folder a cell, to be killed and resumed at any time."""

import contextlib
import gc
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import InputError, Interrupted, RunError, counted
from ..runs.folder import dumps, write_whole
from ..runs.locks import LOCK, Lock
from ..runs.reading import read_json
from ..runs.schema import RunSummary
from ..training.checkpoint import RECOVERY
from ..training.options import TrainOptions
from ..training.train import prepare, train
from .grid import AXES, Cell, Summary, require_consent
from .ledger import Ledger, figures, rows

#: Lies in a cell's folder until all of its files are written.
_INCOMPLETE = "incomplete"


class SweepListener(Protocol):
    """Is told how a sweep goes."""

    def begun(self, total: int, kept: int) -> None:
        """``kept`` of ``total`` cells had been finished before."""

    def cell_started(self, cell: Cell) -> None:
        """A cell is begun."""

    def cell_ended(self, cell: Cell, summary: Summary) -> None:
        """A cell has ended, in whatever way."""


class Runner(Protocol):
    """Runs cells, in whatever order and place, and yields each with its summary."""

    def __call__(
        self, cells: Sequence[Cell], folder: Path, listener: SweepListener
    ) -> Iterator[tuple[Cell, Summary]]:
        """Run them."""
        ...


def sweep(
    cells: Sequence[Cell],
    folder: Path,
    listener: SweepListener,
    *,
    runner: Runner | None = None,
    consent: bool = False,
) -> list[Summary]:
    """Run every cell that is not finished, and return the summaries of all, in order.

    A cell that was cut short goes on where it was last saved; one that diverged has a result: that
    it diverged. One that failed (out of memory, say) does not stop the others, and is tried again
    next time.

    Args:
        cells: from :func:`grid`.
        folder: holds ``cells/NAME`` for each, and ``cells.csv``; cells of other grids there are
            left alone.
        listener: is told how it goes.
        runner: runs them; default one after another in this process.
        consent: to more than 10,000 cells.

    Raises:
        InputError: no cells or too many; a dataset, model or device that is unavailable, found out
            before the first cell; a folder that cannot be written to.
        RunError: interrupted; what was finished is kept.
    """
    if not cells:
        raise InputError("the grid is empty")
    require_consent(len(cells), consent)
    kept = {cell.name: finished(folder / "cells" / cell.name) for cell in cells}
    done = {name: summary for name, summary in kept.items() if summary is not None}
    missing = [cell for cell in cells if cell.name not in done]
    _check_ahead([cell.options for cell in missing], elsewhere=runner is not None)
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"output folder {folder} cannot be written to ({error.strerror}); choose another "
            "--output"
        ) from error
    ledger = Ledger(folder / "cells.csv", rows(cells, [done.get(cell.name) for cell in cells]))
    place = {cell.name: number for number, cell in enumerate(cells)}
    listener.begun(len(cells), len(done))
    try:
        for cell, summary in (runner or in_turn)(missing, folder / "cells", listener):
            listener.cell_ended(cell, summary)
            ledger.update(place[cell.name], figures(summary))
            if summary["status"] == "interrupted":
                raise KeyboardInterrupt
            done[cell.name] = summary
    except KeyboardInterrupt:
        ended = sum(summary["status"] != "failed" for summary in done.values())
        raise Interrupted(
            f"interrupted: {ended} of {counted(len(cells), 'cell')} are in {folder}; the same "
            "command resumes the rest",
            resumes=True,
        ) from None
    return [done[cell.name] for cell in cells]


def finished(own: Path) -> Summary | None:
    """The summary of the cell in this folder, if it needs no more running."""
    try:
        summary: Summary = {**read_json(own / "summary.json", RunSummary), "run": str(own)}
    except InputError:
        return None
    whole = summary.get("status") in ("finished", "diverged") and not (own / _INCOMPLETE).exists()
    return summary if whole else None


def _check_ahead(options: Iterable[TrainOptions], elsewhere: bool) -> None:
    """Open every dataset, build every model and optimizer, before hours are spent on the others.

    Of the cells that differ in nothing but η, λ and seed, the one that decays most is tried.
    """
    strongest: dict[TrainOptions, TrainOptions] = {}
    for o in sorted(options, key=lambda o: o.learning_rate * o.weight_decay):
        strongest[replace(o, lr=None, weight_decay=0.0, seed=0)] = o
    for o in strongest.values():
        prepare(replace(o, device="cpu", torchcompile=False) if elsewhere else o)
        _clear(o)


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
    """Train one cell in ``folder/NAME``; never raises for a failure.

    One that was begun before goes on where it was last saved, or is begun anew. One that another
    process has is left alone, and has failed here; one that it has finished is taken as it is.

    Returns:
        The run's summary; one with status "failed" and the reason where training raised or the
        files could not be written.
    """
    own, begun = folder / cell.name, time.monotonic()
    try:
        if own.is_symlink():  # of a folder from elsewhere: what it points to is left alone
            own.unlink()
        with Lock(own) as lock:
            return finished(own) or _trained(replace(cell.options, output=own), own, lock)
    except Exception as error:  # the other cells go on
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return failure(cell, folder, lines[0], time.monotonic() - begun)
    finally:
        _clear(cell.options)


def _trained(options: TrainOptions, own: Path, lock: Lock) -> Summary:
    """The summary of a cell that is resumed, or else begun."""
    (own / _INCOMPLETE).touch()
    summary = None
    if (own / RECOVERY).is_file():
        with contextlib.suppress(InputError):
            summary = train(options, _Quiet(), resume=True, lock=lock)
    if summary is None:
        empty(own)
        summary = train(options, _Quiet(), lock=lock)
    if "write_failure" in summary:
        raise RunError(f"files could not be written: {summary['write_failure']}")
    (own / _INCOMPLETE).unlink()
    return summary


def empty(own: Path) -> None:
    """Take away what is left of a cell, or of its scan, that was cut short; under its lock."""
    for path in own.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (LOCK, _INCOMPLETE):
            path.unlink()


def _clear(options: TrainOptions) -> None:
    """Let go of what a run leaves in this process: compiled code, a model's cycles on the GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    if options.torchcompile:
        torch.compiler.reset()


def failure(cell: Cell, folder: Path, reason: str, seconds: float) -> Summary:
    """The summary of a cell that could not be run, which is also in its folder.

    Where another process has the cell nothing is written; where it has finished it, its own
    summary is returned.
    """
    own, options = folder / cell.name, cell.options
    failed = {
        **{name: getattr(options, name) for name in (*AXES, "scale", "command")},
        "optimizer": options.opt,
        "lr": options.learning_rate,
        "status": "failed",
        "error": reason,
        "seconds": seconds,
        "run": str(own),
    }
    with contextlib.suppress(OSError, InputError), Lock(own):  # a full disk; another's cell
        if (done := finished(own)) is not None:
            return done
        write_whole(own / "summary.json", dumps(failed, indent=2) + "\n")
    return failed
