"""Tables for people: how they look, on a terminal, as plain text and in a notebook."""

import io
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .errors import printable

_state = random.getstate()  # from which rich draws as it is loaded, and a training may
try:
    from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
    from rich.markup import escape
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text
finally:
    random.setstate(_state)

#: What the rooms lay out with; the library loads rich here alone.
__all__ = [
    "ByWidth",
    "PrintableConsole",
    "RenderableType",
    "Table",
    "Text",
    "escape",
    "html",
    "plain_table",
    "text",
]

#: Columns where no terminal sets a width: nothing that a person pipes on is cut.
_WIDE = 1000
#: Columns in a notebook.
_NOTEBOOK = 110
_HTML = '<pre style="line-height: 1.25; white-space: pre; overflow-x: auto">{code}</pre>'


class PrintableConsole(Console):
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


@dataclass(frozen=True, slots=True)
class ByWidth:
    """What is laid out by the width there is: parts below each other, text with rich's markup."""

    parts: Callable[[int], Iterable[RenderableType]]

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        """The parts."""
        yield from self.parts(options.max_width)


def plain_table(title: str | None = None) -> Table:
    """A table without lines, its title on the left."""
    return Table(
        box=None, pad_edge=False, header_style="bold", title=title, title_justify="left",
        title_style="",
    )  # fmt: skip


def text(renderable: RenderableType) -> str:
    """As plain text, as wide as the terminal that stdout is, if it is one."""
    file = io.StringIO()
    width = shutil.get_terminal_size((_WIDE, 1)).columns
    PrintableConsole(file=file, width=width, highlight=False, color_system=None).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def html(renderable: RenderableType) -> str:
    """As HTML, names escaped."""
    console = PrintableConsole(
        file=io.StringIO(), width=_NOTEBOOK, highlight=False, record=True, force_jupyter=False
    )
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=_HTML)
