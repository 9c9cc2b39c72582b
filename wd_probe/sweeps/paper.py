"""`wdprobe reproduce`: every table and figure of the paper as something that can be run again.

Each experiment is a grid of ordinary training runs (:mod:`.sweeps`) and a way to show what it came
to. All of them share one folder of cells, so what one has run the next need not.
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from matplotlib.figure import Figure

from ..arguments import check_choice
from ..errors import InputError, counted, shown_line
from ..runs import figures
from ..runs.folder import dumps, write_whole
from ..runs.locks import Lock
from ..runs.reading import read_run
from ..training.options import ZeroshotOptions
from ..training.recipe_options import chosen, told
from ..training.scan import Listener as ScanListener
from ..training.scan import scan
from ..wording import half_life_cells, percent, plus_minus
from . import paper_figures
from .cells import Runner, SweepListener, empty, sweep
from .grid import Cell, grid
from .options import PaperOptions
from .results import (
    Basis,
    Interval,
    Setting,
    basis,
    best_settings,
    difference,
    interval,
    paired,
    robustness,
    settings,
)

#: Table 2.
LEARNING_RATES = {
    "adam": (0.001, 0.0005, 0.0001, 0.00005, 0.00001),
    "momentum": (0.1, 0.05, 0.01, 0.005, 0.001),
}
WEIGHT_DECAYS = (0.5, 0.1, 0.05, 0.01, 0.005, 0.001, 0.0005)
CONVNEXT, SWIN = "convnext_tiny.fb_in22k", "swin_tiny_patch4_window7_224.ms_in22k"
SCALES = tuple(f"convnext_{scale}.fb_in22k" for scale in ("tiny", "small", "base", "large"))
CIFAR10, CIFAR100 = "torch/cifar10", "torch/cifar100"

#: Table 1: mean and standard deviation of the best ten test top-1, in per cent.
TABLE1 = {
    "baseline": ("90.53±0.08 89.97±0.01 89.28±0.08 88.72±0.04",
                 "73.06±0.07 72.51±0.02 71.91±0.10 71.13±0.11"),
    "l2": ("89.85±0.12 90.06±0.04 88.84±0.10 88.56±0.16",
           "72.74±0.36 72.46±0.17 71.61±0.08 71.26±0.16"),
    "wd": ("90.77±0.05 90.13±0.02 89.47±0.10 88.74±0.09",
           "73.88±0.22 72.81±0.03 72.07±0.10 71.42±0.10"),
    "lpwd": ("91.03±0.11 90.28±0.05 89.73±0.10 88.98±0.08",
             "74.48±0.04 73.38±0.08 72.70±0.09 71.95±0.10"),
}  # fmt: skip
#: Table 3, ConvNeXt-T with Adam on Cifar-100.
TABLE3 = {"wd": "73.88±0.22", "rwd": "74.19±0.08", "pwd": "74.29±0.11", "lpwd": "74.48±0.04"}


def published(dataset: str, model: str, opt: str, method: str, table: str) -> str:
    """The paper's own mean for a row, its standard deviation in brackets; "–" where it has none."""
    mean, _, deviation = _published(dataset, model, opt, method, table).partition("±")
    return f"{mean} ({deviation})" if deviation else mean


def _published(dataset: str, model: str, opt: str, method: str, table: str) -> str:
    if table == "table3":
        same = (dataset, model, opt) == (CIFAR100, CONVNEXT, "adam")
        return TABLE3.get(method, "–") if same else "–"
    if (
        dataset not in (CIFAR10, CIFAR100)
        or model not in (CONVNEXT, SWIN)
        or opt not in LEARNING_RATES
    ):
        return "–"
    row = TABLE1.get(method, ("– – – –",) * 2)[dataset == CIFAR100].split()
    return row[2 * (model == SWIN) + (opt == "momentum")]


@dataclass(slots=True)
class Result:
    """The result of an experiment: rows of a table, lines that say how they were made, figures."""

    columns: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)


class PaperListener(SweepListener, ScanListener, Protocol):
    """Is told how the runs and the scans go."""


