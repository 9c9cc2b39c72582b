"""The terminal: results on stdout, the rest on stderr, both printable."""

import contextlib
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from wd_probe.errors import printable
from wd_probe.tables import PrintableConsole

from .encoding import json_for
from .processes import process

out = PrintableConsole(highlight=False, soft_wrap=False, quiet=process() > 0)


err = PrintableConsole(stderr=True, highlight=False, quiet=process() > 0)


def loading() -> contextlib.AbstractContextManager[object]:
    """A spinner while the libraries load, on a terminal."""
    return err.status("loading ...") if err.is_terminal else contextlib.nullcontext()


def show_warnings() -> None:
    """Print warnings as one plain line each."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        err.print(f"[yellow]wdprobe: warning:[/] {escape(printable(message))}", soft_wrap=True)

    warnings.showwarning = show


def to_stdout(result: Mapping[str, Any]) -> None:
    """A result as JSON, untouched by rich."""
    from wd_probe.runs.folder import dumps

    if not out.quiet:
        sys.stdout.write(json_for(sys.stdout.encoding, dumps(result)) + "\n")
