"""Results to the terminal: tables on stdout, progress on stderr."""

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from wd_probe.errors import printable

from .encoding import json_for
from .processes import process


class _Console(Console):
    """Names that come from files are text: what a terminal would act on in them is shown."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The renderable's segments, those with text made printable."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                lines = (printable(line) for line in segment.text.split("\n"))
                yield Segment("\n".join(lines), segment.style)


out = _Console(highlight=False, soft_wrap=False, quiet=process() > 0)
err = _Console(stderr=True, highlight=False, quiet=process() > 0)

_LINE_SECONDS = 10.0  # between progress lines where stderr is no terminal


def share(value: float | None, digits: int | None = 3) -> str:
    """A fraction as per cent, in scientific notation without ``digits``; a dash for none."""
    if value is None or value != value:
        return "–"
    return f"{100 * value:.1e} %" if digits is None else f"{100 * value:.{digits}f} %"


def loading() -> contextlib.AbstractContextManager[object]:
    """A spinner while the libraries load, on a terminal."""
    return err.status("loading ...") if err.is_terminal else contextlib.nullcontext()


def show_warnings() -> None:
    """Print warnings as one plain line each."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        err.print(f"[yellow]wdprobe: warning:[/] {escape(printable(message))}", soft_wrap=True)

    warnings.showwarning = show


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