@dataclass(frozen=True, slots=True)
class _Context:
    """An experiment, its grid, and the grid's results."""

    name: str
    options: PaperOptions
    cells: tuple[Cell, ...]
    found: list[Setting]
    listener: PaperListener

    def of(self, **wanted: Any) -> list[Setting]:
        """The settings whose fields have these values."""
        return [s for s in self.found if all(getattr(s, k) == v for k, v in wanted.items())]

    @property
    def basis(self) -> Basis:
        """By what settings are chosen."""
        return basis(self.found)

    def best(self, **wanted: Any) -> dict[str, Setting]:
        """By method the best of the settings whose fields have these values."""
        found = best_settings(self.of(**wanted), self.basis)
        return {best.setting.method: best.setting for best in found}

    def subjects(self) -> list[tuple[str, str, str]]:
        """(dataset, model, optimizer), each once."""
        return list(dict.fromkeys((s.dataset, s.model, s.opt) for s in self.found))


@dataclass(frozen=True, slots=True)
class Experiment:
    """One table or figure."""

    title: str
    methods: tuple[str, ...]
    show: Callable[[_Context], Result]
    datasets: tuple[str, ...] = (CIFAR100,)
    models: tuple[str, ...] = (CONVNEXT, SWIN)
    opts: tuple[str, ...] = ("adam", "momentum")
    lrs: tuple[float, ...] = ()  # empty: Table 2's, of the optimizer
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS


def reproduce(
    name: str,
    options: PaperOptions,
    listener: PaperListener,
    *,
    runner: Runner | None = None,
    consent: bool = False,
) -> dict[str, Any]:
    """Run what one table or figure needs, and write it as Markdown, CSV and PNG.

    Args:
        name: "table1", "table3", "fig1", "fig2", "fig3a", "fig3b", "fig4" or "fig5".
        options: what to run; cells that ``options.output`` has already are not run again.
        listener: is told how it goes.
        runner: see :func:`.sweeps.sweep`.
        consent: to more than 10,000 cells.

    Returns:
        The table's columns, rows and notes, and where everything was written.

    Raises:
        InputError: an unknown experiment, or options, data or models that cannot be used.
        Busy: another process is writing to the folder.
        RunError: interrupted, or no cell gave a result.
    """
    check_choice(name, "experiment", EXPERIMENTS)
    cells = paper_grid(EXPERIMENTS[name], options)
    with Lock(options.output):
        summaries = sweep(cells, options.output, listener, runner=runner, consent=consent)
        failed = [s for s in summaries if s["status"] == "failed"]
        context = _Context(name, options, cells, settings(cells, summaries), listener)
        result = EXPERIMENTS[name].show(context)
        if any("±" in text for row in result.rows for text in row):
            result.notes.append("±: the 95 % interval over seeds.")
        result.notes += _how(context)
        if failed:
            result.notes.append(
                f"{len(failed)} of {counted(len(cells), 'cell')} failed: {failed[0]['error']}"
            )
        written = _write(name, result, options.output)
    return {
        "command": "reproduce",
        "experiment": name,
        "title": EXPERIMENTS[name].title,
        "columns": result.columns,
        "rows": result.rows,
        "notes": result.notes,
        "cells": len(cells),
        "failed": [s["run"] for s in failed],
        "diverged": [s["run"] for s in summaries if s["status"] == "diverged"],
        "files": [str(path) for path in written],
        "run": str(options.output),
    }


def paper_grid(experiment: Experiment, options: PaperOptions) -> tuple[Cell, ...]:
    """The cells of an experiment, seed by seed, so that a part of them is a smaller grid."""
    found: dict[str, Cell] = {}
    for seed in range(options.seeds):
        for opt in options.opts or experiment.opts:
            axes = {
                "seed": (seed,),
                "dataset": options.datasets or experiment.datasets,
                "model": options.models or experiment.models,
                "opt": (opt,),
                "method": options.methods or experiment.methods,
                "lr": options.lrs or experiment.lrs or _learning_rates(opt),
                "weight_decay": options.weight_decays or experiment.weight_decays,
            }
            found |= {cell.name: cell for cell in grid(options.setting, axes)}
    return tuple(found.values())


