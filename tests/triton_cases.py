"""What Triton counts against what torch counts: on a GPU, or on the CPU in its interpreter.

Run as a script, with the device; for "cpu" with TRITON_INTERPRET=1, which has to be set before
Triton is imported.
"""

import sys

import numpy as np
import torch

from wd_probe.probe import formulas
from wd_probe.probe.kernel import gpu, plain
from wd_probe.probe.sums import Factors

DEVICE = torch.device(sys.argv[1] if __name__ == "__main__" and sys.argv[1:] else "cpu")
gpu._BLOCK, gpu._TILE = 64, 32  # several blocks and tiles of small tensors
SIZES = (1, 31, 32, 33, 63, 64, 65, 130, 0, 160)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensors(dtype, generator):
    made = []
    for size in SIZES:
        theta = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        theta[::7] *= 1e-3
        theta[::11] = 0
        theta[5::97], theta[6::89], theta[7::83] = torch.nan, torch.inf, -torch.inf
        made.append(theta.to(DEVICE))
    return made


def compare(thetas, afters, factors, of_stepped):
    kept = [theta.clone() for theta in thetas]
    found = gpu.Whole(kept, afters).count(Factors(np.arange(len(kept)), factors, of_stepped))
    expected = [
        formulas.tally(theta, after, c, of_stepped=is_of)
        for theta, after, c, is_of in zip(thetas, afters, factors, of_stepped, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-12)
    for one, after in zip(kept, afters, strict=True):
        torch.testing.assert_close(one, after, rtol=0, atol=0, equal_nan=True)
    if afters[0].dtype == torch.float32:
        compare_signs(thetas, afters)


def compare_signs(thetas, afters):
    """Against torch's, over two steps."""
    sides = []
    for way in (gpu, plain):
        now = [theta.clone() for theta in thetas]
        group = way.Signs([way.Signs.room(one, None) for one in now], now)
        group.copy()
        for steps in (afters, thetas):
            torch._foreach_copy_(now, steps)
            sides.append(group.count(Factors(np.zeros(len(now), int), [0.0], [False])))
    torch.testing.assert_close(sides[:2], sides[2:], rtol=0, atol=0, equal_nan=True)


def compare_renewal(generator):
    now = [torch.randn(size, generator=generator).to(DEVICE) for size in SIZES]
    group = gpu.Whole([one.clone() for one in now], now)
    group.renew(np.zeros(len(now), dtype=bool), 1)
    assert all(map(torch.equal, group._kept, now))
    for one in now[:4]:
        one.neg_()
    now[7][3] += 1  # a single weight, of which it is told
    known = np.zeros(len(now), dtype=bool)
    known[7] = True
    group.renew(known, 2)
    assert all(map(torch.equal, group._kept, now))
    for one in now:
        one.add_(1)
    group.renew(np.ones(len(now), dtype=bool), 3)
    assert all(map(torch.equal, group._kept, now))


def main():
    generator = torch.Generator().manual_seed(0)
    factors = [0.0, 0.3, 1e-3, torch.tensor(0.2), 1.0, 0.05, torch.tensor(0.5), 0.1, 0.2, 0.3]
    none = [False] * len(SIZES)
    some = [k in (1, 5) for k in range(len(SIZES))]
    for dtype in DTYPES:
        thetas = tensors(dtype, generator)
        afters = [
            (theta.double() * torch.randn(theta.shape, generator=generator).to(DEVICE)).to(dtype)
            for theta in thetas
        ]
        compare(thetas, afters, factors, none)
        if dtype is not torch.float32:
            continue
        compare(thetas, afters, [0.0 if k in (1, 5) else c for k, c in enumerate(factors)], some)
        shifted = [torch.cat([theta[:1], theta])[1:] for theta in thetas]
        compare(shifted, afters, factors, none)
        even = [torch.randn(64 * k, generator=generator).to(DEVICE) for k in (1, 2, 3)]
        compare(even, [-one for one in even], factors[:3], none[:3])
    compare_renewal(generator)
    ones = torch.ones(33, device=DEVICE)
    ends = [0 * ones, -0.25 * ones, -0.2501 * ones]
    found = gpu.Whole([ones.clone() for _ in ends], ends).count(
        Factors(np.zeros(3, int), [0.5], [False])
    )
    assert found[:, 1].tolist() == [0, 0, 33]
    group = gpu.Whole([torch.ones(64, device=DEVICE)], [-torch.ones(64, device=DEVICE)])
    first = group.count(Factors(np.zeros(1, int), [0.1], [False]))
    assert torch.equal(
        group.count(Factors(np.zeros(1, int), [0.9], [False]))[:, 1],
        torch.zeros(1, dtype=torch.float64, device=DEVICE),
    )
    group._kept[0].fill_(1)
    assert torch.equal(group.count(Factors(np.zeros(1, int), [0.1], [False])), first)
    assert gpu._is_right(DEVICE)
    print("alike")


if __name__ == "__main__":
    main()
