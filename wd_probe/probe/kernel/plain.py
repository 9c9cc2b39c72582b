"""The same passes by torch, tensor by tensor: for any dtype, device and layout."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import formulas
from ..sums import RAW, Factors
from . import cpu
from .blocks import alike

_CHUNK = 1 << 19  # weights that are worked on at a time: their copies stay in the cache
_ROW = 64
_FEW = 4096  # what is soon looked at closely
_SUMS = RAW.index("taken")
_LEAST = 1e-24  # what sums of squares in float32 are right from
_PIECES, _PIECE = 32, 16  # of a sample


class Whole:
    """Keeps weights themselves; see :class:`.cpu.Whole`."""

    def __init__(self, kept: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        self._kept, self._now = kept, now

    @classmethod
    def room(cls, now: Tensor, old: Tensor | None) -> Tensor:
        """A tensor to keep them in: the old one, where it will do."""
        made = torch.empty_like(now, device="meta", dtype=cls._dtype(now))
        if old is not None and _layout(old) == _layout(made) and old.device == now.device:
            return old
        return torch.empty_like(now, dtype=cls._dtype(now))

    @staticmethod
    def _dtype(now: Tensor) -> torch.dtype:
        return now.dtype

    def copy(self) -> None:
        """Keep what stands."""
        torch._foreach_copy_(list(self._kept), list(self._now))

    def renew(self, changed: NDArray[np.bool_], turn: int) -> None:
        """Keep what stands of tensors that have changed, or of which a sample has.

        Elsewhere than on the CPU that is unknown, as the host would have to wait: of all.
        """
        for kept, now, is_new in zip(self._kept, self._now, changed, strict=True):
            if is_new or _differs(kept, now, turn):
                kept.copy_(now)

    def count(self, by: Factors) -> Tensor:
        """Count what a step did, and keep what stands."""
        device = self._now[0].device
        rows = [
            _count(kept, now, by.c[k], by.of_stepped[k]).to(device, non_blocking=True)
            for kept, now, k in zip(self._kept, self._now, by.numbers.tolist(), strict=True)
        ]
        return torch.stack(rows)


class Signs(Whole):
    """Keeps of each weight its sign in a byte; see :class:`.cpu.Signs`."""

    @staticmethod
    def _dtype(now: Tensor) -> torch.dtype:
        return torch.int8

    def copy(self) -> None:
        """Keep the signs that stand."""
        for kept, now in zip(self._kept, self._now, strict=True):
            kept.copy_(now.sign())

    def renew(self, changed: NDArray[np.bool_], turn: int) -> None:
        """Keep the signs that stand."""
        self.copy()

    def count(self, by: Factors) -> Tensor:
        """Count what has crossed zero, and keep the signs that stand; sizes are NaN."""
        rows = []
        for kept, now in zip(self._kept, self._now, strict=True):
            bad = ~now.isfinite()
            across = ((kept * now.sign()) < 0) & ~bad
            counts = (kept != 0) & ~bad, across, across, bad
            row = torch.full((len(RAW),), torch.nan, dtype=torch.float64, device=now.device)
            row[:4] = torch.stack([which.count_nonzero().double() for which in counts])
            rows.append(row)
        self.copy()
        return torch.stack(rows)


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _differs(kept: Tensor, now: Tensor, turn: int) -> bool:
    if not (now.is_cpu and alike(kept, now)):
        return True
    one, other = _flat(kept), _flat(now)
    stretch = max(_PIECE, len(one) // _PIECES)
    if len(one) > 2 * stretch:
        begin = turn * 7919 % (stretch - _PIECE + 1)
        one, other = (t.unfold(0, _PIECE, stretch) for t in (one[begin:], other[begin:]))
    return not torch.equal(one, other)


def _flat(tensor: Tensor) -> Tensor:
    """All numbers of a tensor without gaps, as they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _count(kept: Tensor, now: Tensor, c: float | Tensor, of_stepped: bool) -> Tensor:
    if now.is_cpu and now.dtype in (torch.float32, torch.float64) and alike(kept, now):
        return _count_closely(_flat(kept), _flat(now), float(c), of_stepped)
    if now.is_cpu and now.element_size() == 2 and cpu.passes() is not None:
        old, new = kept.float(), now.float()
        by = Factors(np.zeros(1, np.int64), [c], [of_stepped])
        found = cpu.Whole([old], [new]).count(by)[0]
    else:
        found = formulas.tally(kept, now, c, of_stepped=of_stepped)
    kept.copy_(now)
    return found