def _learning_rates(opt: str) -> tuple[float, ...]:
    if opt not in LEARNING_RATES:
        name = shown_line(opt, 80)
        raise InputError(f"Table 2 has no learning rates for {name}; give them with --lr")
    return LEARNING_RATES[opt]


def _how(context: _Context) -> list[str]:
    """How the runs were made; stands under every table and figure."""
    o = context.options.setting
    size = "all training images" if o.train_samples is None else counted(o.train_samples, "image")
    weights = "pretrained weights" if o.pretrained else "random weights"
    if o.checkpoint is not None:
        weights = f"weights of {shown_line(o.checkpoint.name, 80)}"
    once = f"R_op once in {counted(o.every, 'step')}"
    measured = {0: "R_op was not measured", 1: "R_op at every step"}.get(o.every, once)
    rates = sorted({s.lr for s in context.found}), sorted({s.weight_decay for s in context.found})
    listed = [", ".join(f"{rate:g}" for rate in values) for values in rates]
    recipe = told({"sched": "constant"} | chosen(o)).replace("sched constant", "constant η")
    return [
        f"{counted(context.options.seeds, 'seed')}; {counted(o.epochs, 'epoch')} of {size}, "
        f"batch {o.batch_size}, {o.img_size}×{o.img_size}, {weights}, {recipe}; "
        f"grid η {{{listed[0]}}} × λ {{{listed[1]}}}; {measured}.",
    ]


_CHOSEN = {
    "validation": "η and λ of each row were chosen by the mean over seeds of the best top-1 on a "
    "validation split of the training images ({}), never on test images.",
    "test": "There was no validation split: η and λ of each row were chosen on the test images, as "
    "in the paper, which flatters every row.",
}
_RINGED = {
    "validation": "chosen on validation images, while the map is of test images",
    "test": "chosen on the test images themselves",
}


# --- tables ---------------------------------------------------------------------------------------


def _spread(values: Sequence[float]) -> str:
    """Their mean and its interval, under a heading that says per cent."""
    found = interval(values)
    return plus_minus(found.mean, found.half_width, 2, unit="")


def _table(context: _Context) -> Result:
    """The form of Tables 1 and 3: each method at its best setting, and against wd seed by seed."""
    result = Result(
        columns=(
            "dataset", "model", "optimizer", "method", "η", "λ", "best-10 top-1, %", "paper",
            "last top-1, %", "at the other moment, %", "against wd", "p", "R_op, %",
            "R_op to the letter, %", "falls by, λ within 10×",
        )
    )  # fmt: skip
    for dataset, model, opt in context.subjects():
        own = context.of(dataset=dataset, model=model, opt=opt)
        chosen = context.best(dataset=dataset, model=model, opt=opt)
        for method in chosen:
            result.rows.append(_row(context, own, chosen, (dataset, model, opt, method)))
    result.notes += [
        _CHOSEN[context.basis].format(percent(context.options.setting.val_split)),
        "best-10: the paper's measure, the mean of the ten best test top-1 of a run (of all epochs "
        "where there are fewer), then the mean over seeds; it chooses epochs by the test set. "
        "last: after the last epoch, the same of every method.",
        "The other moment (theory, fact 8): what an evaluation sees of rwd before its decay, of "
        "pwd and lpwd after it.",
        "paper: its own mean, in brackets the standard deviation of the ten epochs, which is no "
        "interval over seeds.",
        "against wd: mean difference of last top-1, in points, seed by seed; p of a paired t-test.",
        "falls by: the largest drop of last top-1 where λ moves by up to ten times at the same η.",
    ]
    return result


def _row(
    context: _Context,
    own: Sequence[Setting],
    chosen: Mapping[str, Setting],
    key: tuple[str, str, str, str],
) -> tuple[str, ...]:
    setting, wd = chosen[key[3]], chosen.get("wd")
    paper = published(*key, table=context.name)
    gap = None
    if wd is not None and setting is not wd:
        gap = paired(setting, wd, "top1")
    same = [s for s in own if s.method == setting.method]
    return (
        *key,
        f"{setting.lr:g}",
        f"{setting.weight_decay:g}" if setting.weight_decay else "–",
        _spread(setting.values("best10", "mean")),
        paper,
        _spread(setting.values("top1")),
        _spread(setting.values("other_top1")),
        "–" if gap is None else f"{100 * gap.interval.mean:+.2f}",
        "–" if gap is None or not math.isfinite(gap.p) else f"{gap.p:.2f}",
        percent(setting.mean("rate", "mean"), unit=""),
        percent(setting.mean("literal_rate", "mean"), unit=""),
        percent(robustness(same, setting), 2, unit="") if setting.weight_decay else "–",
    )


# --- figures --------------------------------------------------------------------------------------


def _fig1(context: _Context) -> Result:
    result = Result(columns=("dataset", "model", "optimizer", "method", "η", "λ", "training loss",
                             "best-10 top-1, %", "last top-1, %", "diverged"))  # fmt: skip
    for setting in context.found:
        result.rows.append(
            (
                setting.dataset, setting.model, setting.opt, setting.method, f"{setting.lr:g}",
                f"{setting.weight_decay:g}",
                f"{setting.mean('train_loss'):.3f}",
                _spread(setting.values("best10", "mean")),
                _spread(setting.values("top1")),
                f"{setting.diverged} of {len(setting.cells)}",
            )
        )  # fmt: skip
    for number, (dataset, model, opt) in enumerate(context.subjects(), start=1):
        own = context.of(dataset=dataset, model=model, opt=opt)
        result.figures[f"fig1_{number}"] = paper_figures.strong_penalty(
            f"{model} on {dataset}, {opt}",
            [
                (f"{s.method} · η {s.lr:g} · λ {s.weight_decay:g}",
                 [read_run(Path(c["run"])).epochs for c in s.cells])
                for s in own
            ],
        )  # fmt: skip
    return result


def _fig2(context: _Context) -> Result:
    result = Result(columns=("dataset", "model", "optimizer", "η", "λ", "mean R_op, %",
                             "max R_op, %", "last top-1, %"))  # fmt: skip
    for s in context.found:
        result.rows.append(
            (
                s.dataset, s.model, s.opt, f"{s.lr:g}", f"{s.weight_decay:g}",
                percent(s.mean("rate", "mean"), unit=""),
                percent(s.mean("rate", "max"), unit=""),
                _spread(s.values("top1")),
            )
        )  # fmt: skip
    for number, (dataset, model, opt) in enumerate(context.subjects(), start=1):
        own = context.of(dataset=dataset, model=model, opt=opt, method="wd")
        title = f"{model} on {dataset}, {opt}"
        result.figures[f"fig2a_{number}"] = paper_figures.over_training(
            title,
            [(s.lr, s.weight_decay, read_run(Path(s.cells[0]["run"])).steps) for s in own],
        )
        means = _by_rates(own, "rate", "mean")
        result.figures[f"fig2b_{number}"] = figures.lr_decay_maps(
            {"wd": means},
            f"Mean R_op\n{title}",
            label="R_op",
            best={"wd": _top(means)},
            digits=None,
        )
    return result


def _by_rates(found: Sequence[Setting], *path: str) -> dict[tuple[float, float], float]:
    """A figure's mean over seeds by (η, λ); NaN where a seed diverged."""
    return {(s.lr, s.weight_decay): math.nan if s.diverged else s.mean(*path) for s in found}


def _top(values: Mapping[tuple[float, float], float]) -> tuple[float, float] | None:
    known = {key: value for key, value in values.items() if math.isfinite(value)}
    return max(known, key=known.__getitem__) if known else None


