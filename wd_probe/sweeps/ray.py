"""The cells of a sweep as Ray tasks, on this machine or on a cluster."""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
import types
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ..errors import InputError, RunError, counted, shown, shown_line
from .cells import SweepListener, failure, run_cell
from .grid import Cell, Summary

#: How often a cell whose worker died is begun anew.
RETRIES = 3
_SECONDS = 5.0  # to answer a first knock
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_gcs_rpc_server_connect_timeout_s": "10",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    "RAY_task_oom_retries": str(RETRIES),  # without it a cell too large is tried for ever
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a cell without a GPU sees none
}
# What HTTP/2, and so gRPC, opens with: a preface and an empty frame of settings.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


class OnRay:
    """Runs cells as Ray tasks; a :class:`.sweeps.Runner`.

    Every machine needs wd_probe and the same disk under the sweep's folder. A context manager:
    leaving it ends what still runs.

    Args:
        address: ``HOST:PORT``, ``ray://HOST:PORT`` or ``auto``; None for this machine alone.
        cpus: for each cell, and as many torch threads.
        gpus: for each cell, may be a fraction; None for one if there are any.

    Raises:
        InputError: Ray is not installed or not reachable, or no machine is large enough.
    """

    def __init__(
        self, address: str | None = None, *, cpus: int = 1, gpus: float | None = None
    ) -> None:
        if cpus < 1:
            raise InputError(f"--cpus-per-cell must be at least 1, got {cpus}")
        if gpus is not None and not (math.isfinite(gpus) and gpus >= 0):
            raise InputError(f"--gpus-per-cell must be a finite number ≥ 0, got {gpus}")
        self._ray = _connect(address)
        self._hush = contextlib.redirect_stdout(_Hushed(sys.stdout))
        self.cpus = cpus
        try:
            self.gpus = float(self._most("GPU") > 0) if gpus is None else gpus
            self._check_size()
        except BaseException:
            self._ray.shutdown()
            raise

    def __enter__(self) -> "OnRay":
        """Return itself."""
        self._hush.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs, and Ray if it was started here."""
        try:
            self._ray.shutdown()
        finally:
            self._hush.__exit__(None, None, None)

    def __call__(
        self, cells: Sequence[Cell], folder: Path, listener: SweepListener
    ) -> Iterator[tuple[Cell, Summary]]:
        """Run them, as many at a time as there is room for."""
        ray, waiting, running = self._ray, deque(cells), dict[Any, tuple[Cell, float]]()
        task = ray.remote(_run).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=RETRIES, retry_exceptions=False
        )
        place = str(folder.resolve())
        try:
            while waiting or running:
                while waiting and len(running) < self._room():
                    cell = waiting.popleft()
                    listener.cell_started(cell)
                    ref = task.remote(_absolute(cell), place, self.cpus)
                    running[ref] = cell, time.monotonic()
                for ref in ray.wait(list(running), num_returns=1, timeout=1.0)[0]:
                    cell, begun = running.pop(ref)
                    yield cell, self._summary(ref, cell, folder, begun)
        finally:
            for ref in running:
                with contextlib.suppress(Exception):
                    ray.cancel(ref, force=True)

    def _summary(self, ref: Any, cell: Cell, folder: Path, begun: float) -> Summary:
        try:
            summary: Summary = self._ray.get(ref)
        except Exception as error:
            reason = _reason(error)
            return failure(cell, folder, reason, time.monotonic() - begun)
        if not (folder / cell.name / "summary.json").is_file() and summary["status"] != "failed":
            raise RunError(
                f"cell {cell.name} was run, and its files are not in {folder}: --output must be on "
                "a disk that every machine of the cluster shares"
            )
        return summary

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _most(self, resource: str) -> float:
        return max((node.get(resource, 0.0) for node in self._nodes()), default=0.0)

    def _room(self) -> int:
        """How many cells fit on the cluster at once."""
        return max(1, sum(map(self._fitting, self._nodes())))

    def _fitting(self, node: Mapping[str, float]) -> int:
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        return min(int(node.get(name, 0.0) / need + 1e-9) for name, need in wanted.items() if need)

    def _check_size(self) -> None:
        if not any(map(self._fitting, self._nodes())):
            raise InputError(
                f"a cell wants {_room(self.cpus, self.gpus)}, and no machine has them: the most "
                f"are {_room(self._most('CPU'), self._most('GPU'))}; lower "
                "--cpus-per-cell or --gpus-per-cell"
            )


def _room(cpus: float, gpus: float) -> str:
    return f"{counted(cpus, 'CPU')} and {counted(gpus, 'GPU')}"


class _Hushed:
    """Standard output without what Ray's own threads print there, whatever it is told."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, text: str) -> int:
        """Write what comes from other threads."""
        ray = threading.current_thread().name.startswith("ray_")
        return len(text) if ray else self._out.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


def _connect(address: str | None) -> types.ModuleType:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "Ray is not installed; pip install 'wd-probe[ray]', or leave out --ray"
        ) from error
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address not in ("local", "auto"):
        _knock(address)
    on_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=address, log_to_driver=False, logging_level="ERROR",
                     **({"include_dashboard": False} if address == "local" else {}))  # fmt: skip
    except (Exception, SystemExit) as error:
        raise _unreachable(address, _reason(error)) from error
    finally:
        if on_main:
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own
    return ray  # type: ignore[no-any-return]


def _knock(address: str) -> None:
    """See that gRPC answers: where nothing does, Ray waits for minutes or ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(
            f"unknown Ray address {shown(address)}; use HOST:PORT, ray://HOST:PORT or auto"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS) as knock:
            knock.settimeout(_SECONDS)
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                knock.sendall(_HELLO)
                if knock.recv(4)[3:] != b"\x04":
                    raise _unreachable(address, "what answers there is not Ray")
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _unreachable(address, reason) from error


def _unreachable(address: str, reason: str) -> InputError:
    if address == "local":
        return InputError(f"Ray does not start on this machine ({reason})")
    return InputError(
        f"no Ray cluster can be reached at {shown_line(address)} ({reason}); start one with "
        "`ray start --head`, or leave out --ray-address to use this machine"
    )


def _reason(error: BaseException) -> str:
    """The one line of an error that says most: of a task's own error the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if "Traceback" in str(error) or "traceback" in str(error) else lines[0]


def _absolute(cell: Cell) -> Cell:
    """A worker may stand in another folder."""
    o = cell.options
    paths = {name: getattr(o, name) for name in ("data_dir", "checkpoint")}
    return replace(
        cell, options=replace(o, **{n: p.resolve() for n, p in paths.items() if p is not None})
    )


def _run(cell: Cell, folder: str, threads: int) -> Summary:
    import torch

    torch.set_num_threads(threads)
    return run_cell(cell, Path(folder))
