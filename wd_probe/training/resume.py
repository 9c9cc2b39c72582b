"""Whether a run can be resumed, and what it was asked to do; nothing here loads torch."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError, shown
from ..runs.reading import damaged, read_json
from ..runs.schema import RunConfig, RunSummary
from .options import TrainOptions, assumed, typed


def check_resumable(path: Path) -> dict[str, Any]:
    """The config.json of a run that can be resumed.

    Raises:
        InputError: there is none, it is damaged, or the run has ended.
    """
    file = path / "config.json"
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if not file.is_file():
        raise InputError(f"{path} is no run folder: it has no config.json")
    config = read_json(file, RunConfig)
    if config.get("command") not in ("train", "rop"):
        raise InputError(f"{path} is no run of `wdprobe train` or `wdprobe rop`")
    try:
        status = read_json(path / "summary.json", RunSummary).get("status")
    except InputError:  # killed before it, or in the middle
        return config
    if status == "finished":
        raise InputError(f"{path} has finished; there is nothing left to resume")
    if status == "diverged":
        raise InputError(f"{path} has diverged, and would again; start another with a smaller --lr")
    return config


def options_of(path: Path, command: str) -> TrainOptions:
    """The options of a run that can be resumed, its folder among them.

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
            f"`wdprobe {config['command']} --resume {path}` resumes it"
        )
    names = [field.name for field in fields(TrainOptions) if field.name != "command"]
    config = {**assumed(), **config}
    lacking = [name for name in names if name not in config]
    made_by = (config.get("versions") or {}).get("wd-probe")
    if lacking or made_by != __version__:
        raise InputError(
            f"{path} is a run of wd_probe {shown(made_by)}, which this version cannot resume"
            + (f" (it says nothing of {lacking[0]})" if lacking else "")
        )
    try:
        values = {name: typed(name, config[name]) for name in names}
        return TrainOptions(**values | {"command": command, "output": path})
    except InputError as error:
        raise damaged(path / "config.json", error) from error
