"""The figures of the paper, in its form, from our own runs."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..runs.style import INK, SERIES, InPercent, dress, new_figure, smooth
from .results import Interval

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
    dress(right, "test top-1", "epoch").yaxis.set_major_formatter(InPercent())
    for axes, column in ((left, "train_loss"), (right, "top1")):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for (label, tables), colour in zip(lines, SERIES * len(lines), strict=False):
            shortest = min(len(table[column]) for table in tables)
            values = np.array([table[column][:shortest] for table in tables])
            told = np.isfinite(values).all(0)  # not every epoch is evaluated
            epochs, values = np.arange(1, shortest + 1)[told], values[:, told]
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
    axes.yaxis.set_major_formatter(InPercent())
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
    rates = sorted({rate for points in lines.values() for rate, _ in points})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure


def by_scale(title: str, lines: Mapping[str, Sequence[tuple[str, Interval]]]) -> Figure:
    """Fig. 5: best-10 top-1 of each method by model, with 95 % intervals."""
    figure = new_figure(f"Model scales\n{title}")
    axes = dress(figure.subplots(), "top-1")
    axes.yaxis.set_major_formatter(InPercent())
    for (method, points), colour in zip(lines.items(), SERIES * len(lines), strict=False):
        values = np.array([found.mean for _, found in points])
        spread = np.array([np.nan_to_num(found.half_width) for _, found in points])
        places = range(len(points))
        axes.plot(places, values, color=colour, linewidth=1.8, marker="o", label=method)
        axes.fill_between(
            places, values - spread, values + spread, color=colour, alpha=0.15, linewidth=0
        )
        axes.set_xticks(places, [model.partition(".")[0] for model, _ in points])
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure
