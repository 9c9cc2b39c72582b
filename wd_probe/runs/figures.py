"""A run's records as figures."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..wording import decimal, half_life_told, percent
from .decay_figures import draw_decay
from .letters import show_letters
from .style import (
    INK,
    SERIES,
    InPercent,
    dress,
    layer_rows,
    layers_high,
    line_look,
    new_figure,
    short,
    smooth,
    title_of,
)  # fmt: skip

if TYPE_CHECKING:
    from .reading import Run

_LINE, _SECOND = SERIES[:2]
_RING, _DARK, _LIGHT = "#e8453c", "#111111", "#fefefe"  # on a colour map
_COLUMNS = 1000  # of a map whose steps are not evenly spaced


def opposing_rate(run: "Run") -> Figure:
    """R_op over the steps of a run (the form of Fig. 2a), as share of weights and of penalty."""
    return _over_steps(
        run, "Opposing-penalty rate", {"rate": "share of weights", "mass": "share of Σ|P|"}
    )


def flip_rate(run: "Run") -> Figure:
    """What a method that never opposes does have: sign flips by the step, and the literal R_op."""
    panels = {
        "flip_rate": "signs flipped\nby the step",
        "literal_rate": "R_op, Eq. 10\nto the letter",
    }
    shown = {name: label for name, label in panels.items() if _any(run.steps, name)}
    return _over_steps(run, "Sign flips, where no penalty opposes", shown)


def _over_steps(run: "Run", title: str, panels: Mapping[str, str]) -> Figure:
    """One column or two of the table of steps, the first with more room."""
    figure = new_figure(f"{title}\n{title_of(run)}", height=4.6 if len(panels) > 1 else 3.4)
    ratios = (3, 1.5)[: len(panels)]
    drawn = figure.subplots(len(panels), sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    for axes, (name, label), colour in zip(drawn, panels.items(), SERIES, strict=False):
        dress(axes, label, "step" if axes is drawn[-1] else "")
        values = np.asarray(run.steps[name])
        known = np.isfinite(values)
        steps, values = np.asarray(run.steps["step"])[known], values[known]
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.4, label="each step")
        if len(values) >= 2:
            axes.plot(steps, smooth(values), color=colour, linewidth=1.8, label="smoothed")
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(InPercent())
        if len(values):
            top = int(values.argmax())
            axes.scatter(steps[top], values[top], s=36, facecolors="none", edgecolors=INK, zorder=3)
            axes.annotate(
                f"max {percent(values[top])}",
                (steps[top], values[top]),
                xytext=(7, 1),
                textcoords="offset points",
                fontsize=8,
            )
    drawn[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn[0].legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def layer_heatmap(
    run: "Run",
    column: str = "rate",
    title: str = "R_op by layer",
    label: str = "opposing penalties",
) -> Figure:
    """R_op, or another column, of every layer over the steps; shallow layers on top."""
    steps = np.unique(run.layers["step"])
    count = len(run.layer_names)
    grid = _empty(count, len(steps), len(run.layers["step"]))
    columns = np.searchsorted(steps, run.layers["step"])
    grid[np.asarray(run.layers["index"], dtype=int) - 1, columns] = run.layers[column]
    grid, steps = _evenly(grid, steps)
    figure = new_figure(f"{title}\n{title_of(run)}", height=layers_high(count))
    axes = dress(figure.subplots(), "layer (1 = shallowest)", "step")
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    finite = grid[np.isfinite(grid)]
    # One extreme layer or step must not turn the rest into one colour.
    top = float(np.quantile(finite, 0.99)) if finite.size else 0.0
    image = axes.imshow(
        grid,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=0,
        vmax=top or 1e-9,
        extent=(steps[0] - 0.5, steps[-1] + 0.5, count + 0.5, 0.5),
    )
    layer_rows(axes, run.layer_names)
    bar = figure.colorbar(image, ax=axes, format=InPercent(), extend="max", pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)
    return figure


def _evenly(
    grid: NDArray[np.float64], steps: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Columns at evenly spaced steps: the largest of those on one place, else the one before."""
    if len(steps) < 3 or not np.ptp(np.diff(steps)):
        return grid, steps
    count = int(min(_COLUMNS, steps[-1] - steps[0] + 1))
    place = ((steps - steps[0]) / (steps[-1] - steps[0]) * (count - 1)).round().astype(int)
    even = np.full((len(grid), count), np.nan)
    np.fmax.at(even.T, place, grid.T)
    filled = np.zeros(count, dtype=int)
    filled[place] = place
    return even[:, np.maximum.accumulate(filled)], np.linspace(steps[0], steps[-1], count)


