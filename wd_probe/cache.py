"""The folder for what can be made again: the compiled kernel, unpacked datasets."""

import os
from pathlib import Path

from platformdirs import user_cache_path

from .errors import InputError


def cache_dir() -> Path:
    """This user's folder for things that can be made again; created if missing.

    Raises:
        InputError: there is no place for it, or it cannot be created.
    """
    try:
        folder = user_cache_path("wd_probe", appauthor=False)
        if not Path(os.environ.get("XDG_CACHE_HOME") or "/").is_absolute():
            folder = Path.home() / ".cache" / "wd_probe"  # the standard has relative ones ignored
    except RuntimeError:  # a user that the machine does not know, as in containers
        folder = Path()
    if not folder.is_absolute():  # older platformdirs: ~ left as it is
        raise InputError("no home folder to keep a cache in; set XDG_CACHE_HOME to a full path")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cache folder {folder} cannot be made ({error.strerror}); set XDG_CACHE_HOME"
        ) from error
    return folder
