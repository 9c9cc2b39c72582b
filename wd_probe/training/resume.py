"""What a run was asked to do, from its folder."""

from dataclasses import fields
from pathlib import Path

from .. import __version__
from ..errors import InputError, shown
from ..runs.reading import damaged
from .checkpoint import check_resumable
from .options import TrainOptions, typed


def options_of(path: Path, command: str) -> TrainOptions:
    """The options of a run that can be gone on with, its folder among them.

    Args:
        path: the run folder.
        command: the one that was to make it.

    Raises:
        InputError: see :func:`check_resumable`; or it is a run of another command or version.
    """
    config = check_resumable(path)
    if config["command"] != command:
        raise InputError(
            f"{path} is a run of `wdprobe {config['command']}`; "
            f"`wdprobe {config['command']} --resume {path}` goes on with it"
        )
    names = [field.name for field in fields(TrainOptions) if field.name != "command"]
    lacking = [name for name in names if name not in config]
    made_by = (config.get("versions") or {}).get("wd-probe")
    if lacking or made_by != __version__:
        raise InputError(
            f"{path} is a run of wd_probe {shown(made_by)}, which this version cannot go on with"
            + (f" (it says nothing of {lacking[0]})" if lacking else "")
        )
    try:
        values = {name: typed(name, config[name]) for name in names}
        return TrainOptions(**values | {"command": command, "output": path})
    except InputError as error:
        raise damaged(path / "config.json", error) from error
