"""The parts of a report page: text, tables, figures. Whatever is not `Html` is escaped."""

import csv
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any
from urllib.parse import quote

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from .. import __version__
from ..runs.figures import PALETTE

#: Inches; narrow, so that the labels can still be read on a phone.
_WIDTH = 4.8
#: A line of more points is embedded as a picture.
_DRAWN_POINTS = 5_000
#: A longer table is thinned before it is embedded.
_EMBEDDED_ROWS = 20_000
_NUMBER = re.compile(r"[-−+±<]?\d[\d.,]*(e[-+]?\d+)?( ± [\d.]+)?( of \d+)?( %| s| points)?$|[–∞]?$")
#: How much larger than drawn a figure may be shown.
_GROWTH = 1.4
_VARIABLES = {colour: f"var(--{name})" for name, colour in PALETTE.items()}
_VARIABLES["#000000"] = "var(--ink)"
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Html(str):
    """Markup that is known to be sound."""

    __slots__ = ()


def element(name: str, *inside: object, **attributes: object) -> Html:
    """An element; ``class_`` stands for ``class``.

    >>> element("p", "a < b", class_="lead")
    '<p class="lead">a &lt; b</p>'
    """
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{named}>{''.join(map(_text, inside))}</{name}>")


def _text(value: object) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))


def joined(parts: Iterable[str]) -> Html:
    """Parts of a page one after another."""
    return Html("\n".join(_text(part) for part in parts if part))


def percent(value: float | None, digits: int | None = None) -> str:
    """A share of 1 as per cent, to three places in all or ``digits`` after the point."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.3g} %" if digits is None else f"{100 * value:.{digits}f} %"


def number(value: float | None) -> str:
    """A number to four places in all; a dash for none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def findings(sentences: Sequence[str]) -> Html:
    """What was found, a sentence a line."""
    lines = (element("li", sentence) for sentence in sentences)
    return element("ul", *lines, class_="findings") if sentences else Html()


def trouble(title: str, lines: Sequence[str]) -> Html:
    """What a reader is warned of."""
    if not lines:
        return Html()
    listed = element("ul", *(element("li", line) for line in lines))
    return element("div", element("b", title), listed, class_="trouble", role="note")


def facts(values: Mapping[str, object]) -> Html:
    """Names and values below each other; what is None is left out."""
    rows = (
        element("tr", element("th", name, scope="row"), element("td", value))
        for name, value in values.items()
        if value is not None
    )
    return element("div", element("table", *rows, class_="facts"), class_="scroll")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A table; columns of nothing but numbers stand to the right."""
    columns = list(zip(*rows, strict=True)) or [() for _ in header]
    looks = [
        {"class_": "number"} if column and all(map(_NUMBER.match, column)) else {}
        for column in columns
    ]
    head = (element("th", t, scope="col", **look) for t, look in zip(header, looks, strict=True))
    body = (
        element("tr", *(element("td", c, **look) for c, look in zip(row, looks, strict=True)))
        for row in rows
    )
    shown = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    return element("div", shown, class_="scroll")


def download(name: str, columns: Mapping[str, Sequence[Any]]) -> Html:
    """A link that holds a CSV file.

    Args:
        name: of the file, without its ending.
        columns: by their heading. A table too long is thinned, by whole values of its first
            column, and the link says so.
    """
    rows = list(zip(*([_plain(v) for v in column] for column in columns.values()), strict=True))
    every = -(-len(rows) // _EMBEDDED_ROWS)
    if every > 1:
        kept = set(list(dict.fromkeys(row[0] for row in rows))[::every])
        rows = [row for row in rows if row[0] in kept]
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([tuple(columns), *rows])
    link = element(
        "a",
        f"{name}.csv" if every <= 1 else f"{name}.csv (one in {every})",
        href="data:text/csv;charset=utf-8," + quote(file.getvalue(), safe=",.-+:"),
        download=f"{name}.csv",
    )
    return element("p", link)


def _plain(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.9g}" if math.isfinite(value) else ""


def figure(
    drawn: Figure, title: str, about: str, data: tuple[str, Mapping[str, Sequence[Any]]]
) -> Html:
    """A figure with its title, what it shows, and the data behind it.

    Args:
        drawn: its own title gives way to ``title``.
        title: in a few words.
        about: in a sentence; also what a screen reader says.
        data: the name and columns of the CSV file.
    """
    caption = element("figcaption", element("b", title), about)
    return element("figure", caption, svg(drawn, f"{title}: {about}"), download(*data))


def svg(drawn: Figure, label: str, width: float = _WIDTH) -> Html:
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
    with mpl.rc_context(rc):
        drawn.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    return Html(_inlined(file.getvalue(), label, 96 * width))


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


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page."""
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=html.escape(title), body=joined(parts), version=__version__
    )