class TrainingProgress:
    """A live bar on a terminal, a plain line now and then elsewhere.

    Args:
        resumed: whether the run is gone on with.
    """

    def __init__(self, resumed: bool = False) -> None:
        self._resumed = resumed
        self._bar = _bar("[bold]step")
        self._task = self._bar.add_task("train", total=None, numbers="")
        self._total = 0
        self._before: int | None = None  # steps of a resumed run
        self._begun = self._told = time.monotonic()
        self._score = ""

    def __enter__(self) -> Self:
        """Return itself; the bar appears when training starts."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        if err.is_terminal:
            self._bar.stop()

    def started(
        self, total_steps: int, folder: Path, data: Any, layer_count: int, done: int
    ) -> None:
        """Say what is trained, and begin."""
        self._total, self._begun = total_steps, time.monotonic()
        err.print(
            f"{data.name}: {data.train_size:,} training and {data.test_size:,} test images, "
            f"{data.num_classes} classes · {layer_count} layers · writing {escape(str(folder))}",
            soft_wrap=True,
        )
        if done:
            err.print(f"going on after step {done} of {total_steps}")
        elif self._resumed:
            err.print("it was not saved before it ended: beginning at its start")
        self._bar.update(self._task, total=total_steps)
        if err.is_terminal:
            self._bar.start()

    def stepped(self, step: Any, record: Any) -> None:
        """Show a step."""
        now = time.monotonic()
        if self._before is None:
            self._before = step.step - 1
        pace = (step.step - self._before) / max(now - self._begun, 1e-9)
        rate = "" if record is None else f"R_op {share(record.rate)} · "
        numbers = f"loss {step.loss:.3f} · {rate}{pace:.1f} steps/s"
        shown = numbers + (self._score if err.width >= 100 else "")
        self._bar.update(self._task, completed=step.step, numbers=shown)
        if not err.is_terminal and (now - self._told > _LINE_SECONDS or step.step == self._total):
            self._told = now
            left = (self._total - step.step) / pace
            err.print(
                f"step {step.step}/{self._total} · {numbers}{self._score} · {left:.0f} s left",
                soft_wrap=True,
            )

    def scored(self, epoch: int, score: Any) -> None:
        """Remember the latest evaluation."""
        self._score = f" · top-1 {100 * score.top1:.1f} %"


def training_summary(summary: dict[str, Any]) -> None:
    """The result of `wdprobe train` and `wdprobe rop` for a person."""
    title = "Opposing-penalty rate" if summary["command"] == "rop" else "Training"
    scale = "" if summary["scale"] is None else f" ({summary['scale']})"
    status = "" if summary["status"] == "finished" else f" ({summary['status']})"
    out.print(
        f"\n[bold]{title}[/] · {escape(summary['model'])} on {escape(summary['dataset'])} · "
        f"{summary['steps']} steps{status}\n"
        f"{escape(summary['optimizer'])} · {summary['method']}{scale} · η {summary['lr']:g} · "
        f"λ {summary['weight_decay']:g}"
    )
    _scores(summary)
    if "rate" in summary:
        _rates(summary)
        _worst_layers(summary["layers"], summary["layer_definition"])
        for finding in summary["findings"]:
            _item(finding)
    out.print(f"\nRun folder: {escape(summary['run'])}", soft_wrap=True)


def _item(text: str) -> None:
    grid = Table.grid(padding=(0, 1))
    grid.add_row("•", escape(text))
    out.print(grid)


def _scores(summary: dict[str, Any]) -> None:
    found = [("top-1", summary["top1"])]
    if summary["epochs"] > 1:
        best = summary["best10"]
        found.append((f"mean of the best {best['epochs']} epochs", best["mean"]))
    found.append(("at the other moment", summary["other_top1"]))
    if summary["chosen"] is not None:
        where = f"at epoch {summary['chosen']['epoch']}, the best on validation"
        found.append((where, summary["chosen"]["top1"]))
    known = [(name, value) for name, value in found if value is not None and value == value]
    if known:
        out.print(" · ".join(f"{name} {share(value, 1)}" for name, value in known))


def _rates(summary: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "mean", "max", "last"):
        table.add_column(title, justify="left" if not title else "right")
    for title, key, digits in (
        ("R_op, share of weights", "rate", 3),
        ("R_op by size, share of Σ|P|", "mass", None),
        ("sign flips by the step alone", "flip_rate", 3),
        ("R_op, Eq. 10 read literally", "literal_rate", 3),
    ):
        if key in summary:
            values = summary[key]
            table.add_row(title, *(share(values[k], digits) for k in ("mean", "max", "last")))
    out.print(table)
    if "literal_rate" in summary:
        out.print(
            f"{summary['method']} decays the weight that the step then moves, so that no penalty "
            "opposes; read literally, Eq. 10 compares it with a step from the undecayed weight."
        )


def _worst_layers(layers: list[dict[str, Any]], definition: str) -> None:
    known = [layer for layer in layers if layer["rate"] is not None and layer["rate"] > 0]
    if not known:
        return
    worst = sorted(known, key=lambda layer: -layer["rate"])[:5]
    table = Table(
        box=None,
        pad_edge=False,
        header_style="bold",
        title=f"Layers that oppose most, of {len(layers)} ({definition})",
        title_justify="left",
        title_style="",
    )
    table.add_column("layer", justify="right")
    table.add_column("name", overflow="ellipsis", no_wrap=True, max_width=48)
    table.add_column("R_op", justify="right")
    table.add_column("by size", justify="right")
    table.add_column("")
    for layer in worst:
        bar = "█" * max(1, round(20 * layer["rate"] / worst[0]["rate"]))
        table.add_row(
            str(layer["index"]),
            escape(layer["name"]),
            share(layer["rate"]),
            share(layer["mass"], None),
            f"[blue]{bar}[/]",
        )
    out.print()
    out.print(table)
    out.print()


def layers_table(result: dict[str, Any]) -> None:
    """The result of `wdprobe layers` for a person."""
    out.print(
        f"[bold]{escape(result['model'])}[/] · n = {len(result['layers'])} layers "
        f"({result['definition']}) · {result['weights']:,} weights with {result['classes']:,} "
        f"classes · λ {result['weight_decay']:g}, "
        f"scale {result['scale']}, mean λᵢ {result['mean_rate']:.4g}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("i", justify="right", no_wrap=True)
    table.add_column("layer", overflow="ellipsis", no_wrap=True, max_width=max(20, out.width // 3))
    for title in ("tensors", "weights", "λᵢ"):
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    # What is left beside the five columns before it, so that rich drops none of them.
    left = max(16, out.width - out.width // 3 - 40)
    table.add_column("decaying tensors", overflow="ellipsis", no_wrap=True, max_width=left)
    for layer in result["layers"]:
        decaying, count = layer["decayed"], layer["tensors"]
        shown = "all" if len(decaying) == count else f"{len(decaying)} of {count}"
        named = "" if len(decaying) in (0, count) else ": " + ", ".join(_tails(layer))
        table.add_row(
            str(layer["index"]),
            escape(layer["name"]),
            str(count),
            f"{layer['weights']:,}",
            f"{layer['rate']:.3g}",
            escape(("none" if not decaying else shown) + named),
        )
    out.print(table)


def _tails(layer: dict[str, Any]) -> list[str]:
    """The decaying tensors' names without what they share."""
    parts = [name.split(".") for name in layer["decayed"]]
    shared = 0
    while len(parts) > 1 and len({tuple(p[: shared + 1]) for p in parts}) == 1:
        shared += 1
    return [".".join(p[shared:] or p[-1:]) for p in parts]


