"""Steps in Triton that can count opposing penalties as they update: no weight is read twice."""

import math

import torch
import triton
import triton.language as tl

from wd_probe.probe.kernel import triton_passes as passes

BLOCK, TILE = 8192, 1024


@triton.jit
def update(
    theta, grad, first, second, weights, rate, root, c, found, ADAM: tl.constexpr,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """AdamW's step, where ``rate`` is η / (1 − β₁ᵗ) and ``root`` √(1 − β₂ᵗ); else SGD's, of η."""
    k = tl.program_id(0)
    penalized = tl.zeros((TILE,), tl.int32)
    opposing = tl.zeros((TILE,), tl.int32)
    flipped = tl.zeros((TILE,), tl.int32)
    nonfinite = tl.zeros((TILE,), tl.int32)
    opposing_size = tl.zeros((TILE,), tl.float32)
    total_size = tl.zeros((TILE,), tl.float32)
    for start in range(0, BLOCK, TILE):
        at = k * BLOCK + start + tl.arange(0, TILE)
        inside = at < weights
        x = tl.load(theta + at, mask=inside, other=0)
        g = tl.load(grad + at, mask=inside, other=0)
        m = 0.9 * tl.load(first + at, mask=inside, other=0)
        if ADAM:
            m += 0.1 * g
            v = 0.999 * tl.load(second + at, mask=inside, other=0) + 0.001 * g * g
            tl.store(second + at, v, mask=inside)
            y = x * (1 - c) - rate * m / (tl.sqrt(v) / root + 1e-8)
        else:
            m += g
            y = x * (1 - c) - rate * m
        tl.store(theta + at, y, mask=inside)
        tl.store(first + at, m, mask=inside)
        if COUNT:
            penalized, opposing, flipped, nonfinite, opposing_size, total_size = passes.seen(
                x, y, c, penalized, opposing, flipped, nonfinite, opposing_size, total_size
            )
    if COUNT:
        row = found + 8 * k
        passes.store(row, penalized, opposing, flipped, nonfinite, opposing_size, total_size)


class Steps:
    """Steps one flat float32 tensor by its ``.grad``, by AdamW or by SGD with momentum and decay.

    With ``count`` each step returns its counts.
    """

    def __init__(self, theta, lr, weight_decay, *, adam, count):
        self.theta, self.lr, self.c, self.adam = theta, lr, lr * weight_decay, adam
        self.count, self.steps, self.blocks = count, 0, triton.cdiv(len(theta), BLOCK)
        self.first = torch.zeros_like(theta)
        self.second = torch.zeros_like(theta) if adam else self.first
        rows = torch.empty(self.blocks + 1, passes.WIDTH, dtype=torch.float64, device=theta.device)
        self.found, self.sums = rows.split([self.blocks, 1])
        self.begins = torch.tensor([0, self.blocks], device=theta.device)

    def step(self):
        """The float64 (1, fields) counts, as penalty.tally's, if it counts."""
        self.steps += 1
        rate = self.lr / (1 - 0.9**self.steps) if self.adam else self.lr
        root = math.sqrt(1 - 0.999**self.steps)
        update[self.blocks,](
            self.theta, self.theta.grad, self.first, self.second, len(self.theta), rate, root,
            self.c, self.found, ADAM=self.adam, COUNT=self.count, BLOCK=BLOCK, TILE=TILE,
        )  # fmt: skip
        if not self.count:
            return None
        passes.fold[1,](self.found, self.begins, self.sums, TILE=64)
        return self.sums[:, :6]
