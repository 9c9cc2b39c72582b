"""Where the cells of a grid run: here in turn, or with Ray."""

import contextlib
from typing import Annotated, Any

from wd_probe.errors import InputError
from wd_probe.training.option import Option

_WHERE = "Where"

Ray = Annotated[bool, Option("Run cells as Ray tasks, on this machine.", _WHERE)]
RayAddress = Annotated[
    str | None, Option("Run them on a cluster: HOST:PORT, ray://HOST:PORT or auto.", _WHERE)
]
GpusPerCell = Annotated[
    float | None, Option("With Ray; may be a fraction (default 1 if there are any).", _WHERE)
]
CpusPerCell = Annotated[int | None, Option("With Ray; also torch's threads (default 1).", _WHERE)]


def runner(ray: bool, address: str | None, cpus: int | None, gpus: float | None) -> Any:
    """A context with what runs the cells: Ray, or None for here and in turn.

    Raises:
        InputError: shares of a machine are asked for without Ray.
    """
    if ray or address is not None:
        from wd_probe.sweeps.ray import OnRay

        return OnRay(address, cpus=1 if cpus is None else cpus, gpus=gpus)
    if cpus is not None or gpus is not None:
        raise InputError("--cpus-per-cell and --gpus-per-cell need --ray or --ray-address")
    return contextlib.nullcontext()
