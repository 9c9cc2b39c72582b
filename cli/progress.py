"""How a command tells on stderr how it goes: a bar on a terminal, lines elsewhere."""

import time
from pathlib import Path
from typing import Any, Self

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from wd_probe.errors import counted
from wd_probe.wording import percent

from .console import err

_LINE_SECONDS = 10.0  # between progress lines where stderr is no terminal


class _Left(TimeRemainingColumn):
    """Rich's own estimate unless the task brings one: rich looks back half a minute only."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return super().render(task) if left is None else Text(left, "progress.remaining")


def _bar(title: str) -> Progress:
    """A bar that takes what the terminal's width leaves for it, and goes away at the end."""
    return Progress(
        TextColumn(title),
        MofNCompleteColumn(),
        BarColumn(bar_width=max(8, min(40, err.width - 68))),
        TextColumn("{task.fields[numbers]}"),
        TextColumn("·"),
        _Left(compact=True),
        TextColumn("left"),
        console=err,
        transient=True,
    )


class _Told:
    """A live bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, title: str) -> None:
        self._bar = _bar(title)
        self._begun = self._told = time.monotonic()

    def __enter__(self) -> Self:
        """Start the bar on a terminal."""
        if err.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        if err.is_terminal:
            self._bar.stop()

    def _line(self, text: str, last: bool) -> None:
        """Tell it where there is no bar, the last in any case, the others now and then."""
        now = time.monotonic()
        if not err.is_terminal and (last or now - self._told > _LINE_SECONDS):
            self._told = now
            err.print(text, soft_wrap=True)


class TrainingProgress(_Told):
    """How a run goes, step by step.

    Args:
        resumed: whether a run is resumed.
    """

    def __init__(self, resumed: bool = False) -> None:
        super().__init__("[bold]step")
        self._resumed = resumed
        self._before: int | None = None  # steps of a resumed run
        self._score = ""

    def started(
        self, total_steps: int, folder: Path, data: Any, layer_count: int, done: int
    ) -> None:
        """Say what is trained, and begin."""
        self._total, self._begun = total_steps, time.monotonic()
        err.print(
            f"{data.name}: {data.train_size:,} training and "
            f"{counted(data.test_size, 'test image')}, "
            f"{counted(data.num_classes, 'class', 'classes')} · "
            f"{counted(layer_count, 'layer')} · writing {escape(str(folder))}",
            soft_wrap=True,
        )
        if done:
            err.print(f"going on after step {done} of {total_steps}")
        elif self._resumed:
            err.print("it was not saved before it ended: beginning at its start")
        self._task = self._bar.add_task("train", total=total_steps, numbers="")

    def stepped(self, step: Any, record: Any) -> None:
        """Show a step."""
        if self._before is None:
            self._before = step.step - 1
        pace = (step.step - self._before) / max(time.monotonic() - self._begun, 1e-9)
        rate = "" if record is None else f"R_op {percent(record.rate)} · "
        numbers = f"loss {step.loss:.3f} · {rate}{pace:.1f} steps/s"
        shown = numbers + (self._score if err.width >= 100 else "")
        self._bar.update(self._task, completed=step.step, numbers=shown)
        left = (self._total - step.step) / pace
        self._line(
            f"step {step.step}/{self._total} · {numbers}{self._score} · {left:.0f} s left",
            last=step.step == self._total,
        )

    def scored(self, epoch: int, score: Any) -> None:
        """Remember the latest evaluation."""
        self._score = f" · top-1 {percent(score.top1, 1)}"


class ScanProgress(_Told):
    """How a scan goes, a bar for each phase."""

    def __init__(self) -> None:
        super().__init__("[bold]{task.description:<10}")
        self._tasks: dict[str, Any] = {}

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        err.print(escape(text), soft_wrap=True)

    def progress(self, what: str, done: int, total: int, numbers: str) -> None:
        """Move the bar of a phase; earlier phases' bars go away."""
        if what not in self._tasks:
            for task in self._tasks.values():
                self._bar.update(task, visible=False)
            self._tasks[what] = self._bar.add_task(what, total=total, numbers="")
        self._bar.update(self._tasks[what], completed=done, total=total, numbers=numbers)
        self._line(f"{what} {done}/{total}" + (f" · {numbers}" if numbers else ""), done == total)


class SweepProgress(ScanProgress):
    """How a sweep goes, cell by cell."""

    def begun(self, total: int, kept: int) -> None:
        """Say how much there is to do."""
        self._total, self._kept, self._started, self._ended = total, kept, 0, 0
        self._lost = {"failed": 0, "diverged": 0}
        self._begun = time.monotonic()
        self._tasks.pop("cell", None)
        before = f", {kept} of them finished before" if kept else ""
        self.note(f"{counted(total, 'cell')}{before}")

    def cell_started(self, cell: Any) -> None:
        """One more is running."""
        self._started += 1
        self._show()

    def cell_ended(self, cell: Any, summary: Any) -> None:
        """One is done; say so if it failed."""
        self._ended += 1
        status = summary["status"]
        if status in self._lost:
            self._lost[status] += 1
            reason = summary.get("error") or f"at step {summary.get('steps')}"
            self.note(f"{status}: {cell.name} ({reason})")
        if self._kept + self._started == self._total:  # else the next is just about to start
            self._show()

    def _show(self) -> None:
        done = self._kept + self._ended
        lost = [f"{count} {status}" for status, count in self._lost.items() if count]
        numbers = " · ".join([f"{self._started - self._ended} running", *lost])
        left = "–"
        if self._ended:
            pace = (time.monotonic() - self._begun) / self._ended
            left = duration(pace * (self._total - done))
        if "cell" not in self._tasks:
            self._tasks["cell"] = self._bar.add_task("cell", completed=self._kept, numbers="")
        task = self._tasks["cell"]
        self._bar.update(task, completed=done, total=self._total, numbers=numbers, left=left)
        self._line(f"cell {done}/{self._total} · {numbers} · {left} left", done == self._total)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3:20 min, 5:07 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    first, rest = divmod(round(seconds) // (1 if seconds < 3600 else 60), 60)
    return f"{first}:{rest:02d} {'min' if seconds < 3600 else 'h'}"
