"""Values as a page shows them: numbers as text, figures as SVG, tables as CSV files in links."""

import csv
import html
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from ..runs.style import PALETTE

#: A table's columns, by heading.
Columns = Mapping[str, Sequence[Any]]
#: By name, a figure and the table behind it.
Figures = dict[str, tuple[Figure, Columns]]

#: Inches; narrow, so that the labels can still be read on a phone.
_WIDTH = 4.8
#: A line of more points is embedded as a picture.
_DRAWN_POINTS = 5_000
#: A longer table is thinned before it is embedded.
_EMBEDDED_ROWS = 20_000
_NUMBER = re.compile(r"[-−+±<]?\d[\d.,]*(e[-+]?\d+)?( ± [\d.]+)?( of \d+)?( %| s| points)?$|[–∞]?$")
_CODE = re.compile(r"`([^`]+)`")
#: How much larger than drawn a figure may be shown.
_GROWTH = 1.4
_VARIABLES = {colour: f"var(--{name})" for name, colour in PALETTE.items()}
_VARIABLES["#000000"] = "var(--ink)"
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def number(value: float | None) -> str:
    """A number to four places in all; a dash for none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def numeric_columns(rows: Sequence[Sequence[str]], header: Sequence[str]) -> list[bool]:
    """Of each column of a table whether it holds nothing but numbers."""
    columns = zip(header, *rows, strict=True)
    return [bool(cells) and all(map(_NUMBER.match, cells)) for _, *cells in columns]


def coded(sentence: str) -> Markup:
    """A sentence with what stands between backticks as code."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(sentence))))


def csv_url(columns: Columns) -> tuple[str, int]:
    """An address that holds a table as a CSV file, and of how many rows one was kept.

    Args:
        columns: by their heading. A table too long is thinned, by whole values of its first column.
    """
    rows = list(zip(*([_plain(v) for v in column] for column in columns.values()), strict=True))
    every = max(1, -(-len(rows) // _EMBEDDED_ROWS))
    if every > 1:
        kept = set(list(dict.fromkeys(row[0] for row in rows))[::every])
        rows = [row for row in rows if row[0] in kept]
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([tuple(columns), *rows])
    return "data:text/csv;charset=utf-8," + quote(file.getvalue(), safe=",.-+:"), every


def _plain(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.9g}" if math.isfinite(value) else ""


def svg(drawn: Figure, label: str, width: float = _WIDTH) -> Markup:
    """A figure as inline SVG whose colours are the page's."""
    drawn.suptitle("")
    natural, height = drawn.get_size_inches()
    width = min(width, natural)
    drawn.set_size_inches(width, height * (width / natural) ** 0.5)
    for axes in drawn.axes:
        for line in axes.lines:
            line.set_rasterized(np.size(line.get_xdata()) > _DRAWN_POINTS)
    file = io.StringIO()
    rc: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "wd_probe",
        "font.sans-serif": ["DejaVu Sans"],
    }
    with mpl.rc_context(rc), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a browser has its own fonts for the others
        drawn.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    return Markup(_inlined(file.getvalue(), label, 96 * width))


def _inlined(text: str, label: str, width: float) -> str:
    """SVG as a part of a page: its colours by name, as wide as there is room, and labelled."""
    text = re.sub(r"<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    text = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _themed, text)
    said = f'role="img" aria-label="{html.escape(label)}"'
    size = re.search(r' width="[^"]*" height="[^"]*"', text)
    assert size is not None
    return text.replace(size[0], f' {said} style="max-width: {_GROWTH * width:.0f}px"', 1)


def _themed(found: re.Match[str]) -> str:
    return f"{found[1]}: {_VARIABLES.get(found[2], found[2])}"