def _count_closely(kept: Tensor, now: Tensor, c: float, of_stepped: bool) -> Tensor:
    """`formulas.tally`, which looks closely only at the few weights that may have crossed zero.

    It keeps what stands, too.
    """
    result = np.zeros(len(RAW))
    even = len(now) - len(now) % _ROW if len(now) >= _FEW else 0
    if even < len(now):
        result[:_SUMS] += _few(kept[even:], now[even:], c, of_stepped)
        kept[even:] = now[even:]
    if not even:
        return torch.from_numpy(result)
    near: list[tuple[Tensor, Tensor]] = []  # of weights that may have crossed, before and now
    chunks = (t[:even].view(-1, _ROW).split(_CHUNK // _ROW) for t in (kept, now))
    room, d = (torch.empty_like(kept[: min(even, _CHUNK)]).view(-1, _ROW) for _ in range(2))
    for x, y in zip(*chunks, strict=True):
        room, d = room[: len(x)], d[: len(x)]
        torch.sub(y, x, out=d)
        sums = [torch.abs(y if of_stepped else x, out=room).sum(), _squared(x)]
        sums += [torch.mul(x, d, out=room).sum(), _squared(d)]
        found = torch.stack(sums).tolist()
        if math.isfinite(sum(found)) and _is_told(x, found[1]) and _is_told(d, found[3]):
            result[5:_SUMS] += found
            rows = (torch.mul(x, y, out=room).amin(1) <= 0).nonzero()[:, 0]
            near.append((x[rows].view(-1), y[rows].view(-1)))
            result[0] += x.numel() - near[-1][0].numel()
        else:
            result += formulas.tally(x, y, c, of_stepped=of_stepped).numpy()
        x.copy_(y)
        if sum(len(old) for old, _ in near) > _CHUNK:
            result[:5] += _crossed(near, c, of_stepped)
            near = []
    if near:
        result[:5] += _crossed(near, c, of_stepped)
    return torch.from_numpy(result)


def _crossed(near: list[tuple[Tensor, Tensor]], c: float, of_stepped: bool) -> NDArray[np.float64]:
    """The counts, and the size of what opposes, of weights among which are those that crossed."""
    old, new = map(torch.cat, zip(*near, strict=True))
    which = (old * new <= 0).nonzero()[:, 0]  # crossed, zero or underflown
    found = _few(old[which], new[which], c, of_stepped)[:5]
    found[0] += len(old) - len(which)
    return found


def _is_told(numbers: Tensor, squared: float) -> bool:
    """Whether their sum of squares is right: small squares underflow, but those of zeros."""
    return squared > _LEAST or not numbers.any()


def _squared(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square_().sum()


def _few(kept: Tensor, now: Tensor, c: float, of_stepped: bool) -> NDArray[np.float64]:
    """The same of a few weights, by fewer operations."""
    x, y = (t.detach().numpy().astype(np.float64) for t in (kept, now))
    with np.errstate(all="ignore"):
        d, old, new = y - x, np.abs(x), np.abs(y)
        weighed = new if of_stepped else old
        across = x * y < 0
        opposes = across & (new > c / 2 * old)
        flipped = across & (new > c * old)
        counts = map(np.count_nonzero, (weighed, opposes, flipped))
        found = np.array([*counts, 0, weighed[opposes].sum(), weighed.sum(), x @ x, x @ d, d @ d])
    if kept.dtype == torch.float32 and np.isfinite(found).all():
        return found
    return formulas.tally(kept, now, c, of_stepped=of_stepped)[:_SUMS].numpy()
