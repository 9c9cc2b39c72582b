"""The figures of the paper, in its form, from our own runs."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from ..figures import _INK as INK
from ..figures import _SERIES as SERIES
from ..figures import _dress as dress
from ..figures import _figure as new_figure
from ..figures import _smooth as smooth
from .analysis import Interval

Columns = Mapping[str, list[float]]


def strong_penalty(title: str, lines: Sequence[tuple[str, Sequence[Columns]]]) -> Figure:
    """Fig. 1: training loss and test top-1 by epoch; mean over seeds, band from lowest to highest.

    Args:
        title: what was trained.
        lines: for each a label and the epochs tables of its seeds.
    """
    figure = new_figure(f"Under a strong penalty\n{title}", width=8.5)
    left, right = figure.subplots(1, 2)
    dress(left, "training loss", "epoch")
    dress(right, "test top-1", "epoch").yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes, column in ((left, "train_loss"), (right, "top1")):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for (label, tables), colour in zip(lines, SERIES * len(lines), strict=False):
            shortest = min(len(table[column]) for table in tables)
            values = np.array([table[column][:shortest] for table in tables])
            epochs = np.arange(1, shortest + 1)
            axes.plot(epochs, values.mean(0), color=colour, linewidth=1.8, label=label)
            axes.fill_between(
                epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0
            )
    right.legend(frameon=False, fontsize=8, loc="best")
    return figure


def over_training(title: str, runs: Sequence[tuple[float, float, Columns]]) -> Figure:
    """Fig. 2a: R_op over the steps of training, a colour for each η, a dash for each λ.

    Args:
        title: what was trained.
        runs: for each η, λ and the steps table.
    """
    figure = new_figure(f"R_op over training\n{title}", height=4.2)
    axes = dress(figure.subplots(), "R_op", "step")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=2))
    lrs, rates = sorted({lr for lr, _, _ in runs}), sorted({rate for _, rate, _ in runs})
    dashes = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 3)))
    for lr, rate, steps in runs:
        known = np.isfinite(steps["rate"]) & (np.asarray(steps["rate"]) > 0)
        axes.plot(
            np.asarray(steps["step"])[known],
            smooth(np.asarray(steps["rate"])[known]),
            color=SERIES[lrs.index(lr) % len(SERIES)],
            linestyle=dashes[rates.index(rate) % len(dashes)],
            linewidth=1.3,
            label=f"η {lr:g} · λ {rate:g}",
        )
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def rate_map(
    title: str, label: str, maps: Mapping[str, Mapping[tuple[float, float], float]]
) -> Figure:
    """Fig. 2b and 4: a figure over η and λ, a map for each method; a circle at the largest.

    Args:
        title: what was trained.
        label: of the figure and its unit.
        maps: by method the figure by (η, λ); NaN where it diverged.
    """
    figure = new_figure(title, width=1.5 + 3.4 * len(maps), height=3.9)
    grids = {name: _grid(values) for name, values in maps.items()}
    finite = [g[np.isfinite(g)] for _, _, g in grids.values()]
    every = np.concatenate(finite) if finite else np.zeros(0)
    low, high = (every.min(), every.max()) if every.size else (0.0, 1.0)
    shared = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (name, (lrs, rates, values)) in zip(shared, grids.items(), strict=True):
        dress(axes, "learning rate η", "weight decay λ")
        axes.grid(visible=False)
        axes.set_title(name, fontsize=9)
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high)
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
        _written(axes, values, (low + high) / 2)
    bar = figure.colorbar(image, ax=list(shared), pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)
    return figure


def _grid(
    values: Mapping[tuple[float, float], float],
) -> tuple[list[float], list[float], NDArray[np.float64]]:
    lrs = sorted({lr for lr, _ in values}, reverse=True)
    rates = sorted({rate for _, rate in values})
    table = [[values.get((lr, rate), np.nan) for rate in rates] for lr in lrs]
    return lrs, rates, np.array(table, dtype=float)


def _written(axes: object, values: NDArray[np.float64], middle: float) -> None:
    """The numbers in their cells, and a circle around the largest."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    for (row, column), value in np.ndenumerate(values):
        shown = "×" if np.isnan(value) else f"{value:.3g}"
        colour = "white" if np.isfinite(value) and value < middle else INK
        axes.text(column, row, shown, ha="center", va="center", fontsize=8, color=colour)
    if np.isfinite(values).any():
        row, column = np.unravel_index(np.nanargmax(values), values.shape)
        axes.scatter(
            int(column), int(row), s=620, facecolors="none", edgecolors="black", linewidths=1.4
        )


def improvement(title: str, lines: Mapping[str, Sequence[tuple[float, Interval]]]) -> Figure:
    """Fig. 3b: pwd minus rwd in points of top-1 as a function of λ, with 95 % intervals."""
    figure = new_figure(f"pwd over rwd\n{title}")
    axes = dress(figure.subplots(), "pwd − rwd, points of top-1", "weight decay λ")
    axes.axhline(0, color=INK, linewidth=0.8)
    for (label, points), colour in zip(lines.items(), SERIES * len(lines), strict=False):
        ordered = sorted(points, key=lambda point: point[0])
        axes.errorbar(
            [rate for rate, _ in ordered],
            [100 * found.mean for _, found in ordered],
            [100 * np.nan_to_num(found.half_width) for _, found in ordered],
            color=colour, linewidth=1.6, capsize=3, marker="o", markersize=4, label=label,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure


def by_scale(title: str, lines: Mapping[str, Sequence[tuple[str, Interval]]]) -> Figure:
    """Fig. 5: best-10 top-1 of each method by model, with 95 % intervals."""
    figure = new_figure(f"Model scales\n{title}")
    axes = dress(figure.subplots(), "top-1, %")
    for (method, points), colour in zip(lines.items(), SERIES * len(lines), strict=False):
        values = np.array([100 * found.mean for _, found in points])
        spread = np.array([100 * np.nan_to_num(found.half_width) for _, found in points])
        places = range(len(points))
        axes.plot(places, values, color=colour, linewidth=1.8, marker="o", label=method)
        axes.fill_between(
            places, values - spread, values + spread, color=colour, alpha=0.15, linewidth=0
        )
        axes.set_xticks(places, [model.partition(".")[0] for model, _ in points])
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure
