"""What decay did, as figures: balance, angle, what is left, norms (theory facts 20 to 26)."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from ..probe.dynamics import IDLE, LATE, equilibrium_angle
from ..wording import percent
from .style import INK, SERIES, InPercent, dress, layer_rows, layers_high, new_figure, title_of

if TYPE_CHECKING:
    from .reading import Run

Rows = NDArray[np.float64]

#: Where decay took less than this off every layer, what it did shows nowhere.
_SHOWS = 0.01
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)  # of balance; what lies beyond has the colours of the ends
_UNKNOWN = "#a9a9a9"
_STRETCH, _FEWEST, _MOST = 10, 20, 100  # steps that a column of the map adds up; how many it has
_DEPTH = LinearSegmentedColormap.from_list("depth", [SERIES[k] for k in (0, 3, 1, 4)])
_DASHED: Any = (0, (4, 3))


def balance_by_layer(run: "Run") -> Figure:
    """ΣG / ΣT of every layer over stretches of steps, shallow layers on top; NaN is grey."""
    steps, balance = _balance(run)
    count = len(run.layer_names)
    figure = new_figure(f"Balance by layer\n{title_of(run)}", height=layers_high(count))
    axes = dress(figure.subplots(), "layer (1 = shallowest)", "step")
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    image = axes.imshow(
        np.clip(balance, _TICKS[0], _TICKS[-1]),
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["RdBu_r"].with_extremes(bad=_UNKNOWN),
        norm=LogNorm(_TICKS[0], _TICKS[-1]),
        extent=(steps[0], steps[-1], count + 0.5, 0.5),
    )
    layer_rows(axes, run.layer_names)
    high = figure.get_figheight()
    bar = figure.colorbar(image, ax=axes, extend="both", extendfrac=0.15 / high, aspect=7 * high,
                          pad=0.01, ticks=_TICKS, format="%g")  # fmt: skip
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(labelsize=8)
    bar.set_label("given back by the steps /\ntaken off by decay", fontsize=8)
    return figure


def _balance(run: "Run") -> tuple[Rows, Rows]:
    """The edges of the stretches, and by layer and stretch the balance."""
    step, index, *terms = (
        np.asarray(run.layers[name]) for name in ("step", "index", "growth", "taken")
    )
    count = len(np.unique(step))
    columns = min(count, max(_FEWEST, min(_MOST, count // _STRETCH)))
    edges = np.linspace(step.min() - 0.5, step.max() + 0.5, columns + 1)
    known = np.isfinite(terms).all(axis=0)
    where = index[known].astype(int) - 1, np.searchsorted(edges, step[known]) - 1
    growth, taken = np.zeros((2, len(run.layer_names), columns))
    np.add.at(growth, where, terms[0][known])
    np.add.at(taken, where, terms[1][known])
    return edges, np.divide(growth, taken, out=np.full_like(taken, math.nan), where=taken > 0)


def angle_by_layer(run: "Run") -> Figure:
    """What a step turns each layer by, late in the run, beside what equilibrium would have it."""
    angles, c = _late(run, "angular_update"), 1 / _late(run, "timescale")[:, 1]
    rows = np.arange(1, len(angles) + 1)
    is_balanced = np.isin(rows, _balanced(run))
    figure = new_figure(f"Angle by layer\n{title_of(run)}", height=layers_high(len(rows)))
    axes = dress(figure.subplots(), "layer (1 = shallowest)", "angle of a step, in radians")
    axes.hlines(rows, angles[:, 0], angles[:, 2], color=SERIES[0], linewidth=4, alpha=0.25)
    told = {"in balance": is_balanced, "not in balance": ~is_balanced}
    if run.summary is None:
        told = {"median": rows > 0}
    for label, of in told.items():
        if of.any():
            axes.plot(
                angles[of, 1], rows[of], "o", color=SERIES[0], markersize=6, label=label,
                markerfacecolor="none" if label == "not in balance" else SERIES[0],
            )  # fmt: skip
    beta = _momentum(run)
    if math.isfinite(beta):
        expected = np.array([equilibrium_angle(one, beta) or math.nan for one in c])
        axes.plot(
            np.repeat(expected, 2), np.stack((rows - 0.5, rows + 0.5), axis=1).ravel(),
            color=SERIES[1], linewidth=1.4, linestyle=_DASHED,
            label=f"equilibrium, β = {beta:g}",
        )  # fmt: skip
    axes.set_ylim(len(rows) + 0.5, 0.5)
    axes.set_xlim(left=0)
    layer_rows(axes, run.layer_names)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3,
                  loc="outside lower center")  # fmt: skip
    return figure


def _late(run: "Run", column: str) -> Rows:
    """The 10, 50 and 90 % of a column over the last quarter of the steps, a row a layer."""
    step, index = (np.asarray(run.layers[name]) for name in ("step", "index"))
    is_late = step > (1 - LATE) * step.max()
    values = np.asarray(run.layers[column])
    found = np.full((len(run.layer_names), 3), math.nan)
    for k in range(len(found)):
        own = values[is_late & (index == k + 1)]
        own = own[~np.isnan(own)]
        if own.size:
            found[k] = np.quantile(own, (0.1, 0.5, 0.9), method="nearest")
    return found


def remaining(run: "Run") -> Figure:
    """The share of what stood at the start that decay has left, against where it is idle."""
    curves = _decaying(run)
    figure = new_figure(f"What decay has left\n{title_of(run)}")
    axes = _over_steps(figure, "of what stood at the start")
    if _are_alike(curves):
        step, left = next(iter(curves.values()))
        axes.plot(step, left, color=SERIES[0], linewidth=1.8)
        axes.annotate(
            f"{percent(left[-1])} ", (step[-1], left[-1]), ha="right", xytext=(0, 6),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    else:
        _by_depth(figure, axes, run, curves)
    axes.axhline(
        IDLE, color=INK, linewidth=0.9, linestyle=_DASHED, label=f"idle above {percent(IDLE)}"
    )
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(InPercent())
    return figure


def norm_by_layer(run: "Run") -> Figure:
    """The norm of every layer over that at the start, beside what decay alone would leave."""
    curves = {
        k: (step, norm / start)
        for k, (step, norm) in _curves(run, "norm").items()
        if (start := _start(run, k)) > 0
    }
    figure = new_figure(f"Norm by layer\n{title_of(run)}")
    axes = _over_steps(figure, "norm / norm at the start")
    _by_depth(figure, axes, run, curves)
    left = _decaying(run)
    if left and _are_alike(left):
        axes.plot(*next(iter(left.values())), color=INK, linewidth=1.2, linestyle=_DASHED,
                  label="decay alone")  # fmt: skip
        axes.legend(frameon=False, fontsize=8, loc="best")
    values = np.concatenate([ratio for _, ratio in curves.values()])
    low, high = values[values > 0].min(initial=1.0), values.max(initial=1.0)
    if high > 4 * low:
        axes.set_yscale("log")
        axes.set_ylim(0.8 * low, 1.25 * high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def _start(run: "Run", index: int) -> float:
    """A layer's norm before the first measured step."""
    first = run.layers["index"].index(index)
    norm, growth, taken = (run.layers[name][first] for name in ("norm", "growth", "taken"))
    return math.sqrt(max(norm**2 - growth + taken, 0.0))


