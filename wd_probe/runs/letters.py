"""Letters that the font of the figures lacks, as names of models and layers may have."""

from collections.abc import Iterator
from functools import lru_cache

from matplotlib import font_manager
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

_OURS = "DejaVu Sans"  # matplotlib brings it
#: These have boxes for every letter, or signs of formulas alone.
_NONE = ("Last Resort", "STIX", "cm")


def show_letters(figure: Figure) -> None:
    """Before it is drawn as a picture: another font of the machine for what ours lacks, or numbers.

    A letter that no font has is written as python writes it, as ``\\u5c64``.
    """
    ticks = {axis: axis.get_ticklabels() for axis in _axes(figure)}
    texts = figure.findobj(Text)
    letters = frozenset(c for text in texts for c in text.get_text() if ord(c) > 126)
    families, lost = _fonts(letters)
    if len(families) > 1:
        for text in texts:
            text.set_fontfamily(families)
        for axis in ticks:
            axis.set_tick_params(labelfontfamily=families)
    for axis, labels in ticks.items():
        told = [one.get_text() for one in labels]
        if not lost.isdisjoint("".join(told)):
            axis.set_ticks(axis.get_ticklocs(), labels=[_numbered(one, lost) for one in told])
    for text in texts if lost else ():
        text.set_text(_numbered(text.get_text(), lost))


def _axes(figure: Figure) -> Iterator[Axis]:
    for axes in figure.axes:
        yield from (axes.xaxis, axes.yaxis)


def _numbered(text: str, lost: frozenset[str]) -> str:
    return "".join(c.encode("unicode_escape").decode() if c in lost else c for c in text)


@lru_cache
def _fonts(letters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Families that have the letters between them, ours first, and the letters that none has."""
    families, missing = [_OURS], letters - _letters(font_manager.findfont(_OURS), letters)
    for font in font_manager.fontManager.ttflist:
        if missing and font.name not in families and not font.name.startswith(_NONE):
            found = _letters(font.fname, missing)
            missing -= found
            families += [font.name] if found else []
    return families, missing


def _letters(path: str, wanted: frozenset[str]) -> frozenset[str]:
    """Which of the letters a font has."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # one of pictures alone, or damaged
        return frozenset()
    return frozenset(letter for letter in wanted if font.get_char_index(ord(letter)))
