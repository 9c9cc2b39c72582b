"""Results that `print` and a notebook show as tables; nothing that draws them is loaded before."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


class Shown:
    """Is shown, wherever a person reads it, as the command line would show it."""

    __slots__ = ()

    def __rich__(self) -> "RenderableType":
        """What rich prints."""
        raise NotImplementedError

    def __str__(self) -> str:
        """The same as plain text, as wide as the terminal."""
        from .tables import text

        return text(self.__rich__())

    def _repr_html_(self) -> str:
        from .tables import html

        return html(self.__rich__())