# --- lines ----------------------------------------------------------------------------------------


def _curves(run: "Run", column: str) -> dict[int, tuple[Rows, Rows]]:
    """Steps and values of each layer that has such, by its index."""
    step, index, values = (np.asarray(run.layers[name]) for name in ("step", "index", column))
    known = np.isfinite(values)
    return {
        k: (step[known & (index == k)], values[known & (index == k)])
        for k in range(1, len(run.layer_names) + 1)
        if (known & (index == k)).any()
    }


def _decaying(run: "Run") -> dict[int, tuple[Rows, Rows]]:
    """What decay has left of each layer of which it has taken any."""
    return {k: found for k, found in _curves(run, "remaining").items() if found[1].min() < 1}


def _are_alike(curves: Mapping[int, tuple[Rows, Rows]]) -> bool:
    ends = [values[-1] for _, values in curves.values()]
    return bool(max(ends) - min(ends) < 1e-4)


def _over_steps(figure: Figure, label: str) -> Any:
    axes = dress(figure.subplots(), label, "step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


def _by_depth(
    figure: Figure, axes: Any, run: "Run", curves: Mapping[int, tuple[Rows, Rows]]
) -> None:
    """A line a layer, coloured by depth; the bar of colours names them, shallow ones on top."""
    count = len(run.layer_names)
    colours = _DEPTH.resampled(max(count, 2))
    for k, (step, values) in curves.items():
        axes.plot(step, values, color=colours(k - 1), linewidth=1.6)
    norm = BoundaryNorm(np.arange(0.5, max(count, 2) + 1), max(count, 2))
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.02, aspect=40)
    bar.ax.invert_yaxis()
    bar.ax.minorticks_off()
    layer_rows(bar.ax, run.layer_names, most=14)


# --- which are drawn ------------------------------------------------------------------------------


def _balanced(run: "Run") -> list[int]:
    """The layers in balance, by their index."""
    layers = (run.summary or {}).get("layers") or ()
    return [layer["index"] for layer in layers if layer.get("state") == "balanced"]


def _momentum(run: "Run") -> float:
    """β, where equilibrium can be told by it."""
    found = ((run.summary or {}).get("dynamics") or {}).get("momentum")
    return math.nan if found is None else float(found)


def _took_much(run: "Run") -> bool:
    return any(values[-1] < 1 - _SHOWS for _, values in _decaying(run).values())


#: By file name: the column of the table of layers, whether decay must have done something that
#: shows, and what draws it.
_FIGURES: tuple[tuple[str, str, bool, Callable[["Run"], Figure]], ...] = (
    ("balance_by_layer", "balance", True, balance_by_layer),
    ("angle_by_layer", "angular_update", False, angle_by_layer),
    ("remaining", "remaining", True, remaining),
    ("norm_by_layer", "norm", False, norm_by_layer),
)


def draw_decay(run: "Run") -> dict[str, Figure]:
    """What decay did in a run, by name; nothing of a run of one step or of an older version."""
    if len(set(run.layers.get("step", ()))) < 2:
        return {}
    return {
        name: draw(run)
        for name, column, of_decay, draw in _FIGURES
        if any(value > 0 for value in run.layers.get(column, ()))
        and (_took_much(run) or not of_decay)
    }
