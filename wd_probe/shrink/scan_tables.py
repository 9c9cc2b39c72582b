"""A zero-shot scan as a table."""

from collections.abc import Mapping, Sequence

from ..tables import Table, escape, plain_table
from ..wording import number, percent

#: Of more points than so many, those next to some scales are shown.
_FEW = 12
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
    if len(points) > _FEW:
        nearest = {
            min(range(len(points)), key=lambda k: abs(points[k][0] - scale)) for scale in _SCALES
        }
        points = [points[k] for k in sorted(nearest)]
    for scale, metrics in points:
        table.add_row(f"{scale:.2f}", *(_told(name, metrics.get(name)) for name in names))
    return table


def _told(name: str, value: float | None) -> str:
    return percent(value, 1) if name in _SHARES else number(value)
