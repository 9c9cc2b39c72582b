"""What Triton counts against what torch counts: on CPU tensors in Triton's interpreter.

Run as a script with TRITON_INTERPRET=1, which has to be set before Triton is imported.
"""

import itertools

import torch

from tests.benchmarks import triton_steps
from wd_probe.probe import formulas
from wd_probe.probe.kernel import gpu
from wd_probe.probe.movement import Moved

gpu._BLOCK, gpu._TILE = 64, 32  # several blocks and tiles of small tensors
SIZES = (1, 31, 32, 33, 63, 64, 65, 130, 0, 160)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAIRS = [*zip(DTYPES, DTYPES, strict=True), *itertools.product(DTYPES[1:], DTYPES[:1])]


def tensors(dtype, generator):
    made = []
    for size in SIZES:
        theta = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        theta[::7] *= 1e-3
        theta[::11] = 0
        theta[5::97], theta[6::89], theta[7::83] = torch.nan, torch.inf, -torch.inf
        made.append(theta)
    return made


def compare(befores, afters, factors, thetas):
    found = gpu.Tally(befores, afters)(factors)
    expected = [formulas.tally(*case) for case in zip(thetas, afters, factors, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-12)


def compare_steps(adam, generator):
    triton_steps.BLOCK, triton_steps.TILE = 64, 32
    theta = 1e-3 * torch.randn(150, generator=generator)
    expected = theta.clone()
    ours = triton_steps.Steps(theta, 1e-3, 0.5, adam=adam, count=True)
    theirs = (
        torch.optim.AdamW([expected], 1e-3, weight_decay=0.5)
        if adam
        else torch.optim.SGD([expected], 1e-3, momentum=0.9)
    )
    for _ in range(3):
        theta.grad = expected.grad = torch.randn(150, generator=generator)
        before = theta.clone()
        found = ours.step()
        theirs.step()
        if not adam:
            expected -= 5e-4 * before
        torch.testing.assert_close(theta, expected, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(found[0], formulas.tally(before, theta, 5e-4), rtol=1e-6, atol=0)
        assert found[0, 1] > 5


def main():
    generator = torch.Generator().manual_seed(0)
    factors = [0.0, 0.3, 1e-3, torch.tensor(0.2), 1.0, 0.05, torch.tensor(0.5), 0.1, 0.2, 0.3]
    for before, after in PAIRS:
        thetas = tensors(before, generator)
        afters = [
            (theta.double() * torch.randn(theta.shape, generator=generator)).to(after)
            for theta in thetas
        ]
        compare(thetas, afters, factors, thetas)
        shifted = [torch.cat([theta[:1], theta])[1:] for theta in thetas]
        compare(shifted, afters, factors, thetas)

    afters = [theta.nan_to_num(0, 1, -1) for theta in tensors(torch.float32, generator)]
    moves = [
        Moved(
            torch.randn(after.shape, generator=generator),
            torch.rand(after.shape, generator=generator) if number % 3 else None,
            0.7 + number,
            1.1,
            1e-8,
            1 / 0.99,
        )
        for number, after in enumerate(afters)
    ]
    compare(moves, afters, factors, [one.before(q) for one, q in zip(moves, afters, strict=True)])
    opposite = [-after for after in afters]
    tally = gpu.Tally(afters, opposite)
    first, again = tally([0.1] * 10), tally([0.1] * 10)
    assert torch.equal(first, again)
    assert not torch.equal(first, tally([0.9 * k for k in range(10)]))
    assert gpu._is_right(torch.device("cpu"))
    compare_steps(True, generator)
    compare_steps(False, generator)
    print("alike")


if __name__ == "__main__":
    main()
