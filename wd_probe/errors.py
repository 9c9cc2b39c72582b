"""The errors this package raises on purpose; each message says what, where and what to do."""

import sys
import warnings
from pathlib import Path

_OWN = str(Path(__file__).parent)


class WdProbeError(Exception):
    """Root of every error wd_probe raises on purpose."""


class InputError(WdProbeError, ValueError):
    """An argument, option or file that cannot be used as given."""


class RunError(WdProbeError, RuntimeError):
    """A run that started well and could not go on."""


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
        level, frame = 2, sys._getframe(1)
        while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
            level, frame = level + 1, frame.f_back
        warnings.warn(message, WdProbeWarning, stacklevel=level)


def first_line(error: BaseException) -> str:
    """What an error says, in one printable line of reasonable length."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = "".join(ch if ch.isprintable() else repr(ch)[1:-1] for ch in line)
    return line if len(line) <= 160 else line[:157] + "..."


def _is_inside(file: str) -> bool:
    return file.startswith(_OWN) or "/torch/" in file.replace("\\", "/")
