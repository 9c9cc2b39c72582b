"""The `wdprobe` command."""

import shlex
import signal
import sys
from typing import Annotated

import typer

from . import (
    audit,
    compare,
    dashboard,
    doctor,
    layers,
    report,
    reproduce,
    rop,
    sweep,
    train,
    watch,
    zeroshot,
)
from .encoding import write_plainly
from .processes import INTERRUPTED, check_shared, process
from .script import Script
from .suggestions import Command

app = typer.Typer(
    name="wdprobe",
    help="What does your weight decay really do? Probes for PyTorch and timm models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every command has --help. Runs are folders under runs/ unless --output says otherwise.",
)
app.command("rop", cls=Command)(rop.rop)
app.command("zeroshot", cls=Command)(zeroshot.zeroshot)
app.command("train", cls=Command)(train.train)
app.command("watch", cls=watch.WatchCommand)(watch.watch)
app.command("audit", cls=Command)(audit.audit)
app.command("layers", cls=Command)(layers.layers)
app.command("report", cls=Command)(report.report)
app.command("compare", cls=Command)(compare.compare)
app.command("sweep", cls=Command)(sweep.sweep)
app.command("reproduce", cls=Command)(reproduce.reproduce)
app.command("doctor", cls=Command)(doctor.doctor)
app.command("dashboard", cls=Command)(dashboard.dashboard)


def _version(wanted: bool) -> None:
    if wanted:
        from wd_probe import __version__

        typer.echo(f"wdprobe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; expected errors are one line: exit code 2 for input, 1 for a run."""
    from wd_probe.errors import InputError, Interrupted, WdProbeError, printable

    if sys.argv[1:2] != ["watch"]:  # in whose process a script finds everything as it always is
        write_plainly()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end is a Ctrl-C
    where = f"wdprobe: rank {process()}:" if process() else "wdprobe:"
    script = None
    try:
        check_shared()
        script = _chosen()
    except WdProbeError as error:
        stopped = isinstance(error, Interrupted)
        print(f"{where} {'' if stopped else 'error: '}{printable(error)}", file=sys.stderr)
        if isinstance(error, Interrupted) and error.resumes:
            print(shlex.join(["wdprobe", *sys.argv[1:]]), file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else INTERRUPTED if stopped else 1)
    except KeyboardInterrupt:
        print(f"{where} interrupted before anything was measured", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    if script is not None:
        script.run()


def _chosen() -> Script | None:
    """Run the command line; what `wdprobe watch` is to run comes back."""
    try:
        app()
    except Script as script:
        script.check()
        return script
    return None
