"""The probe's work on many tensors at once, at the speed of memory.

On the CPU compiled C does it (`cpu.py`), on a GPU Triton (`gpu.py`), and torch, tensor by tensor,
wherever neither can.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import formulas
from ..movement import Moved
from ..sums import WIDTH
from . import cpu, gpu

#: From every tensor's c to the float64 (tensors, WIDTH) sums.
_Tally = Callable[[Sequence[float | Tensor]], Tensor]
_MakeTally = Callable[[Sequence[Tensor | Moved], Sequence[Tensor]], _Tally]


class Copying:
    """Copies each source into its target when called, all of the same device and dtype.

    A float32 source may have a bfloat16 target, which only :class:`Tallying` is to read: on the
    CPU it holds the upper half of every number. Valid while the tensors stay where they are.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self._tensors = targets, sources  # kept from being freed
        by_pass: dict[str | None, tuple[list[Tensor], list[Tensor]]] = {}
        for target, source in zip(targets, sources, strict=True):
            both = by_pass.setdefault(cpu.copying(target, source), ([], []))
            both[0].append(target)
            both[1].append(source)
        self._runs = [
            cpu.copier(name, *both) if name else partial(torch._foreach_copy_, *both)
            for name, both in by_pass.items()
        ]

    def __call__(self) -> None:
        """Copy."""
        for run in self._runs:
            run()


class _Part(NamedTuple):
    """Tensors that are counted together."""

    numbers: NDArray[np.int64]
    run: _Tally


class Tallying:
    """`formulas.tally` of many tensors, when called. Valid while they stay where they are.

    Args:
        befores: the weights before (or their copy in bfloat16, or how far they moved).
        afters: the weights after.
    """

    def __init__(self, befores: Sequence[Tensor | Moved], afters: Sequence[Tensor]) -> None:
        self._device = afters[0].device if afters else torch.device("cpu")
        by_way: dict[_MakeTally, list[int]] = {}
        for number, pair in enumerate(zip(befores, afters, strict=True)):
            by_way.setdefault(_way(*pair), []).append(number)
        self._parts = [
            _Part(
                np.array(numbers),
                make([befores[k] for k in numbers], [afters[k] for k in numbers]),
            )
            for make, numbers in by_way.items()
        ]

    def __call__(self, factors: Sequence[float | Tensor]) -> Tensor:
        """Count.

        Args:
            factors: c of each tensor.

        Returns:
            A float64 tensor (tensors, WIDTH) on the weights' device; the device is not waited for.
        """
        if len(self._parts) == 1:
            return self._parts[0].run(factors)
        result = torch.zeros(len(factors), WIDTH, dtype=torch.float64, device=self._device)
        for part in self._parts:
            found = part.run([factors[k] for k in part.numbers])
            result[torch.from_numpy(part.numbers)] = _sent(found, self._device)
        return result


def _way(before: Tensor | Moved, after: Tensor) -> _MakeTally:
    """What counts such a pair fastest."""
    return cpu.way(before, after) or gpu.way(before, after) or _Plainly


class _Plainly:
    """By torch, one tensor at a time; on the CPU through float32 where it can."""

    def __init__(self, befores: Sequence[Tensor | Moved], afters: Sequence[Tensor]) -> None:
        self._pairs = list(zip(befores, afters, strict=True))

    def __call__(self, factors: Sequence[float | Tensor]) -> Tensor:
        device = self._pairs[0][1].device
        return torch.stack(
            [
                _sent(self._one(before, after, c), device)
                for (before, after), c in zip(self._pairs, factors, strict=True)
            ]
        )

    @staticmethod
    def _one(before: Tensor | Moved, after: Tensor, c: float | Tensor) -> Tensor:
        theta = before.before(after) if isinstance(before, Moved) else before
        old, new = (t.float() if t.element_size() == 2 else t for t in (theta, after))
        fast = cpu.way(old, new)
        return formulas.tally(old, new, c) if fast is None else fast([old], [new])([c])[0]


def _sent(found: Tensor, device: torch.device) -> Tensor:
    """The counts on a device, which the host does not wait for where they are to stay away."""
    return found.to(device, non_blocking=device.type != "cpu")
