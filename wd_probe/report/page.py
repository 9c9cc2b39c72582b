"""`wdprobe report`: runs and sweeps on one page that needs nothing else."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from .. import __version__
from ..errors import InputError, WdProbeWarning, counted
from ..runs.folder import default_folder, write_whole
from ..runs.reading import Run, damaged, read_run
from . import comparison, scan
from . import run as training
from . import sweep as sweeps
from .folders import DAMAGE, expanded, is_sweep
from .values import coded, csv_url, numeric_columns, svg

#: More runs than this are only compared; each has a section of its own up to here.
_OWN_SECTIONS = 8
#: What reading or drawing a file with unexpected content can raise.
_DAMAGE = (*DAMAGE, UndefinedError)

_templates = Environment(
    loader=PackageLoader("wd_probe.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters.update(
    coded=coded, counted=counted, csv_url=csv_url, numeric_columns=numeric_columns, svg=svg
)


@dataclass(frozen=True, slots=True)
class _Part:
    """A run or a sweep on the page; ``content`` None where it cannot be shown."""

    path: Path
    kind: str
    status: str
    title: str
    content: Markup | None
    run: Run | None = None
    trouble: str | None = None


def report(folders: Sequence[Path], output: Path | None = None) -> dict[str, Any]:
    """Write one page about runs and sweeps.

    Damaged and unfinished runs are named on the page and in one warning.

    Args:
        folders: of runs, of sweeps, or of several runs.
        output: the file; default ``report.html`` in the folder if it is one, else under ``runs/``.

    Returns:
        ``command``, ``page`` (the file) and ``runs``: ``run``, ``kind``, ``status`` and ``trouble``
        of each.

    Raises:
        InputError: no folder holds a run that can be read, or the file cannot be written.
    """
    paths = expanded(folders)
    detailed = sum(not is_sweep(path) for path in paths) <= _OWN_SECTIONS
    parts = [_part(path, detailed) for path in paths]
    shown = [part for part in parts if part.content is not None]
    if not shown:
        first = next(part.trouble for part in parts)
        more = f" (and {len(parts) - 1} more)" if len(parts) > 1 else ""
        raise InputError(f"there is nothing to report: {first}{more}")
    troubles = [part.trouble for part in parts if part.trouble is not None]
    target = output or _default(folders)
    _write(target, _page(shown, troubles, detailed))
    if troubles:
        more = f" (and {len(troubles) - 1} more, on the page)" if len(troubles) > 1 else ""
        warnings.warn(f"{troubles[0]}{more}", WdProbeWarning, stacklevel=2)
    return {
        "command": "report",
        "page": str(target),
        "runs": [
            {"run": str(p.path), "kind": p.kind, "status": p.status, "trouble": p.trouble}
            for p in parts
        ],
    }


# --- what is there --------------------------------------------------------------------------------


def _part(path: Path, detailed: bool) -> _Part:
    kind = "sweep" if is_sweep(path) else "run"
    if not path.exists():
        return _broken(path, kind, f"{path} does not exist")
    try:
        return _sweep_part(path) if kind == "sweep" else _run_part(path, detailed)
    except InputError as error:
        return _broken(path, kind, str(error))
    except _DAMAGE as error:
        return _broken(path, kind, str(damaged(path, f"{type(error).__name__} {error}")))


def _broken(path: Path, kind: str, trouble: str) -> _Part:
    return _Part(path, kind, "damaged", str(path), None, trouble=trouble)


def _run_part(path: Path, detailed: bool) -> _Part:
    run = read_run(path)
    status = training.status(run)
    trouble = f"{path} is {status}" if status in ("unfinished", "interrupted") else None
    title = f"{run.config['model']} · {path.resolve().name}"
    content = _run_section(run) if detailed else Markup()
    comparison.results(run)  # what every run is compared by
    return _Part(path, str(run.config["command"]), status, title, content, run, trouble)


def _run_section(run: Run) -> Markup:
    if training.is_scan(run):
        return _rendered("scan", scan.section(run))
    return _rendered("run", training.section(run))


def _sweep_part(path: Path) -> _Part:
    sweep = sweeps.read_sweep(path)
    if not sweep.cells:
        return _broken(path, "sweep", f"{path} is a sweep without a finished cell")
    title = f"Sweep · {path.resolve().name}"
    status = "unfinished" if "unfinished" in sweep.counts() else "finished"
    content = _rendered("sweep", sweeps.section(sweep))
    return _Part(path, "sweep", status, title, content, trouble=_sweep_trouble(sweep))


def _sweep_trouble(sweep: sweeps.Sweep) -> str | None:
    counts = sweep.counts()
    told = [f"{counts[end]} {end}" for end in ("unfinished", "failed", "damaged") if end in counts]
    return f"cells of {sweep.path}: {', '.join(told)}" if told else None


# --- the page -------------------------------------------------------------------------------------


def _page(shown: Sequence[_Part], troubles: Sequence[str], detailed: bool) -> str:
    runs = [part.run for part in shown if part.run is not None]
    compared = _rendered("comparison", comparison.section(runs)) if len(runs) > 1 else Markup()
    return _rendered(
        "page",
        {
            "title": shown[0].title if len(shown) == 1 else f"{len(shown)} runs beside each other",
            "troubles": troubles,
            "comparison": compared,
            "parts": shown,
            "detailed": detailed,
            "own_sections": _OWN_SECTIONS,
            "version": __version__,
        },
    )


def _rendered(name: str, values: Mapping[str, Any]) -> Markup:
    """A template with its values; whatever is no `Markup` is escaped."""
    return Markup(_templates.get_template(f"{name}.html").render(values))


def _default(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0] / "report.html"
    return default_folder("report", f"{len(folders)}-runs").with_suffix(".html")


def _write(target: Path, text: str) -> None:
    if target.is_dir():
        raise InputError(f"{target} is a folder; --output names a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, text)
    except OSError as error:
        raise InputError(
            f"{target} cannot be written ({error.strerror}); choose another --output"
        ) from error