def _fig3a(context: _Context) -> Result:
    result = Result(columns=("dataset", "model", "optimizer", "η", "seed", "top-1, %", "half-life",
                             "taken off"))  # fmt: skip
    runs = []
    for dataset, model, opt in context.subjects():
        (setting,) = context.best(dataset=dataset, model=model, opt=opt).values()
        for cell in setting.cells:
            folder = context.options.output / "zeroshot" / Path(cell["run"]).name
            summary = _scanned(Path(cell["run"]), folder, context)
            result.rows.append(
                (dataset, model, opt, f"{cell['lr']:g}", str(cell["seed"]),
                 percent(summary["curve"][0]["top1"], 2, unit=""),
                 *half_life_cells(summary["half_life"], 4))
            )  # fmt: skip
            runs.append(read_run(folder))
    if runs:
        result.figures["fig3a"] = figures.zero_shot(runs)
    result.notes.append(
        "half-life: the scale at which half of the top-1 above chance is lost, "
        "and the share of the weights taken off there."
    )
    return result


def _scanned(run: Path, folder: Path, context: _Context) -> Mapping[str, Any]:
    if (folder / "summary.json").is_file():
        kept = read_run(folder).summary
        if kept is not None:
            return kept
    with Lock(folder):
        empty(folder)
    o = context.options.setting
    options = ZeroshotOptions(
        run=run, batch_size=o.batch_size, device=o.device, distortion=False, output=folder,
        data_dir=o.data_dir, update_bn=o.update_bn,
    )  # fmt: skip
    return scan(options, context.listener)


def _fig3b(context: _Context) -> Result:
    result = Result(
        columns=("dataset", "model", "optimizer", "η", "λ", "rwd best-10, %", "pwd best-10, %",
                 "pwd − rwd, best-10", "p", "pwd − rwd, last", "pwd − rwd at one moment, last")
    )  # fmt: skip
    for number, (dataset, model, opt) in enumerate(context.subjects(), start=1):
        lines: dict[str, list[tuple[float, Interval]]] = {}
        for rwd in context.of(dataset=dataset, model=model, opt=opt, method="rwd"):
            (pwd,) = context.of(
                dataset=dataset, model=model, opt=opt, method="pwd", lr=rwd.lr,
                weight_decay=rwd.weight_decay,
            ) or (None,)  # fmt: skip
            if pwd is None:
                continue
            ten = paired(pwd, rwd, "best10", "mean")
            last = paired(pwd, rwd, "top1")
            one = difference(pwd.values("other_top1"), rwd.values("top1"))  # after the last epoch
            for name, gap in (
                ("best ten, each at its own moment", ten),
                ("last epoch, at one moment", one),
            ):
                points = lines.setdefault(f"{name} · η {rwd.lr:g}", [])
                points.append((rwd.weight_decay, gap.interval))
            result.rows.append(
                (
                    dataset, model, opt, f"{rwd.lr:g}", f"{rwd.weight_decay:g}",
                    _spread(rwd.values("best10", "mean")),
                    _spread(pwd.values("best10", "mean")),
                    f"{100 * ten.interval.mean:+.2f}",
                    f"{ten.p:.2f}" if math.isfinite(ten.p) else "–",
                    f"{100 * last.interval.mean:+.2f}",
                    f"{100 * one.interval.mean:+.2f}",
                )
            )  # fmt: skip
        result.figures[f"fig3b_{number}"] = paper_figures.improvement(
            f"{model} on {dataset}, {opt}", lines
        )
    result.notes.append(
        "At one moment: both read after a decay. There pwd is rwd started from (1 − c)θ₀ instead "
        "of θ₀ (theory, fact 8): what is left between them is chance."
    )
    return result


