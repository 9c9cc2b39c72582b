"""A script run as python itself would run it, with a watch that begins when it loads torch."""

import atexit
import builtins
import io
import os
import runpy
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from wd_probe.errors import InputError

from .arrival import when_loaded
from .children import watch_children
from .processes import process

_showwarning = warnings.showwarning


class Script(BaseException):
    """What `wdprobe watch` is to run, once the command line is out of its way.

    Attributes:
        name: a file, a folder or archive with a ``__main__.py``, or a module.
        is_module: whether it is a module.
        arguments: of its own.
        options: of the watch.
        children: whether to watch the processes that it starts too.
        command_line: that started it.
    """

    def __init__(
        self,
        name: str,
        is_module: bool,
        arguments: Sequence[str],
        options: Mapping[str, Any],
        command_line: str,
        children: bool = False,
    ) -> None:
        super().__init__(name)
        self.name, self.is_module, self.arguments = name, is_module, arguments
        self.options, self.command_line, self.children = options, command_line, children
        self._watch: Any = None

    def check(self) -> None:
        """Refuse what is not there.

        Raises:
            InputError: there is no such file.
        """
        if not self.is_module and not os.path.exists(self.name):
            raise InputError(f"{self.name} does not exist: which script is to be watched?")

    def run(self) -> None:
        """Run it in this process, as its main program; it ends as it would end alone."""
        sys.excepthook = sys.__excepthook__  # typer has its own
        warnings.showwarning = _showwarning
        atexit.register(self._end)
        if self.children:
            watch_children(self._watch_options())
        when_loaded("torch", self._begin)
        try:
            self._execute()
        except BaseException as error:
            if self._watch is not None and isinstance(error, SystemExit) and error.code:
                self._watch.status = "failed"
            _hide_these_frames(error)
            raise

    def _execute(self) -> None:
        main = types.ModuleType("__main__")
        main.__dict__.update(__builtins__=builtins, __annotations__={})
        sys.modules["__main__"] = main
        sys.argv[:] = ["-m" if self.is_module else self.name, *self.arguments]
        run_main: Any = runpy._run_module_as_main  # type: ignore[attr-defined]
        if self.is_module:
            _lead_with(os.getcwd())
            run_main(self.name)
        elif os.path.isdir(self.name) or not _is_source(self.name):
            _lead_with(os.path.join(os.getcwd(), self.name), always=True)
            run_main("__main__", False)
        else:
            path = os.path.join(os.getcwd(), self.name)
            _lead_with(os.path.dirname(os.path.realpath(path)))
            main.__dict__.update(
                __file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path)
            )
            with io.open_code(path) as file:
                code = compile(file.read(), path, "exec", dont_inherit=True)
            exec(code, main.__dict__)

    def _begin(self) -> None:
        """Torch is loaded: from here on an optimizer may step."""
        from wd_probe.integrations.watching import Watch

        self._watch = Watch(**self._watch_options())

    def _watch_options(self) -> dict[str, Any]:
        return {
            **self.options,
            "script": self.name if self.is_module else Path(self.name).name,
            "command_line": self.command_line,
            "tells_idle": not self.children,
        }

    def _end(self) -> None:
        if self._watch is None and not self.children and not process():
            print(
                f"wdprobe: {self.name} did not load torch, so nothing was measured; steps in child "
                "processes are watched with --children",
                file=sys.stderr,
            )


def _is_source(name: str) -> bool:
    """Whether it is text to be compiled, and no archive."""
    with open(name, "rb") as file:
        return file.read(4) != b"PK\x03\x04"


def _lead_with(path: str, *, always: bool = False) -> None:
    """Put a folder in the place that python gives it; ours is there, or none with ``-P``."""
    if not sys.flags.safe_path:
        sys.path[0] = path
    elif always:
        sys.path.insert(0, path)


def _hide_these_frames(error: BaseException) -> None:
    """Have the traceback begin with the script's own lines, whoever shows it."""
    kept = error.__traceback__
    while kept is not None and kept.tb_frame.f_code.co_filename == __file__:
        kept = kept.tb_next
    show = sys.excepthook

    def shown(
        kind: type[BaseException], value: BaseException, trace: types.TracebackType | None
    ) -> None:
        if value is error:
            value, trace = value.with_traceback(kept), kept
        show(kind, value, trace)

    sys.excepthook = shown
