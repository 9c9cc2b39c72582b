"""The python processes that a watched script starts, each with a watch of its own."""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .arrival import when_loaded

#: Holds what a child is to do; python itself runs what lies under this name at its start.
_TOLD, _START = "WD_PROBE_WATCH", "sitecustomize"
_CODE = f"""import sys
here = next(path for path in sys.path if __file__.startswith(path))
sys.path.remove(here)
own = sys.modules.pop({_START!r})
try:
    import {_START}  # the one that this stands before
except ImportError:
    sys.modules[{_START!r}] = own
try:
    from wd_probe.cli.children import begin
except ImportError:  # a python of another environment
    pass
else:
    begin()
"""


def watch_children(options: Mapping[str, Any]) -> None:
    """Have every python that is started from here on watched by these options."""
    folder = Path(tempfile.mkdtemp(prefix="wdprobe-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / f"{_START}.py").write_text(_CODE, encoding="utf-8")
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([known] if known else [])])
    output = options["output"]
    told = {**options, "output": None if output is None else os.path.abspath(output)}
    os.environ[_TOLD] = json.dumps(told)


def begin() -> None:
    """In a child: watch it, if it loads torch."""
    told = json.loads(os.environ[_TOLD])

    def watch() -> None:
        from wd_probe.integrations.watching import Watch
        from wd_probe.runs.folder import default_folder

        base = told["output"] or default_folder("watch", Path(told["script"]).stem)
        Watch(**{**told, "output": f"{base}-p{os.getpid()}"})

    when_loaded("torch", watch)
