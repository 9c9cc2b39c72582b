"""The probe's passes in Triton. Importing this needs Triton."""

import torch
import triton
import triton.language as tl

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
#: Columns of `count`'s rows: sums.RAW, and some that stay empty.
WIDTH = 16


@triton.jit
def compare(
    kept, now, sizes, tensors, stale, turn, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Mark a tensor where a sample of a block, another one at each turn, is not what is kept.

    Args:
        kept: for each block the address of the weights before.
        now: of the weights after.
        sizes: its weights.
        tensors: its tensor's number.
        stale: int32, by tensor, the result.
        turn: picks the sample.
    """
    k = tl.program_id(0)
    size = tl.load(sizes + k)
    stretch = tl.maximum(size // 32, 1)
    lane = tl.arange(0, 32)
    at = lane * stretch + ((lane + 1) * 7919 + k * 613 + turn) % stretch
    inside = at < size
    x = tl.load(tl.load(kept + k).to(tl.pointer_type(DTYPE)) + at, mask=inside, other=0)
    y = tl.load(tl.load(now + k).to(tl.pointer_type(DTYPE)) + at, mask=inside, other=0)
    tl.atomic_max(stale + tl.load(tensors + k), tl.max((x != y).to(tl.int32), 0))


@triton.jit
def renew(
    kept, now, sizes, tensors, stale, turn, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Keep what stands of a block, where its tensor is marked."""
    k = tl.program_id(0)
    if tl.load(stale + tl.load(tensors + k)) != 0:
        before, after, size = tl.load(kept + k), tl.load(now + k), tl.load(sizes + k)
        if _is_lined_up(before, after, size):
            _renew(before, after, size, DTYPE, True, BLOCK, TILE)
        else:
            _renew(before, after, size, DTYPE, False, BLOCK, TILE)


@triton.jit
def _renew(
    before, after, size, DTYPE: tl.constexpr, LINED_UP: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    before, after, size = _placed(before, after, size, DTYPE, DTYPE, LINED_UP)
    for start in range(0, BLOCK, TILE):
        at = start + tl.arange(0, TILE)
        tl.store(before + at, tl.load(after + at, mask=at < size), mask=at < size)


@triton.jit
def _is_lined_up(before, after, size):
    """Whether several weights can be read at a time."""
    return ((before | after | size) & 15) == 0


@triton.jit
def _placed(
    before, after, size, KEPT: tl.constexpr, DTYPE: tl.constexpr, LINED_UP: tl.constexpr
):  # fmt: skip
    """A block's pointers, and its size, with what is known of them."""
    before = before.to(tl.pointer_type(KEPT))
    after = after.to(tl.pointer_type(DTYPE))
    if LINED_UP:
        before = tl.multiple_of(before, 16)
        after = tl.multiple_of(after, 16)
        size = size // 16 * 16
    return before, after, size


@triton.jit
def count(
    kept, now, sizes, tensors, factors, found, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Count one block (formulas.tally), and keep what stands.

    Args:
        kept: for each block the address of the weights before.
        now: of the weights after.
        sizes: its weights.
        tensors: its tensor's number.
        factors: float64, each tensor's c; −1 where what stands is weighed.
        found: float64 (blocks, WIDTH), the result.
    """
    k = tl.program_id(0)
    before, after, size = tl.load(kept + k), tl.load(now + k), tl.load(sizes + k)
    factor = tl.load(factors + tl.load(tensors + k))
    row = found + 16 * k
    if _is_lined_up(before, after, size):
        _count(before, after, size, factor, row, DTYPE, WIDE, True, BLOCK, TILE)
    else:
        _count(before, after, size, factor, row, DTYPE, WIDE, False, BLOCK, TILE)


@triton.jit
def _count(
    before, after, size, factor, row, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    LINED_UP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    before, after, size = _placed(before, after, size, DTYPE, DTYPE, LINED_UP)
    of_stepped = factor < 0
    c = tl.maximum(factor, 0.0).to(WIDE)
    tl.static_assert(BLOCK // TILE < 256)
    counts = tl.zeros((TILE,), tl.uint32)  # four of them, a byte each
    opposing_size = tl.zeros((TILE,), WIDE)
    total_size = tl.zeros((TILE,), WIDE)
    xx = tl.zeros((TILE,), tl.float64)
    xd = tl.zeros((TILE,), tl.float64)
    dd = tl.zeros((TILE,), tl.float64)
    for start in range(0, BLOCK, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < size
        kept_x = tl.load(before + at, mask=inside, other=0)
        stands = tl.load(after + at, mask=inside, other=0)
        tl.store(before + at, stands, mask=inside)
        x = kept_x.to(WIDE)
        y = stands.to(WIDE)
        finite = (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
        x = tl.where(finite, x, 0.0)
        y = tl.where(finite, y, 0.0)
        old = tl.abs(x)
        new = tl.abs(y)
        weighed = tl.where(of_stepped, new, old)
        across = ((x < 0) & (y > 0)) | ((x > 0) & (y < 0))
        opposes = across & (new > c / 2 * old)
        flipped = across & (new > c * old)
        counts += (weighed != 0).to(tl.uint32)
        counts += opposes.to(tl.uint32) << 8
        counts += flipped.to(tl.uint32) << 16
        counts += (1 - finite.to(tl.uint32)) << 24
        opposing_size += tl.where(opposes, weighed, 0.0)
        total_size += weighed
        x64 = x.to(tl.float64)
        d = y.to(tl.float64) - x64
        xx += x64 * x64
        xd += x64 * d
        dd += d * d
    _store_counts(row, counts)
    tl.store(row + 4, tl.sum(opposing_size.to(tl.float64), 0))
    tl.store(row + 5, tl.sum(total_size.to(tl.float64), 0))
    tl.store(row + 6, tl.sum(xx, 0))
    tl.store(row + 7, tl.sum(xd, 0))
    tl.store(row + 8, tl.sum(dd, 0))
    for column in range(9, 16):
        tl.store(row + column, 0.0)


@triton.jit
def _store_counts(row, counts):
    """The sums of four counts of a byte each."""
    for column in tl.static_range(4):
        one = ((counts >> (8 * column)) & 255).to(tl.int32)
        tl.store(row + column, tl.sum(one, 0).to(tl.float64))


@triton.jit
def keep_signs(
    kept, now, sizes, tensors, DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Keep the signs that stand in a block, each in a byte; 0 of what is no number."""
    k = tl.program_id(0)
    before, after, size = tl.load(kept + k), tl.load(now + k), tl.load(sizes + k)
    if _is_lined_up(before, after, size):
        _keep_signs(before, after, size, DTYPE, True, BLOCK, TILE)
    else:
        _keep_signs(before, after, size, DTYPE, False, BLOCK, TILE)


@triton.jit
def _keep_signs(
    before, after, size, DTYPE: tl.constexpr, LINED_UP: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    before, after, size = _placed(before, after, size, tl.int8, DTYPE, LINED_UP)
    for start in range(0, BLOCK, TILE):
        at = start + tl.arange(0, TILE)
        y = tl.load(after + at, mask=at < size, other=0)
        tl.store(before + at, (y > 0).to(tl.int8) - (y < 0).to(tl.int8), mask=at < size)


@triton.jit
def count_signs(
    kept, now, sizes, tensors, found, DTYPE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Count what has crossed zero in a block, and keep the signs that stand; rows as `count`'s."""
    k = tl.program_id(0)
    before, after, size = tl.load(kept + k), tl.load(now + k), tl.load(sizes + k)
    row = found + 16 * k
    if _is_lined_up(before, after, size):
        _count_signs(before, after, size, row, DTYPE, True, BLOCK, TILE)
    else:
        _count_signs(before, after, size, row, DTYPE, False, BLOCK, TILE)


@triton.jit
def _count_signs(
    before, after, size, row, DTYPE: tl.constexpr, LINED_UP: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    before, after, size = _placed(before, after, size, tl.int8, DTYPE, LINED_UP)
    counts = tl.zeros((TILE,), tl.uint32)
    for start in range(0, BLOCK, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < size
        old = tl.load(before + at, mask=inside, other=0)
        y = tl.load(after + at, mask=inside, other=0)
        new = (y > 0).to(tl.int8) - (y < 0).to(tl.int8)
        tl.store(before + at, new, mask=inside)
        finite = tl.abs(y) < float("inf")
        across = (finite & (old * new < 0)).to(tl.uint32)
        counts += (finite & (old != 0)).to(tl.uint32)
        counts += (across << 8) + (across << 16)
        counts += (1 - finite.to(tl.uint32)) << 24
    _store_counts(row, counts)
    for column in range(4, 16):
        tl.store(row + column, 0.0)


@triton.jit
def fold(found, begins, sums, TILE: tl.constexpr):
    """Sum one tensor's rows of ``found``, always in the same order.

    Args:
        found: float64 (blocks, WIDTH).
        begins: for each tensor its first block, and at last the number of blocks.
        sums: float64 (tensors, WIDTH), the result.
    """
    tensor = tl.program_id(0)
    end = tl.load(begins + tensor + 1)
    column = tl.arange(0, 16)
    total = tl.zeros((TILE, 16), tl.float64)
    for start in range(tl.load(begins + tensor), end, TILE):
        row = start + tl.arange(0, TILE)
        at = found + 16 * row[:, None] + column[None, :]
        total += tl.load(at, mask=row[:, None] < end, other=0.0)
    tl.store(sums + 16 * tensor + column, tl.sum(total, 0))
