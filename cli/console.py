"""The terminal: results on stdout, the rest on stderr, both printable; and how numbers look."""

import contextlib
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table

from wd_probe.errors import printable

from .encoding import json_for
from .processes import process

#: Columns where no terminal sets a width: nothing that a person pipes on is cut.
_WIDE = 1000


class _Console(Console):
    """Names that come from files are text: what a terminal would act on in them is shown."""

    @property
    def size(self) -> ConsoleDimensions:
        """That of the terminal, or of ``$COLUMNS``; wide where there is neither."""
        found = super().size
        if self.is_terminal or self._width is not None or "COLUMNS" in self._environ:
            return found
        return ConsoleDimensions(_WIDE, found.height)

    @size.setter
    def size(self, size: tuple[int, int]) -> None:
        self._width, self._height = size

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The renderable's segments, those with text made printable."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                lines = (printable(line) for line in segment.text.split("\n"))
                yield Segment("\n".join(lines), segment.style)


out = _Console(highlight=False, soft_wrap=False, quiet=process() > 0)


err = _Console(stderr=True, highlight=False, quiet=process() > 0)


def number(value: float | None) -> str:
    """A plain number; a dash where there is none."""
    return "–" if value is None or value != value else f"{value:.3f}"


def loading() -> contextlib.AbstractContextManager[object]:
    """A spinner while the libraries load, on a terminal."""
    return err.status("loading ...") if err.is_terminal else contextlib.nullcontext()


def show_warnings() -> None:
    """Print warnings as one plain line each."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        err.print(f"[yellow]wdprobe: warning:[/] {escape(printable(message))}", soft_wrap=True)

    warnings.showwarning = show


def plain_table(title: str | None = None) -> Table:
    """A table without lines, its title on the left."""
    return Table(
        box=None, pad_edge=False, header_style="bold", title=title, title_justify="left",
        title_style="",
    )  # fmt: skip


def to_stdout(result: Mapping[str, Any]) -> None:
    """A result as JSON, untouched by rich."""
    from wd_probe.runs.folder import dumps

    if not out.quiet:
        sys.stdout.write(json_for(sys.stdout.encoding, dumps(result)) + "\n")