def to_stdout(text: str) -> None:
    """Machine-readable output, untouched by rich."""
    if not out.quiet:
        sys.stdout.write(json_for(sys.stdout.encoding, text) + "\n")


class ScanProgress:
    """A live bar for each phase of a scan on a terminal, a plain line now and then elsewhere."""

    def __init__(self) -> None:
        self._bar = _bar("[bold]{task.description:<10}")
        self._tasks: dict[str, Any] = {}
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        """Start the bar on a terminal."""
        if err.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        if err.is_terminal:
            self._bar.stop()

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
        now = time.monotonic()
        if not err.is_terminal and (now - self._told > _LINE_SECONDS or done == total):
            self._told = now
            err.print(f"{what} {done}/{total}" + (f" · {numbers}" if numbers else ""))


class SweepProgress(ScanProgress):
    """A live bar of cells on a terminal, a plain line now and then elsewhere."""

    def begun(self, total: int, kept: int) -> None:
        """Say how much there is to do."""
        self._total, self._kept, self._ended, self._running = total, kept, 0, 0
        self._lost = {"failed": 0, "diverged": 0}
        self._begun = time.monotonic()
        self._tasks.pop("cell", None)
        before = f", {kept} of them finished before" if kept else ""
        self.note(f"{total} cell{'s' * (total != 1)}{before}")

    def cell_started(self, cell: Any) -> None:
        """One more is running."""
        self._running += 1
        self._show()

    def cell_ended(self, cell: Any, summary: Any) -> None:
        """One is done; say so if it came to nothing."""
        self._running, self._ended = self._running - 1, self._ended + 1
        status = summary["status"]
        if status in self._lost:
            self._lost[status] += 1
            reason = summary.get("error") or f"at step {summary.get('steps')}"
            self.note(f"{status}: {cell.name} ({reason})")
        self._show()

    def _show(self) -> None:
        done = self._kept + self._ended
        lost = [f"{count} {status}" for status, count in self._lost.items() if count]
        numbers = " · ".join([f"{self._running} running", *lost])
        left = "–"
        if self._ended:
            pace = (time.monotonic() - self._begun) / self._ended
            left = duration(pace * (self._total - done))
        if "cell" not in self._tasks:
            self._tasks["cell"] = self._bar.add_task("cell", completed=self._kept, numbers="")
        task = self._tasks["cell"]
        self._bar.update(task, completed=done, total=self._total, numbers=numbers, left=left)
        now = time.monotonic()
        if not err.is_terminal and (now - self._told > _LINE_SECONDS or done == self._total):
            self._told = now
            err.print(f"cell {done}/{self._total} · {numbers} · {left} left")


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3:20 min, 5:07 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    first, rest = divmod(round(seconds) // (1 if seconds < 3600 else 60), 60)
    return f"{first}:{rest:02d} {'min' if seconds < 3600 else 'h'}"


def sweep_summary(result: dict[str, Any]) -> None:
    """The result of `wdprobe sweep` for a person: a table for each dataset, model and optimizer."""
    ends = ", ".join(f"{count} {status}" for status, count in sorted(result["counts"].items()))
    out.print(f"\n[bold]Sweep[/] · cells: {ends}")
    if result["chosen_by"].startswith("validation"):
        out.print(
            "Best η and λ by mean validation top-1; top-1 is that of the test images,\n"
            "both at each run's best epoch on validation."
        )
    else:
        out.print(
            "Best η and λ by mean test top-1 of each run's ten best epochs;\n"
            "without --val-split the best of many settings is flattered."
        )
    if any(row["seeds"] > 1 for row in result["best"]):
        out.print("±: the 95 % interval over seeds.")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result["best"]:
        groups.setdefault((row["model"], row["dataset"], row["opt"]), []).append(row)
    for (model, dataset, opt), rows in groups.items():
        out.print(f"\n[bold]{escape(model)}[/] on {escape(dataset)} · {escape(opt)}")
        out.print(_best_table(rows))
    out.print(f"\nFolder: {escape(result['run'])} (cells.csv has every cell)", soft_wrap=True)


def _best_table(rows: list[dict[str, Any]]) -> Table:
    usual = ("dataset", "model", "opt", "method", "lr", "weight_decay", "top1", "val_top1", "R_op",
             "seeds", "diverged", "tried")  # fmt: skip
    others = [key for key in rows[0] if key not in usual]
    columns = {"η": 8, "λ": 7, "top-1": 15, "R_op": 9}
    if out.width >= 110:
        columns |= {"validation": 10, "seeds": 5, "settings tried": 14}
    if any(row["diverged"] for row in rows):
        columns["lost"] = 4
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method", no_wrap=True, min_width=8)
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    for name, width in columns.items():
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    top = max((row["top1"]["mean"] for row in rows if row["top1"]["mean"] >= 0), default=None)
    for row in rows:
        cells = {
            "η": f"{row['lr']:g}",
            "λ": "–" if row["method"] == "baseline" else f"{row['weight_decay']:g}",
            "top-1": _spread(row["top1"]),
            "R_op": share(row["R_op"]),
            "validation": share(row["val_top1"], 2),
            "seeds": str(row["seeds"]),
            "settings tried": str(row["tried"]),
            "lost": str(row["diverged"] or ""),
        }
        table.add_row(
            *(escape(str(row[name])) for name in ("method", *others)),
            *(cells[name] for name in columns),
            style="bold" if row["top1"]["mean"] == top else "",
        )
    return table


def _spread(of: dict[str, float]) -> str:
    mean, half_width = of["mean"], of["half_width"]
    if mean != mean:
        return "–"
    spread = "" if half_width != half_width else f" ± {100 * half_width:.2f}"
    return f"{100 * mean:.2f}{spread} %"


def sweep_failures(result: dict[str, Any], shown: int = 10) -> None:
    """The cells that failed, on stderr."""
    failed = [row for row in result["cells"] if row["status"] == "failed"]
    if not failed:
        return
    err.print(
        f"{len(failed)} of {len(result['cells'])} cells failed; the same command tries again:"
    )
    for row in failed[:shown]:
        err.print(f"  {escape(row['cell'])}: {escape(row['error'])}", soft_wrap=True)
    if len(failed) > shown:
        err.print(f"  and {len(failed) - shown} more in cells.csv")


_SHOWN_SCALES = (1.0, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5, 0.25, 0.0)


def zeroshot_summary(summary: dict[str, Any]) -> None:
    """The result of `wdprobe zeroshot` for a person."""
    out.print(
        f"\n[bold]Zero-shot decay[/] · {escape(summary['model'])} · {escape(summary['source'])}\n"
        f"{summary['images']:,} images of {summary['img_size']}×{summary['img_size']}, "
        f"{summary['classes']} classes"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("scale", "top-1", "loss", "agreement", "KL"):
        table.add_column(title, justify="right")
    for point in summary["curve"]:
        if any(abs(point["scale"] - shown) < 1e-9 for shown in _SHOWN_SCALES):
            table.add_row(
                f"{point['scale']:.2f}",
                share(point["top1"], 1),
                number(point["loss"]),
                share(point["agreement"], 1),
                number(point["kl"]),
            )
    out.print(table)
    life, metric = summary["half_life"], summary["metric"].replace("top1", "top-1")
    if life is None or life != life:
        out.print(f"No half-life: {metric} starts at chance, or never loses half of what it has.")
    else:
        out.print(
            f"[bold]Half-life {life:.4f}[/]: {metric} has lost half of what it had above chance "
            f"when the weights are {share(1 - life, 2)} smaller."
        )
    _fragile(summary["parts"])
    _distorted(summary["distortion"])
    out.print(f"\nRun folder: {escape(summary['run'])}", soft_wrap=True)


def number(value: float | None) -> str:
    """A plain number; a dash where there is none."""
    return "–" if value is None or value != value else f"{value:.3f}"


def _fragile(parts: list[dict[str, Any]]) -> None:
    if not parts:
        return
    table = Table(
        box=None, pad_edge=False, header_style="bold", title="Decayed alone, most fragile first",
        title_justify="left", title_style="",
    )  # fmt: skip
    table.add_column("part", overflow="ellipsis", no_wrap=True, max_width=48)
    table.add_column("half-life", justify="right")
    table.add_column("weights", justify="right")
    for part in parts[:12]:
        life = part["half_life"]
        shown = "none" if life is None or life != life else f"{life:.3f}"
        table.add_row(escape(part["name"]), shown, f"{part['weights']:,}")
    out.print()
    out.print(table)
    if len(parts) > 12:
        out.print(f"and {len(parts) - 12} more in summary.json")


def _distorted(found: list[dict[str, Any]]) -> None:
    known = [f for f in found if f["distortion"] is not None and f["distortion"] == f["distortion"]]
    if not known:
        return
    table = Table(
        box=None, pad_edge=False, header_style="bold", title_justify="left", title_style="",
        title=f"Output distorted most at scale {known[0]['scale']:g}",
    )  # fmt: skip
    table.add_column("layer", justify="right")
    table.add_column("name", overflow="ellipsis", no_wrap=True, max_width=48)
    table.add_column("1 − cos²", justify="right")
    table.add_column("norm ratio", justify="right")
    for layer in sorted(known, key=lambda f: -f["distortion"])[:5]:
        table.add_row(
            str(layer["index"]), escape(layer["name"]), f"{layer['distortion']:.2g}",
            number(layer["norm_ratio"]),
        )  # fmt: skip
    out.print()
    out.print(table)


def zeroshot_comparison(summaries: list[dict[str, Any]], folder: Path) -> None:
    """Half-lives of several models, most robust first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("model", "half-life"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for summary in sorted(summaries, key=_half_life):
        table.add_row(escape(f"{summary['model']} · {summary['source']}"),
                      number(summary["half_life"]))  # fmt: skip
    out.print()
    out.print(table)
    out.print(f"Figure: {escape(str(folder / 'figures' / 'zeroshot.png'))}", soft_wrap=True)


def _half_life(summary: dict[str, Any]) -> float:
    """The half-life, or what is more than any where there is none."""
    life = summary["half_life"]
    return math.inf if life is None or life != life else life


def report_written(result: dict[str, Any]) -> None:
    """Where `wdprobe report` wrote its page."""
    out.print(f"Report: {escape(result['page'])}", soft_wrap=True)


def audit_report(result: dict[str, Any]) -> None:
    """The result of `wdprobe audit --opt` for a person."""
    out.print(
        f"[bold]{escape(result['optimizer'])}[/] ({escape(result['name'])}) on "
        f"{escape(result['model'])} · η {result['lr']:g} · λ {result['weight_decay']:g}\n"
        f"[bold]{result['rule']}[/]: {_RULES[result['rule']]}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("groups", justify="right", no_wrap=True)
    table.add_column("tensors", justify="right")
    table.add_column("such as", overflow="ellipsis", no_wrap=True, max_width=out.width // 3)
    table.add_column("rule")
    for title in ("ηλ", "takes off", "× ηλ"):
        table.add_column(title, justify="right", no_wrap=True)
    for alike in _alike(result["tensors"]):
        first, shares = alike[0], [t["observed"] for t in alike if t["observed"] == t["observed"]]
        share = sum(shares) / len(shares) if shares else None
        expected = first["expected"]
        table.add_row(
            _span([t["group"] for t in alike]), str(len(alike)), escape(first["name"]),
            first["rule"],
            f"{expected:.3g}",
            "–" if share is None else f"{share:.3g}",
            f"{share / expected:.3g}" if share is not None and expected else "–",
        )  # fmt: skip
    out.print(table)
    for warning in result["warnings"]:
        out.print(f"• {escape(warning)}")


_RULES = {
    "none": "nothing decays",
    "baseline": "nothing decays",
    "mixed": "tensors decay by several rules",
    "l1": "L1: λ·sign(θ) is added to the gradient",
    "l2": "L2: λθ is added to the gradient and goes through the step",
    "wd": "decoupled: ηλθ is taken off beside the step",
    "rwd": "decoupled: c·û is taken off after the step",
    "pwd": "decoupled: c·θ is taken off before the forward pass",
    "lpwd": "decoupled, with a rate for each layer: c·θ is taken off before the forward pass",
    "proximal": "decoupled: û is divided by 1 + ηλ after the step",
    "scaled": "decoupled: a multiple of ηλθ is taken off beside the step",
    "other": "no closed rule",
}


def _alike(tensors: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Tensors of one rule, one strength and one number of dimensions together."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for tensor in tensors:
        kind = (tensor["rule"], len(tensor["shape"]), tensor["expected"])
        found.setdefault(kind, []).append(tensor)
    return list(found.values())


def _span(numbers: list[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least}–{most}"


def survey_table(result: dict[str, Any]) -> None:
    """The result of `wdprobe audit --all` for a person."""
    rows = result["optimizers"]
    audited = [row for row in rows if not row["error"]]
    out.print(
        f"{len(audited)} of {len(rows)} optimizers audited · η {result['lr']:g} · "
        f"λ {result['weight_decay']:g}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("optimizer", no_wrap=True)
    table.add_column("rule")
    table.add_column("× ηλ", justify="right", no_wrap=True)
    table.add_column("remarks")
    for row in audited:
        table.add_row(
            escape(row["name"]), row["rule"], row["multiple"] or "–",
            escape("; ".join(row["remarks"])),
        )  # fmt: skip
    out.print(table)
    if len(audited) < len(rows):
        out.print("\n[bold]Not audited here[/]")
    for row in rows:
        if row["error"]:
            out.print(f"{escape(row['name'])}: {escape(row['error'])}", soft_wrap=True)


def paper_result(result: dict[str, Any]) -> None:
    """The result of `wdprobe reproduce` for a person."""
    columns, rows = list(result["columns"]), [list(row) for row in result["rows"]]
    same = [k for k in range(len(columns)) if len(rows) > 1 and len({row[k] for row in rows}) == 1]
    about = {"dataset": "{}", "model": "{}", "optimizer": "{}", "η": "η {}", "λ": "λ {}"}
    told = " · ".join(about[columns[k]].format(rows[0][k]) for k in same if columns[k] in about)
    out.print(f"\n[bold]{escape(result['title'])}[/]" + (f"\n{escape(told)}" if told else ""))
    shown = [k for k in range(len(columns)) if k not in same or columns[k] == "method"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    room, left_out = out.width, 0
    for k in shown:
        cells = [row[k] for row in rows]
        body, title = max(map(len, cells), default=0), max(map(len, columns[k].split()))
        room -= max(body, title) + 2
        if room < 0:
            left_out += 1  # and all that follow: room only shrinks
            continue
        numeric = all(cell[:1] in "+-–0123456789" for cell in cells)
        table.add_column(columns[k], justify="right" if numeric else "left")
    kept = len(table.columns)
    for row in rows:
        table.add_row(*(escape(row[k]) for k in shown[:kept]))
    out.print(table)
    if left_out:
        out.print(f"{left_out} more columns in {escape(result['files'][0])}", soft_wrap=True)
    for note in result["notes"]:
        out.print(f"• {escape(note)}")
    for path in result["failed"]:
        out.print(f"failed: {escape(path)}", soft_wrap=True)
    out.print(f"\nWritten: {escape(', '.join(result['files']))}", soft_wrap=True)
