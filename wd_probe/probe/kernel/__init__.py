"""The probe's work on many tensors at once, at the speed of memory.

On the CPU compiled C does it (`cpu.py`), on a GPU Triton (`gpu.py`), and torch, tensor by tensor,
wherever neither can (`plain.py`).
"""

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import WdProbeError
from ..sums import RAW, Factors
from . import cpu, gpu, plain


class _Group(Protocol):
    """Tensors that are kept and counted together; see :class:`.cpu.Whole`."""

    def __init__(self, kept: Sequence[Tensor], now: Sequence[Tensor]) -> None: ...
    @staticmethod
    def room(now: Tensor, old: Tensor | None) -> Tensor: ...
    def copy(self) -> None: ...
    def renew(self, changed: NDArray[np.bool_], turn: int) -> None: ...
    def count(self, by: Factors) -> Tensor: ...


class _Part(NamedTuple):
    numbers: NDArray[np.int64]
    group: _Group


class Kept:
    """Keeps some weights as they stand, and counts what a step did to them.

    Valid while they stay where they are.

    Args:
        now: the weights.
        signs: whether signs are enough of those of float32.
        old: of each what it was kept in before, to be used again where it will do.

    Attributes:
        rooms: what each is kept in.
    """

    def __init__(self, now: Sequence[Tensor], signs: bool, old: Sequence[Tensor | None]) -> None:
        by_way: dict[tuple[type[_Group], object], list[int]] = {}
        for number, one in enumerate(now):
            by_way.setdefault(_way(one, signs), []).append(number)
        self._device = now[0].device if now else torch.device("cpu")
        self.rooms = [torch.empty(0)] * len(now)
        self._parts = []
        for (make, _), numbers in by_way.items():
            for k in numbers:
                self.rooms[k] = make.room(now[k], old[k])
            group = make([self.rooms[k] for k in numbers], [now[k] for k in numbers])
            self._parts.append(_Part(np.array(numbers), group))
        if len(by_way) > 1:  # sent here, so that no step waits for it
            order = np.argsort([number for numbers in by_way.values() for number in numbers])
            self._order = torch.from_numpy(order).to(self._device)

    def copy(self) -> None:
        """Keep what stands."""
        for part in self._parts:
            part.group.copy()

    def renew(self, changed: NDArray[np.bool_], turn: int) -> None:
        """Keep what stands of tensors that have changed, or of which a sample has.

        Args:
            changed: of each whether it is known to have.
            turn: picks another sample each time.
        """
        for part in self._parts:
            part.group.renew(changed[part.numbers], turn)

    def count(self, by: Factors) -> Tensor:
        """Count what a step did, and keep what stands.

        Returns:
            A float64 tensor (tensors, len(RAW)) on the weights' device, which is not waited for.
        """
        if len(self._parts) == 1:
            return self._parts[0].group.count(by)
        rows = [
            part.group.count(by._replace(numbers=by.numbers[part.numbers])).to(
                self._device, non_blocking=self._device.type != "cpu"
            )
            for part in self._parts
        ]
        if not rows:
            return torch.zeros(0, len(RAW), dtype=torch.float64, device=self._device)
        return torch.cat(rows)[self._order]


def slowly(weights: Iterable[Tensor]) -> bool:
    """Whether any would be counted faster if there were a C compiler."""
    would = any(one.is_cpu and one.dtype == torch.float32 for one in weights)
    return would and os.environ.get("WD_PROBE_KERNEL") != "0" and cpu.passes() is None


def name_of(now: Tensor, signs: bool) -> str:
    """What counts such a tensor: "C", "Triton" or "torch"."""
    return _NAMES[_way(now, signs)[0].__module__]


def why_not(device: torch.device) -> WdProbeError | None:
    """Why torch counts float32 weights on a device; None where something faster does, or cannot.

    A RunError where the faster should work, an InputError where it is off, or something is missing.
    """
    if device.type == "cpu":
        return cpu.why_not()
    return gpu.why_not(device) if device.type in gpu.TYPES else None


_NAMES = {cpu.__name__: "C", gpu.__name__: "Triton", plain.__name__: "torch"}


def _way(now: Tensor, by_sign: bool) -> tuple[type[_Group], object]:
    """What counts such a tensor fastest, and what it shares with others counted together."""
    signs = by_sign and now.dtype == torch.float32
    if cpu.fits(now):
        return (cpu.Signs if signs else cpu.Whole), None
    if gpu.fits(now):
        return (gpu.Signs if signs else gpu.Whole), (now.device, now.dtype)
    return (plain.Signs if signs else plain.Whole), now.device
