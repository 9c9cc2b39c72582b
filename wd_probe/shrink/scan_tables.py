"""A zero-shot scan as a table."""

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from ..tables import plain_table
from ..wording import number, percent

#: Of more points than these, those are shown that stand at one of these scales.
_SCALES = (1.0, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5, 0.25, 0.0)
_TITLES = {"top1": "top-1", "kl": "KL"}
_SHARES = ("top1", "agreement")


def curve_table(points: Sequence[tuple[float, Mapping[str, float | None]]]) -> Table:
    """The metrics at some scales.

    Args:
        points: of each the scale, and the metrics by name.
    """
    table = plain_table()
    names = list(dict.fromkeys(name for _, metrics in points for name in metrics))
    for title in ("scale", *names):
        table.add_column(escape(_TITLES.get(title, title)), justify="right")
    for scale, metrics in points:
        if len(points) <= len(_SCALES) or any(abs(scale - shown) < 1e-9 for shown in _SCALES):
            table.add_row(f"{scale:.2f}", *(_told(name, metrics.get(name)) for name in names))
    return table


def _told(name: str, value: float | None) -> str:
    return percent(value, 1) if name in _SHARES else number(value)
