"""The errors this package raises on purpose; each message says what, where and what to do."""

import difflib
import os
import sys
import warnings
from collections.abc import Sequence


class WdProbeError(Exception):
    """Root of every error wd_probe raises on purpose."""


class InputError(WdProbeError, ValueError):
    """An argument, option or file that cannot be used as given."""


class RunError(WdProbeError, RuntimeError):
    """A run that started well and could not go on."""


class Interrupted(RunError):
    """A run that was ended by Ctrl-C; what was measured is kept.

    Attributes:
        resumes: whether the same command resumes it.
    """

    def __init__(self, message: str, *, resumes: bool = False) -> None:
        super().__init__(message)
        self.resumes = resumes


class WdProbeWarning(UserWarning):
    """Something is not measured, or not written, and this says why."""


class Teller:
    """Warns of each thing once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, message: str, about: str | None = None) -> None:
        """Warn, at the innermost line that is neither of this package nor of torch.

        Args:
            message: said once.
            about: say it once about this, whatever else the message says.
        """
        about = about or message
        if about in self._told:
            return
        self._told.add(about)
        self.tell(message)

    def tell(self, message: str) -> None:
        """Say it, as a warning."""
        level, frame = 2, sys._getframe(1)
        while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
            level, frame = level + 1, frame.f_back
        warnings.warn(message, WdProbeWarning, stacklevel=level)


def printable(text: object) -> str:
    r"""Text without what a terminal would act on: controls, line ends and lone surrogates escaped.

    >>> printable("a\x1b[31m\nb")
    'a\\x1b[31m\\nb'
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object, most: int = 80) -> str:
    """A value that someone gave as a part of a message: short, in one line."""
    try:
        if isinstance(value, list | tuple | dict):
            text = f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
        else:
            text = printable(repr(value))
    except ValueError:
        text = "a number of very many digits"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown_line(text: object, most: int = 200) -> str:
    """A name, a path or a reason that something else gave, short and in one line."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def counted(number: float, what: str, several: str | None = None) -> str:
    """A number of things in words.

    >>> counted(1, "epoch"), counted(1200, "epoch"), counted(10, "class", "classes")
    ('1 epoch', '1,200 epochs', '10 classes')

    Args:
        number: of things; a part of one is possible.
        what: one of them is.
        several: what several are; default that with an s.
    """
    return f"{number:,.15g} {what if number == 1 else several or f'{what}s'}"


def near_names(name: str, known: Sequence[str]) -> str:
    """A "; did you mean ...?" for an unknown name, or nothing."""
    close = [k for k in known if name.lower() in k.lower()][:3]
    close += [k for k in difflib.get_close_matches(name, known, n=5) if k not in close]
    return f"; did you mean {', '.join(close[:5])}?" if close else ""


def first_line(error: BaseException) -> str:
    """What an error says, in one printable line of reasonable length."""
    return shown_line((str(error).strip() or type(error).__name__).splitlines()[0], 160)


def _is_inside(file: str) -> bool:
    """Whether a file lies in the folder of this package or of torch, where that is loaded."""
    loaded = [sys.modules[name] for name in (__package__, "torch") if name in sys.modules]
    folders = tuple(os.path.join(folder, "") for module in loaded for folder in module.__path__)
    return file.startswith(folders)
