"""How a command takes the options that the library describes, and those of every command."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Generic,
    Literal,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import typer

from wd_probe.errors import InputError, shown
from wd_probe.training.option import Option, options_in, said_of
from wd_probe.training.options import OUTPUT

from . import config_file
from .console import show_warnings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Command = Callable[..., None]

GRID = "Grid"
EVERY = "Measure R_op at every so-many-th step; 0: never."
Json = Annotated[bool, Option("One JSON object on stdout, the rest on stderr.", OUTPUT)]
Yes = Annotated[bool, Option("Also more than 10,000 cells.")]


@dataclass(frozen=True, slots=True)
class Given(Generic[T]):
    """What a command was given: its default options, and by name what was typed instead."""

    defaults: T
    typed: Mapping[str, Any]

    def options(self, **chosen: Any) -> T:
        """The options, some of them chosen by the command.

        Raises:
            InputError: one of them cannot be, or they do not fit each other.
        """
        return replace(self.defaults, **{**self.typed, **chosen})

    def flag(self, name: str) -> str:
        """An option as it is typed."""
        return options_in(self.defaults.__class__)[name][1].flag_of(name)


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of an options dataclass that a command takes.

    Attributes:
        defaults: the command's options where nothing is typed.
        but: fields that it does not take.
        only: the fields that it takes; empty for all.
        axes: help by field of those that take several values, with commas between; they come first.
        help: by field, in place of the dataclass's own.
    """

    defaults: Any
    but: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    axes: Mapping[str, str] = field(default_factory=dict)
    help: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The fields, in the order of the help."""
        names = self.only or options_in(self.defaults.__class__)
        return [*self.axes, *(n for n in names if n not in (*self.axes, *self.but))]

    def parameters(self) -> list[inspect.Parameter]:
        """A parameter of the command for each field."""
        found, known = [], options_in(self.defaults.__class__)
        for name in self.names():
            (kind, option), default = known[name], getattr(self.defaults, name)
            if name in self.axes:
                option, kind = Option(self.axes[name], GRID), str
                default = None if default is None else str(default)
            elif name in self.help:
                option = replace(option, help=self.help[name])
            found.append(_parameter(name, kind, option, default))
        return found

    def given(self, typed: Mapping[str, Any]) -> Given[Any]:
        """What was typed, as the dataclass has it."""
        found, known = {}, options_in(self.defaults.__class__)
        for name in self.names():
            if name not in typed:
                continue
            (kind, option), value = known[name], typed[name]
            if name in self.axes:
                value = _listed(value)
            elif option.joined is not None:
                value = option.joined(value or ())
            elif get_origin(kind) is tuple:
                numbers = get_args(kind)[0] is float
                value = _numbers(option.flag_of(name), value) if numbers else _listed(value)
            found[name] = value
        return Given(self.defaults, found)


def command(positional: str = "", **fields: Fields) -> Callable[[Command], Command]:
    """Make a function a command that typer can read.

    Args:
        positional: an option whose value may be typed without its flag, too.
        fields: by the name of a parameter, what it is :class:`Given`. Every other parameter is an
            option of the command's own, annotated with an :class:`Option` or with typer's own.
    """

    def decorate(run: Command) -> Command:
        own: dict[str, Option] = {}
        hints = get_type_hints(run, include_extras=True)
        parameters = [inspect.Parameter("ctx", _KEYWORD, annotation=typer.Context)]
        for name, parameter in inspect.signature(run).parameters.items():
            if name in fields:
                parameters += fields[name].parameters()
            elif (said := said_of(hints[name])) is not None:
                own[name] = said[1]
                parameters.append(_parameter(name, *said, parameter.default))
            else:
                own[name] = Option("", flag=name.upper())
                parameters.append(parameter.replace(kind=_KEYWORD, annotation=hints[name]))

        if positional:
            parameters.append(_argument(next(p for p in parameters if p.name == positional)))
        parameters.append(config_file.parameter(parameters))

        @functools.wraps(run)
        def called(ctx: typer.Context, **values: Any) -> None:
            show_warnings()
            sources = {name: ctx.get_parameter_source(name) for name in values}
            typed = {n: values[n] for n, s in sources.items() if s and s.name != "DEFAULT"}
            if (argument := typed.pop(positional + _ARGUMENT, None)) is not None:
                if (source := sources[positional]) and source.name == "COMMANDLINE":
                    name = positional.upper()
                    raise InputError(f"give {name} or --{positional}, not both")
                values[positional] = typed[positional] = argument
            for name, option in own.items():
                several = values[name] if isinstance(values[name], list) else [values[name]]
                for value in several:
                    option.check(name, value)
            given = {name: of.given(typed) for name, of in fields.items()}
            run(**given, **{name: values[name] for name in own})

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called

    return decorate


_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_ARGUMENT = "_argument"  # behind the name of an option that may be typed without its flag


def _argument(option: inspect.Parameter) -> inspect.Parameter:
    """The same without its flag, where nothing is its default."""
    several = get_origin(get_args(option.annotation)[0]) is not None
    kind: Any = list[str] | None if several else str | None
    said = typer.Argument(
        help=f"As --{option.name}.", metavar=option.name.upper(), show_default=False
    )
    return inspect.Parameter(
        option.name + _ARGUMENT, _KEYWORD, default=None, annotation=Annotated[kind, said]
    )


def _parameter(name: str, kind: Any, option: Option, default: Any) -> inspect.Parameter:
    flag = option.flag_of(name)
    if kind is bool and default:
        flag = f"{flag}/--no{flag[1:]}"
    if option.joined is not None:
        kind, default = list[str] | None, None
    elif get_origin(kind) is tuple:
        kind, default = str, ",".join(map(str, default))
    elif option.choices:
        kind = Literal[option.choices]
    says = typer.Option(
        flag, help=option.help, rich_help_panel=option.panel, show_default=default != ""
    )
    return inspect.Parameter(name, _KEYWORD, default=default, annotation=Annotated[kind, says])


def _listed(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated text."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _listed(text))
    except ValueError as error:
        raise InputError(f"{flag} takes numbers with commas between, got {shown(text)}") from error
