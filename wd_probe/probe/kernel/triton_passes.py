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
#: Columns of `count`'s rows: sums.SUMS, and two that stay empty.
WIDTH = 8


@triton.jit
def seen(x, y, c, penalized, opposing, flipped, nonfinite, opposing_size, total_size):
    """Add a tile of weights, before and after, to its six counts."""
    finite = (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
    old = tl.where(finite, tl.abs(x), 0.0)
    new = tl.abs(y)
    across = (((x < 0) & (y > 0)) | ((x > 0) & (y < 0))) & finite
    opposes = across & (new > c / 2 * old)
    penalized += (old != 0).to(tl.int32)
    opposing += opposes.to(tl.int32)
    flipped += (across & (new > c * old)).to(tl.int32)
    nonfinite += 1 - finite.to(tl.int32)
    opposing_size += tl.where(opposes, old, 0.0)
    total_size += old
    return penalized, opposing, flipped, nonfinite, opposing_size, total_size


@triton.jit
def store(row, penalized, opposing, flipped, nonfinite, opposing_size, total_size):
    """Write the sums of a block's tiles into its row."""
    tl.store(row, tl.sum(penalized, 0).to(tl.float64))
    tl.store(row + 1, tl.sum(opposing, 0).to(tl.float64))
    tl.store(row + 2, tl.sum(flipped, 0).to(tl.float64))
    tl.store(row + 3, tl.sum(nonfinite, 0).to(tl.float64))
    tl.store(row + 4, tl.sum(opposing_size.to(tl.float64), 0))
    tl.store(row + 5, tl.sum(total_size.to(tl.float64), 0))


@triton.jit
def count(
    befores,
    afters,
    squares,
    sizes,
    tensors,
    factors,
    moves,
    found,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    WIDE: tl.constexpr,
    MOVED: tl.constexpr,
    LINED_UP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Count one block (formulas.tally).

    Args:
        befores: for each block the address of the weights before, or, if MOVED, of the first
            moment.
        afters: of the weights after.
        squares: of the second moment; 0 where there is none.
        sizes: its weights.
        tensors: its tensor's number.
        factors: float64, each tensor's c.
        moves: float32 (tensors, 4): rate, root, eps and up of movement.Moved.
        found: float64 (blocks, WIDTH), the result.
    """
    k = tl.program_id(0)
    before = tl.load(befores + k).to(tl.pointer_type(BEFORE))
    after = tl.load(afters + k).to(tl.pointer_type(AFTER))
    size = tl.load(sizes + k)
    if LINED_UP:
        before = tl.multiple_of(before, 16)
        after = tl.multiple_of(after, 16)
        size = tl.multiple_of(size, 16)
    tensor = tl.load(tensors + k)
    c = tl.load(factors + tensor).to(WIDE)
    penalized = tl.zeros((TILE,), tl.int32)
    opposing = tl.zeros((TILE,), tl.int32)
    flipped = tl.zeros((TILE,), tl.int32)
    nonfinite = tl.zeros((TILE,), tl.int32)
    opposing_size = tl.zeros((TILE,), WIDE)
    total_size = tl.zeros((TILE,), WIDE)
    for start in range(0, BLOCK, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < size
        x = tl.load(before + at, mask=inside, other=0).to(WIDE)
        y = tl.load(after + at, mask=inside, other=0).to(WIDE)
        if MOVED:
            moved = tl.load(moves + 4 * tensor) * x
            second = tl.load(squares + k)
            if second != 0:
                v = tl.load(second.to(tl.pointer_type(BEFORE)) + at, mask=inside, other=0)
                root = tl.load(moves + 4 * tensor + 1)
                eps = tl.load(moves + 4 * tensor + 2)
                moved = tl.where(inside, tl.div_rn(moved, tl.sqrt_rn(v) * root + eps), 0)
            x = (y + moved) * tl.load(moves + 4 * tensor + 3)
            still = (tl.abs(x) <= 1e-6 * tl.abs(moved)) & (tl.abs(moved) < float("inf"))
            x = tl.where(still, 0.0, x)
        penalized, opposing, flipped, nonfinite, opposing_size, total_size = seen(
            x, y, c, penalized, opposing, flipped, nonfinite, opposing_size, total_size
        )
    row = found + 8 * k
    store(row, penalized, opposing, flipped, nonfinite, opposing_size, total_size)


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
    column = tl.arange(0, 8)
    total = tl.zeros((TILE, 8), tl.float64)
    for start in range(tl.load(begins + tensor), end, TILE):
        row = start + tl.arange(0, TILE)
        at = found + 8 * row[:, None] + column[None, :]
        total += tl.load(at, mask=row[:, None] < end, other=0.0)
    tl.store(sums + 8 * tensor + column, tl.sum(total, 0))