def decay_profile(run: "Run") -> Figure:
    """R_op as a function of the decay rate λ, from the recorded updates of one run (fact 4)."""
    figure = new_figure(f"R_op had λ been another\n{title_of(run)}")
    axes = dress(figure.subplots(), "opposing penalties", "weight decay λ")
    asked = {
        (decimal(rate), step): opposing / max(penalized, 1)
        for rate, step, opposing, penalized in zip(
            *(run.profile[name] for name in ("rate", "step", "opposing", "penalized")), strict=True
        )
    }
    rates = sorted({rate for rate, _ in asked})
    if len(asked) != len(rates) * len({step for _, step in asked}):
        raise ValueError("profile.csv has not the same decay rates at every step")
    curves = np.array([asked[key] for key in sorted(asked)]).reshape(len(rates), -1)
    low, middle, high = np.quantile(curves, [0.1, 0.5, 0.9], axis=1)
    axes.fill_between(rates, low, high, color=_LINE, alpha=0.15, linewidth=0, label="80 % of steps")
    axes.plot(rates, middle, color=_LINE, linewidth=1.8, label="median step")
    own = run.config["weight_decay"]
    axes.axvline(own, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(
        f" this run: {own:g}", (own, 0.02), xycoords=("data", "axes fraction"), fontsize=8
    )
    axes.set_xscale("log")
    axes.margins(x=0, y=0.15)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(InPercent())
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure


def training_curves(run: "Run") -> Figure:
    """Training loss and top-1 after every epoch."""
    figure = new_figure(f"Training\n{title_of(run)}", height=4.6)
    upper, lower = figure.subplots(2, sharex=True)
    dress(upper, "training loss")
    dress(lower, "top-1", "epoch").xaxis.set_major_locator(MaxNLocator(integer=True))
    epochs = run.epochs["epoch"]
    upper.plot(epochs, run.epochs["train_loss"], color=_LINE, linewidth=1.8)
    for name, label, colour in (
        ("top1", "test", _LINE),
        ("other_top1", "test, at the other moment", _SECOND),
        ("val_top1", "validation", SERIES[2]),
    ):
        found = np.isfinite(run.epochs.get(name, []))
        if found.any():
            where, values = np.asarray(epochs)[found], np.asarray(run.epochs[name])[found]
            lower.plot(where, values, color=colour, linewidth=1.8, label=label)
    lower.yaxis.set_major_formatter(InPercent())
    lower.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def flips_by_layer(run: "Run") -> Figure:
    """:func:`layer_heatmap` of the sign flips."""
    return layer_heatmap(run, "flip_rate", "Sign flips by layer", "signs flipped by the step")


#: The figures of `wdprobe rop`: file name, the table and the column each needs, what draws it.
ROP_FIGURES: tuple[tuple[str, str, str, Callable[["Run"], Figure]], ...] = (
    ("rop_over_steps", "steps", "rate", opposing_rate),
    ("rop_by_layer", "layers", "rate", layer_heatmap),
    ("rop_by_decay_rate", "profile", "opposing", decay_profile),
)
#: Those in their place where no penalty opposes.
FLIP_FIGURES: tuple[tuple[str, str, str, Callable[["Run"], Figure]], ...] = (
    ("flips_over_steps", "steps", "flip_rate", flip_rate),
    ("flips_by_layer", "layers", "flip_rate", flips_by_layer),
)


def _any(table: Mapping[str, Sequence[float]], column: str) -> bool:
    """Whether a column has anything to show: a number above 0."""
    return any(value > 0 for value in table.get(column, ()))


def draw_training(run: "Run") -> dict[str, Figure]:
    """Every figure of `wdprobe train` and `rop` that would show something, by name."""
    figures = ROP_FIGURES if _any(run.steps, "rate") else FLIP_FIGURES
    drawn = {
        name: draw(run)
        for name, table, column, draw in figures
        if _any(getattr(run, table), column)
    } | draw_decay(run)
    if len(run.epochs.get("epoch", ())) > 1:
        drawn["training"] = training_curves(run)
    return drawn


def zero_shot(runs: Sequence["Run"]) -> Figure:
    """The metric against the share taken off (the form of Fig. 3a), one line for each model."""
    figure = new_figure("Zero-shot weight decay\nweights scaled to zero, no training")
    axes = dress(figure.subplots(), "", "weights taken off (1 − scale)")
    kinds = set()
    for run, colour in zip(runs, SERIES * len(runs), strict=False):
        top1 = np.asarray(run.curve["top1"])
        kind = "top1" if np.isfinite(top1).any() else "agreement"
        kinds.add({"top1": "top-1", "agreement": "agreement with the undecayed model"}[kind])
        taken = 1 - np.asarray(run.curve["scale"])
        life = (run.summary or {}).get("half_life")
        label = short(str(run.config["model"])) + (
            f" · half-life {half_life_told(life)}" if life else ""
        )
        # NaN draws as a gap
        axes.plot(taken, run.curve[kind], color=colour, linewidth=1.8, label=label)
        if life:
            axes.axvline(1 - life, color=colour, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylabel(" / ".join(sorted(kinds)), fontsize=9)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_formatter(InPercent())
    axes.xaxis.set_major_formatter(InPercent())
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def _grid(
    table: Mapping[str, list[float]], value: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """A table's ``value`` by index (rows) and falling scale (columns)."""
    indices, scales = np.unique(table["index"]), np.unique(table["scale"])[::-1]
    grid = _empty(len(indices), len(scales), len(table["index"]))
    rows = np.searchsorted(indices, table["index"])
    columns = np.searchsorted(-scales, -np.asarray(table["scale"]))
    grid[rows, columns] = table[value]
    return grid, indices, scales


def _empty(rows: int, columns: int, known: int) -> NDArray[np.float64]:
    """A grid of NaN for ``known`` values; a table that would leave most of it empty is no grid."""
    if rows * columns > 1_000_000 + 4 * known:
        raise ValueError(f"{known} values make no grid of {rows} × {columns}")
    return np.full((rows, columns), np.nan)


def _part_map(
    run: "Run", title: str, table: Mapping[str, list[float]], value: str, names: Sequence[str],
    label: str, form: Any = None, **colours: Any,
) -> Figure:  # fmt: skip
    grid, indices, scales = _grid(table, value)
    count = len(indices)
    figure = new_figure(
        f"{title}\n{short(run.config['model'])} · {short(run.config['source'], 80)}",
        height=max(3.0, 1.3 + 0.17 * min(count, 60)),
    )
    axes = dress(figure.subplots(), "", "scale")
    axes.grid(visible=False)
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", **colours)
    every = max(1, -(-count // 40))
    axes.set_yticks(range(0, count, every), [short(names[int(k) - 1]) for k in indices[::every]])
    axes.set_xticks(range(len(scales)), [f"{s:.3g}" for s in scales])
    axes.tick_params(labelsize=6.5)
    bar = figure.colorbar(image, ax=axes, format=form, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)
    return figure


def part_map(run: "Run") -> Figure:
    """The metric with one part scaled at a time: part × scale."""
    kind = "top1" if np.isfinite(run.parts["top1"]).any() else "agreement"
    label = {"top1": "top-1", "agreement": "agreement"}[kind]
    return _part_map(
        run, f"One {run.config['by']} decayed at a time", run.parts, kind, run.config["parts"],
        label, InPercent(), cmap="viridis", vmin=0, vmax=1,
    )  # fmt: skip


def distortion_map(run: "Run") -> Figure:
    """1 − cos² of every layer's output under decay of the whole model: layer × scale."""
    names = [f"{k} {name}" for k, name in enumerate(run.layer_names, start=1)]
    return _part_map(
        run, "Feature distortion (1 − cos²) under decay", run.distortion, "distortion", names,
        "1 − cos²", cmap="magma", vmin=0, vmax=_top(run.distortion["distortion"]),
    )  # fmt: skip


def _top(values: Sequence[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=0.0) or 1e-9


def draw_zeroshot(runs: Sequence["Run"]) -> dict[str, Figure]:
    """Every figure of `wdprobe zeroshot` that the runs have numbers for, by name."""
    drawn = {"zeroshot": zero_shot(runs)}
    if len(runs) == 1 and runs[0].parts.get("scale"):
        drawn["zeroshot_by_part"] = part_map(runs[0])
    if len(runs) == 1 and _any(runs[0].distortion, "distortion"):
        drawn["distortion"] = distortion_map(runs[0])
    return drawn


def overlay(
    runs: Mapping[str, "Run"], table: str, column: str, title: str, label: str, *, share: bool
) -> Figure:
    """One column of a table, a line for each run.

    Args:
        runs: by the label of their line.
        table: "steps" or "epochs".
        column: the column drawn; a run without it has no line.
        title: of the figure.
        label: of the axis.
        share: whether the column holds shares of 1, shown in per cent.
    """
    figure = new_figure(title)
    axes = dress(figure.subplots(), label, table[:-1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for number, (name, run) in enumerate(runs.items()):
        columns = getattr(run, table)
        values = np.asarray(columns.get(column, []), dtype=float)
        known = np.isfinite(values)
        if known.any():
            where = np.asarray(columns[table[:-1]])[known]
            values = smooth(values[known]) if table == "steps" else values[known]
            axes.plot(where, values, label=short(name, 60), **line_look(number))
    if share:
        axes.yaxis.set_major_formatter(InPercent())
    axes.legend(frameon=False, fontsize=8)
    return figure


def lr_decay_map(
    values: Mapping[tuple[float, float], float],
    title: str,
    *,
    label: str = "top-1",
    best: tuple[float, float] | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A share over the learning rate and the decay rate of a grid (the form of Fig. 4).

    Args:
        values: by (η, λ); NaN for a setting without a usable model, drawn as a cross. What the
            grid does not have stays empty.
        title: of the figure.
        label: what the share is.
        best: the setting that gets a ring.
        limits: of the colours, so that several maps can be compared; default this map's own.
    """
    return lr_decay_maps({"": values}, title, label=label, best={"": best}, limits=limits)


def lr_decay_maps(
    maps: Mapping[str, Mapping[tuple[float, float], float]],
    title: str,
    *,
    label: str = "top-1",
    best: Mapping[str, tuple[float, float] | None] | None = None,
    limits: tuple[float, float] | None = None,
    digits: int | None = 1,
) -> Figure:
    """:func:`lr_decay_map` of several grids beside each other, under one scale of colours.

    Args:
        maps: by the name of each what :func:`lr_decay_map` takes.
        title: of the figure.
        label: what the share is.
        best: the setting of each that gets a ring.
        limits: of the colours; default those of all values together.
        digits: of the per cent written in the cells; None for three places in all.
    """
    rates = sorted({lr for values in maps.values() for lr, _ in values}, reverse=True)
    decays = sorted({decay for values in maps.values() for _, decay in values})
    grids = {
        name: np.array([[values.get((lr, decay), math.inf) for decay in decays] for lr in rates])
        for name, values in maps.items()
    }
    low, high = limits or _span(
        np.stack(list(grids.values())), 10.0 ** -(digits + 1) if digits else 1e-9
    )
    width = max(4.8, 1.6 + 0.55 * len(decays))
    if len(maps) > 1:
        width = 1.6 + len(maps) * (1.0 + 0.6 * len(decays))
    figure = new_figure(title, width=width, height=1.6 + 0.4 * len(rates))
    panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    for axes, (name, grid) in zip(panels, grids.items(), strict=True):
        dress(axes, "learning rate η" if axes is panels[0] else "", "weight decay λ")
        axes.set_title(name, fontsize=9)
        axes.grid(visible=False)
        shown = np.where(np.isfinite(grid), grid, np.nan)
        image = axes.imshow(
            shown, aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=high
        )
        for (row, column), value in np.ndenumerate(grid):
            if not math.isinf(value):
                text, colour = _cell(value, low, high, digits)
                axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=8)
        ring = None if best is None else best.get(name)
        if ring is not None:
            axes.scatter(
                decays.index(ring[1]), rates.index(ring[0]), s=560, facecolors="none",
                edgecolors=_RING, linewidths=1.8, clip_on=False,
            )  # fmt: skip
        axes.set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays])
        axes.set_yticks(range(len(rates)), [f"{lr:g}" for lr in rates])
    bar = figure.colorbar(image, ax=list(panels), format=InPercent(), pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)
    return figure


def _span(values: NDArray[np.float64], least: float) -> tuple[float, float]:
    """The least and the largest of those that are numbers, at least so far apart."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    return low, max(high, low + least)


def _cell(value: float, low: float, high: float, digits: int | None) -> tuple[str, str]:
    """A cell's text in per cent and its colour, dark on the light end; a cross for none."""
    if math.isnan(value):
        return "×", INK
    bright = value > low + 0.6 * (high - low)
    return percent(value, digits, unit=""), _DARK if bright else _LIGHT


def top1_by_decay_rate(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    *,
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """Top-1 against the decay rate, one line for each method.

    Args:
        curves: by method, (λ, top-1); a method with the one λ of 0 is a level line.
        title: of the figure.
        marks: by method, the λ that gets a filled point.
    """
    figure = new_figure(title)
    axes = dress(figure.subplots(), "top-1", "weight decay λ")
    for number, (name, points) in enumerate(curves.items()):
        look = line_look(number)
        drawn = [(decay, top1) for decay, top1 in sorted(points) if decay > 0]
        if not drawn:
            axes.axhline(points[0][1], label=short(name), **look | {"linewidth": 1.0})
            continue
        axes.plot(*zip(*drawn, strict=True), marker="o", markersize=4, markerfacecolor="none",
                  label=short(name), **look)  # fmt: skip
        chosen = [(d, t) for d, t in drawn if d == (marks or {}).get(name)]
        axes.plot(*zip(*chosen, strict=True) if chosen else ((), ()), "o", color=look["color"])
    axes.set_xscale("log")
    axes.yaxis.set_major_formatter(InPercent())
    axes.legend(frameon=False, fontsize=8)
    return figure


def opposing_beside_top1(points: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Figure:
    """Mean R_op against top-1, a point for each setting, a colour for each method in order."""
    figure = new_figure(title)
    axes = dress(figure.subplots(), "top-1", "mean R_op")
    for number, (name, pairs) in enumerate(points.items()):
        colour = line_look(number)["color"]
        if pairs:
            axes.scatter(
                *zip(*pairs, strict=True), s=22, alpha=0.75, color=colour, label=short(name)
            )
    axes.xaxis.set_major_formatter(InPercent())
    axes.yaxis.set_major_formatter(InPercent())
    axes.legend(frameon=False, fontsize=8)
    return figure


def top1_by_timescale(
    points: Mapping[str, Sequence[tuple[float, float, str | None]]], title: str
) -> Figure:
    """Top-1 against how long decay remembers, a point for each setting.

    Args:
        points: by method, in whose order colours are taken: 1/c as a share of the run, top-1, and
            the state of most weights, by which the point is drawn.
        title: of the figure.
    """
    figure = new_figure(title)
    axes = dress(figure.subplots(), "top-1", "timescale 1/c of decay, in lengths of the run")
    found = {state for each in points.values() for _, _, state in each}
    for number, (name, each) in enumerate(points.items()):
        look = line_look(number)
        known = sorted(each)
        axes.plot([x for x, _, _ in known], [y for _, y, _ in known], label=short(name),
                  **look | {"linewidth": 0.8})  # fmt: skip
        for x, y, state in known:
            axes.plot(x, y, marker=_MARKS.get(state, "."), color=look["color"], markersize=6)
    for state, mark in _MARKS.items():
        if state in found:
            axes.plot([], [], mark, color=_LINE, markerfacecolor="none", label=state)
    axes.set_xscale("log")
    axes.invert_xaxis()  # more decay to the right, as over λ
    axes.yaxis.set_major_formatter(InPercent())
    axes.legend(frameon=False, fontsize=8)
    return figure


#: How a point of each state is drawn.
_MARKS: Mapping[str | None, str] = {"idle": "o", "shrinking": "v", "balanced": "D", "growing": "^"}


def save(figures: Mapping[str, Figure], folder: Path) -> None:
    """Write figures as PNG files into a folder."""
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        show_letters(figure)
        figure.savefig(folder / f"{name}.png")
