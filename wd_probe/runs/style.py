"""The house style of figures: colours, titles, axes, names."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from ..wording import percent

if TYPE_CHECKING:
    from .reading import Run

INK = "#222222"
SERIES = ("#0b5fa5", "#d1495b", "#3a7d44", "#8a5fbf", "#c77f1a", "#4b4b4b")
_RULE = "#e6e6e6"
#: The colours of lines and text by their part, for a page that exchanges them in the dark.
PALETTE = {"ink": INK, "rule": _RULE} | {f"series-{k}": c for k, c in enumerate(SERIES, start=1)}
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_WINDOW = 25  # points a smoothed curve is averaged over, at most
_FEW = 20  # layers that are named in larger letters


def new_figure(title: str, width: float = 7.0, height: float = 3.8) -> Figure:
    """An empty figure with a title at its left."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    return figure


class InPercent(PercentFormatter):
    """Ticks in per cent, in the form of every other share."""

    def __init__(self) -> None:
        super().__init__(1.0, symbol=" %")

    def format_pct(self, x: float, display_range: float) -> str:
        """A tick; with more places where those of an axis would not differ."""
        return percent(x) if abs(x) < 20 * display_range else super().format_pct(x, display_range)


def dress(axes: Any, ylabel: str, xlabel: str = "") -> Any:
    """The house style on an axes, which is returned."""
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def title_of(run: "Run") -> str:
    """What was run, as the second line of a title."""
    c = run.config
    known = [(sign, c.get(key)) for sign, key in (("η", "lr"), ("λ", "weight_decay"))]
    told = [f"{sign} {value:g}" for sign, value in known if value is not None]
    batch = [] if c.get("batch_size") is None else [f"batch {c['batch_size']}"]
    return (
        f"{short(c['model'])} on {short(c['dataset'])} · {short(c['opt'])} · {_method(c)}"
        + " · ".join([*told, *batch])
    )


def _method(config: Mapping[str, Any]) -> str:
    method = config.get("method", "own")
    return "" if method == "own" else f"{short(method)} · "


def layer_rows(axes: Any, names: Sequence[str], most: int = 40) -> None:
    """Name the rows 1 to n of an axes by their layers, so many of them as can be read."""
    every = max(1, -(-len(names) // most))
    shown = range(1, len(names) + 1, every)
    axes.set_yticks(list(shown), [short(f"{k} {names[k - 1]}") for k in shown])
    axes.tick_params(axis="y", labelsize=8 if len(shown) <= _FEW else 6.5)


def layers_high(count: int) -> float:
    """How high a figure is that has a row for each of so many layers."""
    return max(3.0, 1.1 + 0.17 * min(count, 60))


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A moving average over a twentieth of the values, at most 25."""
    window = max(1, min(_WINDOW, len(values) // 20))
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")


def short(text: str, most: int = 40) -> str:
    """A name as a label: not too long, and its dollar signs are no formula."""
    return (text if len(text) <= most else f"{text[: most - 1]}…").replace("$", r"\$")


def line_look(number: int) -> dict[str, Any]:
    """The look of a line; colours come again with other dashes."""
    return {
        "color": SERIES[number % len(SERIES)],
        "linestyle": _DASHES[number // len(SERIES) % len(_DASHES)],
        "linewidth": 1.8,
    }
