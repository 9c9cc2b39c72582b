"""`wdprobe watch`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from wd_probe.arguments import check_count
from wd_probe.errors import InputError
from wd_probe.training.option import Option
from wd_probe.training.options import OUTPUT

from . import options as o
from .processes import process
from .script import Script
from .suggestions import Command

_TAKE_A_VALUE = ("--every", "--output", "--keep", "--config")


class WatchCommand(Command):
    """A command whose options end where the script's begin, as python's own do."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does; what follows a module is the module's."""
        ctx.allow_interspersed_args = False
        place = _place_of_module(args)
        if place is not None:
            args = [*args[:place], "--", *args[place:]]
        return super().parse_args(ctx, args)


def _place_of_module(args: list[str]) -> int | None:
    """Where the arguments of a module begin; None if none is named."""
    place = 0
    while place < len(args) and args[place].startswith("-") and args[place] != "--":
        if args[place] == "-m":
            return place + 2
        place += 2 if args[place] in _TAKE_A_VALUE else 1
    return None


@o.command()
def watch(
    script: Annotated[
        list[str] | None,
        typer.Argument(metavar="SCRIPT ARGS...", help="A training script, and its own arguments."),
    ] = None,
    module: Annotated[
        str | None,
        typer.Option("-m", metavar="MODULE ARGS", help="A module in a script's place, as python."),
    ] = None,
    every: Annotated[
        int, Option("Measure at every so-many-th step.", OUTPUT, must=check_count)
    ] = 1,
    output: Annotated[
        Path | None, Option("Run folder (default runs/watch-SCRIPT-DATE-TIME).", OUTPUT)
    ] = None,
    keep: Annotated[
        Literal["whole", "signs"],
        Option("What is kept of the weights from step to step; signs: R_op alone.", OUTPUT),
    ] = "whole",
    children: Annotated[
        bool, Option("Also the python processes that the script starts, each in its own folder.")
    ] = False,
) -> None:
    """Run a training script, unedited, and measure every optimizer that steps in it.

    Options of wdprobe come before the script; what follows it is the script's. Its arguments,
    output and exit code are what they are without wdprobe; a summary goes to stderr at the end.
    """
    given = script or []
    if module is None and not given:
        raise InputError("which script? wdprobe watch train.py, or wdprobe watch -m package.train")
    if output is not None and not process():
        from wd_probe.runs.folder import occupied

        if refusal := occupied(output):
            raise InputError(refusal)
    raise Script(
        name=module or given[0],
        is_module=module is not None,
        arguments=tuple(given if module is not None else given[1:]),
        options={"output": output, "every": every, "keep": keep},
        command_line=shlex.join(["wdprobe", *sys.argv[1:]]),
        children=children,
    )
