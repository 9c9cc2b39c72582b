"""A run's state on disk, so that it can be resumed after any end."""

import random
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, WdProbeWarning, first_line, shown_line
from ..runs.folder import RunFolder
from .models import load_torch

#: The file in the run folder, gone once the run has ended.
RECOVERY = "recovery.pt"
_FORMAT = 1
_SECONDS = 60.0  # between two, if no interval is given
_SHARE = 50  # and at least so many times what writing one takes


class Stateful(Protocol):
    """Has a state that can be taken and given back, as torch's modules and optimizers have."""

    def state_dict(self) -> Any:
        """Take it: plain values and tensors."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Give it back."""
        ...


class Recovery:
    """Writes the state of a run's parts now and then, and gives it back.

    Args:
        folder: the run folder.
        parts: what has a state, by name.
        facts: what the run is; a state is only given back to a run that is the same.
        interval: steps between two writings; None for about a minute, 0 for never.
        flush: brings what others have yet to write in the folder to its files.
        assumed: facts where a state says nothing of them, as those of older versions do not.
    """

    def __init__(
        self,
        folder: RunFolder,
        parts: Mapping[str, Stateful],
        facts: Mapping[str, Any],
        interval: int | None,
        flush: Callable[[], None],
        assumed: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder, self._parts, self._facts = folder, parts, facts
        self._assumed = assumed or {}
        self._interval, self._flush = interval, flush
        self._step, self._wait = 0, _SECONDS
        self._begun = self._written = time.monotonic()
        self._before = 0.0
        self.file = folder.path / RECOVERY

    @property
    def seconds(self) -> float:
        """How long the run has been going, before it was resumed too."""
        return self._before + time.monotonic() - self._begun

    def offer(self, step: int) -> None:
        """The parts' state is that of this step now: write it, if it is time."""
        if self._interval is None:
            due = time.monotonic() - self._written >= self._wait
        else:
            due = self._interval > 0 and step - self._step >= self._interval
        if due:
            self._write(step)

    def save(self, step: int) -> None:
        """The parts' state is that of this step now, and the run ends: write it."""
        if self._interval != 0:
            self._write(step)

    def _write(self, step: int) -> None:
        begun = time.monotonic()
        try:
            self._folder.guard(lambda: self._save(step))
        except TypeError as error:
            self._interval = 0
            warnings.warn(
                f"this run cannot be resumed if it is killed: {error}", WdProbeWarning, stacklevel=4
            )
        self._step, self._written = step, time.monotonic()
        self._wait = max(_SECONDS, _SHARE * (self._written - begun))

    def _save(self, step: int) -> None:
        self._flush()
        state = {
            "format": _FORMAT,
            "facts": dict(self._facts),
            "step": step,
            "seconds": self.seconds,
            "sizes": self._folder.sizes(),
            "parts": {name: _plain(part.state_dict(), name) for name, part in self._parts.items()},
        }

        def write(partial: Path) -> None:
            with partial.open("wb") as file:  # torch's own says nothing of a full disk
                torch.save(state, file)

        self._folder.replace(RECOVERY, write)

    def load(self) -> None:
        """Give every part its state back, and cut the folder's files to what they were then.

        Raises:
            InputError: the file cannot be read, or is of another run; the folder is left as it is.
        """
        state = self._read()
        try:
            sizes, step, before = dict(state["sizes"]), int(state["step"]), float(state["seconds"])
            facts = {**self._assumed, **state["facts"]}
            if set(state["parts"]) != set(self._parts):
                raise KeyError(", ".join(set(state["parts"]) ^ set(self._parts)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(error) from error
        differing = [
            f"{name} {shown_line(facts.get(name))} there and {shown_line(value)} here"
            for name, value in self._facts.items()
            if facts.get(name) != value
        ]
        if differing:
            raise InputError(f"{self.file} is of another run: {', '.join(differing[:3])}")
        self._folder.check(sizes)
        for name, part in self._parts.items():
            try:
                part.load_state_dict(state["parts"][name])
            except Exception as error:  # whatever a stranger's file makes torch say
                raise InputError(
                    f"{self.file} does not fit this run: its {name} cannot be recovered "
                    f"({first_line(error)}); "
                    "remove the file to begin the run anew"
                ) from error
        self._folder.rewind(sizes)
        self._step, self._before = step, before

    def _read(self) -> Any:
        try:
            state = load_torch(self.file)
        except Exception as error:
            raise self._damaged(error) from error
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise InputError(
                f"{self.file} is of another version of wd_probe; resume with the version in "
                "config.json, or remove the file to begin the run anew"
            )
        return state

    def _damaged(self, error: Exception) -> InputError:
        return InputError(
            f"{self.file} is damaged or not written by wd_probe ({first_line(error)}); remove the "
            "file to begin the run anew"
        )

    def remove(self) -> None:
        """The run has ended."""
        self._folder.guard(lambda: self.file.unlink(missing_ok=True))


def _plain(value: Any, where: str) -> Any:
    """The same in types that are read back without running code."""
    if value is None or isinstance(value, bool | Tensor):
        return value
    for kind in (int, float, str):  # not numpy's, nor an enum's
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(k, where): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        found = [_plain(item, where) for item in value]
        return found if isinstance(value, list) else tuple(found)
    raise TypeError(f"{where} is a {type(value).__name__}, which is not kept")


# --- random numbers -------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """Of Python, numpy, torch and each of torch's devices; plain values and tensors."""
    kind, key, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(key, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Draw from here as after :func:`random_state` was called.

    A device that is not there now is left out, one that was not there then is left alone.
    """
    random.setstate(state["python"])
    kind, key, *rest = state["numpy"]
    np.random.set_state((kind, key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for number, of_device in enumerate(state.get("cuda", ())[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(of_device, number)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
