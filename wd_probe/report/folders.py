"""Which folders hold runs and sweeps."""

from collections.abc import Sequence
from pathlib import Path

#: What making something of a file with unexpected content can raise.
DAMAGE = (
    KeyError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


def expanded(folders: Sequence[Path]) -> list[Path]:
    """Runs and sweeps as they are, a folder of them as what it holds; each once."""
    found: dict[Path, Path] = {}
    for folder in folders:
        inside = [folder]
        if folder.is_dir() and not _holds(folder):
            inside = sorted(child for child in folder.iterdir() if _holds(child)) or [folder]
        for path in inside:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def is_sweep(path: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (path / "cells").is_dir()


def _holds(folder: Path) -> bool:
    return (folder / "config.json").is_file() or is_sweep(folder)
