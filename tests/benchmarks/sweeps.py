"""What a sweep costs beyond its cells, and how many cells end in a minute."""

import tempfile
import time
from pathlib import Path

import torch

from tests.benchmarks.timing import header, row
from wd_probe.sweeps import cells as sweeps
from wd_probe.sweeps import grid
from wd_probe.sweeps import ray as on_ray
from wd_probe.training.options import TrainOptions
from wd_probe.wording import percent

STEPS = 20


class Silent:
    def begun(self, *_): ...

    def cell_started(self, cell): ...

    def cell_ended(self, cell, summary): ...


def timed_cell(run, *arguments):
    """Run a cell and leave beside it how long it took."""
    begun = time.perf_counter()
    summary = run(*arguments)
    Path(f"{summary['run']}.seconds").write_text(str(time.perf_counter() - begun))
    return summary


def cost(cells, runner, lanes):
    """Wall-clock seconds of a sweep, and of its cells alone where ``lanes`` of them run at once."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        sweeps.sweep(cells, Path(folder), Silent(), runner=runner)
        wall = time.perf_counter() - begun
        own = [float(path.read_text()) for path in Path(folder, "cells").glob("*.seconds")]
    assert len(own) == len(cells)
    return wall, sum(own) / lanes


def report(model):
    """In this process, then on Ray, several cells at once; Ray's start stands apart."""

    def cells(first, count):
        base = TrainOptions(model=model, method="wd", steps=STEPS, every=10)
        return grid.grid(base, {"seed": range(first, first + count)})

    def told(title, count, wall, own, start):
        row(title, f"{wall:.1f}", f"{own:.1f}", percent(wall / own - 1, 2), start,
            f"{60 * count / wall:.0f}")  # fmt: skip

    header(f"sweep, cells of {STEPS} steps, {model}", "wall, s", "its cells, s", "overhead",
           "start, s", "cells a minute")  # fmt: skip
    plain, task = sweeps.run_cell, on_ray._run
    sweeps.run_cell = lambda *arguments: timed_cell(plain, *arguments)
    cost(cells(0, 1), None, 1)
    told("6 cells, in turn", 6, *cost(cells(1, 6), None, 1), "–")
    sweeps.run_cell = plain
    on_ray._run = lambda *arguments: timed_cell(task, *arguments)
    for gpus in (1, 1 / 2, 1 / 4, 1 / 8) if torch.cuda.is_available() else (None,):
        begun = time.perf_counter()
        with on_ray.OnRay(gpus=gpus) as runner:
            lanes = runner._room()
            wall, own = cost(cells(0, lanes), runner, lanes)
            start = time.perf_counter() - begun - own
            count = 6 * lanes
            wall, own = cost(cells(lanes, count), runner, lanes)
            told(f"{count} cells on Ray, {lanes} at once", count, wall, own, f"{start:.1f}")
    on_ray._run = task
