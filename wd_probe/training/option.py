"""What is said of an option, once, in its field: for the command line, files and checks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_type_hints

from ..arguments import check_count, check_path, check_positive, check_rate
from ..errors import InputError, shown

AT_LEAST_0, AT_LEAST_1 = partial(check_count, least=0), check_count
NOT_NEGATIVE, POSITIVE = check_rate, check_positive


def check_probability(value: float, what: str) -> None:
    """Refuse what is no probability."""
    if not 0 <= value <= 1:
        raise InputError(f"{what} must be a probability, got {shown(value)}")


def check_share(value: float, what: str) -> None:
    """Refuse what is no share below 1."""
    if not 0 <= value < 1:
        raise InputError(f"{what} must be a share below 1, got {shown(value)}")


@dataclass(frozen=True, slots=True)
class Option:
    """What is said of an option in the ``Annotated`` type of its field.

    Attributes:
        help: for the command line.
        panel: where the command line's help lists it.
        must: refuses a value other than None, by the flag, unless it is what it has to be.
        choices: all that the command line takes, where the type takes more.
        joined: makes the value of the texts typed, where the option is typed several times.
        flag: on the command line, where it is not the field's name.
    """

    help: str
    panel: str | None = None
    must: Callable[[Any, str], object] | None = None
    choices: tuple[str, ...] = ()
    joined: Callable[[Sequence[str]], Any] | None = None
    flag: str | None = None

    def flag_of(self, name: str) -> str:
        """The option as it is typed."""
        return self.flag or f"--{name.replace('_', '-')}"

    def check(self, name: str, value: Any) -> None:
        """Hold a value to what it must be.

        Raises:
            InputError: it is not.
        """
        if isinstance(value, Path):
            check_path(value, self.flag_of(name))
        if self.must is not None and value is not None:
            self.must(value, self.flag_of(name))


def said_of(hint: Any) -> tuple[Any, Option] | None:
    """An annotation's type and what is said of it, if anything is."""
    said = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Option)), None)
    return None if said is None else (hint.__origin__, said)


@cache
def options_in(kind: type) -> Mapping[str, tuple[Any, Option]]:
    """By name the type of each option of a dataclass, and what is said of it."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: found for name, hint in hints.items() if (found := said_of(hint)) is not None}


def check_options(options: Any) -> None:
    """Hold every option of a dataclass to what it must be.

    Raises:
        InputError: one is not.
    """
    for name, (_, option) in options_in(options.__class__).items():
        option.check(name, getattr(options, name))
