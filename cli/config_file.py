"""`--config FILE`: options from a file, where they are not typed."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.models import OptionInfo

from wd_probe.errors import InputError, near_names, shown

from .console import err

_HELP = "Options from YAML or TOML, a run's config.json or timm's args.yaml; typed ones win."
_SEVERAL = list[str] | None, list[Path] | None
_OF_ANY: set[str] = set()  # keys that some command takes


def parameter(others: Sequence[inspect.Parameter]) -> inspect.Parameter:
    """The option, for a command that has these others."""
    known = {}
    for other in others:
        kind, *said = get_args(other.annotation) or (None,)
        if said and isinstance(said[0], OptionInfo):
            flag = str(said[0].default).partition("/")[0]  # where typer has the first name of it
            known[flag.lstrip("-").replace("-", "_")] = other.name, kind
    _OF_ANY.update(known)

    def read(ctx: typer.Context, value: Path | None) -> Path | None:
        if value is not None and not ctx.resilient_parsing:
            ctx.default_map = _defaults(value, known)  # which is looked at where nothing is typed
        return value

    said = typer.Option("--config", help=_HELP, is_eager=True, callback=read)
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None,
        annotation=Annotated[Path | None, said],
    )  # fmt: skip


def _defaults(path: Path, known: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """By parameter, what a file says of it."""
    from wd_probe.training.option_files import read_options

    file = read_options(path)
    others = [key for key in file.values if file.strict and key not in known]
    for key in others:
        if key not in _OF_ANY:
            near = near_names(key, list(known))
            raise InputError(f"config {path}: unknown key {shown(key)}{near}")
    if missed := [*file.missed(known), *others]:
        err.print(
            f"wdprobe: {path} asks for more than this command has, which is left out: "
            f"{', '.join(missed)}",
            soft_wrap=True,
            markup=False,
        )
    found = {}
    for key, value in file.values.items():
        if key in known and value is not None:
            name, kind = known[key]
            try:
                found[name] = _taken(key, value, kind)
            except InputError as error:
                raise InputError(f"config {path}: {error}") from error
    return found


def _taken(key: str, value: Any, kind: Any) -> Any:
    """A value as the command line takes it."""
    from wd_probe.training.options import fitted

    if kind in _SEVERAL:
        if isinstance(value, dict):
            return [f"{name}={one}" for name, one in value.items()]
        if isinstance(value, str) and key == "opt_kwargs":
            return value.split()
        return [fitted(key, one, str) for one in (value if isinstance(value, list) else [value])]
    if kind in (str, str | None) and isinstance(value, list):
        return ",".join(map(str, value))
    if kind in (str, str | None) and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return fitted(key, value, kind)
