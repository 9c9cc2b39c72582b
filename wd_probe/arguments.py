"""Checks of what callers give; each message names the argument."""

import math
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import InputError, shown, shown_line


def check_rate(value: float, what: str = "rate") -> float:
    """The value, if it is a rate.

    Raises:
        InputError: it is negative, not finite or no number.
    """
    if not _is_finite(value) or value < 0:
        raise InputError(f"{what} must be a finite number ≥ 0, got {_told(value)}")
    return value


def check_positive(value: float, what: str) -> float:
    """The value, if it is a finite number above 0.

    Raises:
        InputError: it is not.
    """
    if not _is_finite(value) or value <= 0:
        raise InputError(f"{what} must be a finite number > 0, got {_told(value)}")
    return value


def check_finite(value: float, what: str) -> float:
    """The value, if it is a finite number.

    Raises:
        InputError: it is not.
    """
    if not _is_finite(value):
        raise InputError(f"{what} must be a finite number, got {_told(value)}")
    return value


def check_count(value: int, what: str, least: int = 1) -> int:
    """The value, if it is a whole number that is large enough.

    Raises:
        InputError: it is not.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise InputError(f"{what} must be a whole number, got {_told(value)}") from None
    if count < least:
        raise InputError(f"{what} must be at least {least}, got {count}")
    return count


def check_choice(value: Any, what: str, known: Iterable[str]) -> None:
    """Refuse what is none of the known values.

    Raises:
        InputError: it is not.
    """
    known = tuple(known)
    if value not in known:
        raise InputError(f"unknown {what} {shown(value)}; choose from {', '.join(known)}")


def check_path(value: Path, what: str) -> None:
    """Refuse a path that no file system takes; to ask one whether it is there would be an error.

    Raises:
        InputError: a name in it is too long, or all of it; a NUL byte or half a character is in it.
    """
    if "\0" in str(value):
        raise InputError(f"{what} must be a path without NUL bytes, got {shown(str(value))}")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise InputError(
            f"{what} must be a path of whole characters, got {shown(str(value))}"
        ) from None
    names = [len(name.encode("utf-8", "surrogatepass")) for name in (*value.parts, str(value))]
    if max(names[:-1], default=0) > 255 or names[-1] > 4095:
        raise InputError(f"{what} must be a path that is not too long, got {shown(str(value))}")


def as_path(value: Any, what: str) -> Path:
    """A path, of a text or a path.

    Raises:
        InputError: it is neither, is empty, or none that a file system takes.
    """
    check_type(value, what, (str, os.PathLike), "a path")
    if not os.fspath(value):
        raise InputError(f"{what}: a path is needed, got an empty one")
    path = Path(value)
    check_path(path, what)
    return path


def check_type(value: Any, what: str, kind: type | tuple[type, ...], needed: str) -> None:
    """Refuse what is of another kind.

    Raises:
        InputError: it is.
    """
    if not isinstance(value, kind):
        raise InputError(f"{what}: {needed} is needed, got {type(value).__name__}")


def check_callable(value: Any, what: str, needed: str) -> None:
    """Refuse what cannot be called.

    Raises:
        InputError: it cannot.
    """
    if not callable(value):
        raise InputError(f"{what}: {needed} is needed, got {type(value).__name__}")


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, str) and math.isfinite(value)
    except (TypeError, ValueError, OverflowError):  # a tensor of several numbers, 10**400
        return False


def _told(value: Any) -> str:
    return shown_line(value, 80) if isinstance(value, str) else shown(value)