def _fig4(context: _Context) -> Result:
    result = Result(
        columns=("dataset", "model", "optimizer", "method", "η", "λ", "best-10 top-1, %",
                 "last top-1, %", "R_op, %", "diverged")
    )  # fmt: skip
    for s in context.found:
        result.rows.append(
            (
                s.dataset, s.model, s.opt, s.method, f"{s.lr:g}", f"{s.weight_decay:g}",
                _spread(s.values("best10", "mean")),
                _spread(s.values("top1")),
                percent(s.mean("rate", "mean"), unit=""),
                f"{s.diverged} of {len(s.cells)}",
            )
        )  # fmt: skip
    for number, (dataset, model, opt) in enumerate(context.subjects(), start=1):
        own = context.of(dataset=dataset, model=model, opt=opt)
        maps = {
            method: _by_rates([s for s in own if s.method == method], "best10", "mean")
            for method in dict.fromkeys(s.method for s in own)
        }
        result.figures[f"fig4_{number}"] = figures.lr_decay_maps(
            maps,
            f"Best-10 top-1\n{model} on {dataset}, {opt}",
            best={
                method: (s.lr, s.weight_decay)
                for method, s in context.best(dataset=dataset, model=model, opt=opt).items()
                if not s.diverged
            },
        )
    result.notes.append(f"Ring: the best η and λ of each method, {_RINGED[context.basis]}.")
    return result


def _fig5(context: _Context) -> Result:
    result = _table(context)
    for number, (dataset, opt) in enumerate(
        dict.fromkeys((d, o) for d, _, o in context.subjects()), start=1
    ):
        lines: dict[str, list[tuple[str, Interval]]] = {}
        for model in dict.fromkeys(s.model for s in context.found):
            for method, setting in context.best(dataset=dataset, model=model, opt=opt).items():
                top1 = interval(setting.values("best10", "mean"))
                lines.setdefault(method, []).append((model, top1))
        result.figures[f"fig5_{number}"] = paper_figures.by_scale(f"{dataset}, {opt}", lines)
    return result


EXPERIMENTS: dict[str, Experiment] = {
    "table1": Experiment(
        "Table 1: baseline, L2, wd and lpwd, each at its best η and λ",
        ("baseline", "l2", "wd", "lpwd"), _table, datasets=(CIFAR10, CIFAR100),
    ),
    "table3": Experiment(
        "Table 3: wd, rwd, pwd and lpwd, each at its best η and λ",
        ("wd", "rwd", "pwd", "lpwd"), _table, models=(CONVNEXT,), opts=("adam",),
    ),
    "fig1": Experiment(
        "Fig. 1: loss and top-1 under a strong penalty",
        ("wd", "lpwd"), _fig1, opts=("adam",), lrs=(0.001,), weight_decays=(0.5,),
    ),
    "fig2": Experiment("Fig. 2: R_op over training, and over η and λ", ("wd",), _fig2),
    "fig3a": Experiment(
        "Fig. 3a: zero-shot decay of models trained without decay",
        ("baseline",), _fig3a, opts=("adam",), weight_decays=(0.01,),
    ),
    "fig3b": Experiment(
        "Fig. 3b: pwd over rwd as a function of λ",
        ("rwd", "pwd"), _fig3b, models=(CONVNEXT,), opts=("adam",), lrs=(0.001,),
    ),
    "fig4": Experiment("Fig. 4: top-1 over η and λ", ("lpwd", "wd"), _fig4),
    "fig5": Experiment(
        "Fig. 5: wd and lpwd at the scales of ConvNeXt",
        ("wd", "lpwd"), _fig5, models=SCALES, opts=("adam",),
    ),
}  # fmt: skip


# --- files ----------------------------------------------------------------------------------------


def markdown(title: str, result: Result) -> str:
    """The table and its notes as Markdown."""
    cells = [result.columns, *result.rows]
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in cells]
    lines.insert(1, "|" + "---|" * len(result.columns))
    return "\n".join([f"## {title}", "", *lines, "", *(f"- {note}" for note in result.notes), ""])


def _write(name: str, result: Result, folder: Path) -> list[Path]:
    page, table = folder / f"{name}.md", folder / f"{name}.csv"
    write_whole(page, markdown(EXPERIMENTS[name].title, result))
    with table.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        csv.writer(file).writerows([result.columns, *result.rows])
    write_whole(
        folder / f"{name}.json",
        dumps({"columns": result.columns, "rows": result.rows, "notes": result.notes}, indent=2),
    )
    figures.save(result.figures, folder / "figures")
    drawn = [folder / "figures" / f"{figure}.png" for figure in result.figures]
    return [page, table, folder / f"{name}.json", *drawn]
