"""Counting in the same kernel as the update: it moves no further bytes. Does it pay?"""

import torch

from tests.benchmarks.timing import alternate, header, milliseconds, ratio, row
from wd_probe.probe import kernel


def compiled_sides(weights, device):
    """An AdamW step that `torch.compile` makes: alone, with the probe beside it, and counting."""
    theta, m, v = (torch.rand(weights, device=device) for _ in range(3))
    g, kept = torch.randn(weights, device=device), torch.empty(weights, device=device)
    lr, decay = 1e-4, 0.01

    def moved(theta, m, v):
        m = m.lerp(g, 0.1)
        v = v * 0.999 + 0.001 * g * g
        return theta * (1 - lr * decay) - lr * m / (v.sqrt() + 1e-8), m, v

    def update(theta, m, v):
        after, m_new, v_new = moved(theta, m, v)
        theta.copy_(after)
        m.copy_(m_new)
        v.copy_(v_new)

    def update_and_count(theta, m, v):
        after, m_new, v_new = moved(theta, m, v)
        size = theta.abs()
        opposes = ((theta < 0) != (after < 0)) & (after.abs() > lr * decay / 2 * size)
        found = torch.stack([
            (theta != 0).sum().float(), opposes.sum().float(), size.sum(), (size * opposes).sum()
        ])  # fmt: skip
        theta.copy_(after)
        m.copy_(m_new)
        v.copy_(v_new)
        return found

    def beside(theta, m, v):
        kernel.Copying([kept], [theta])()
        plain(theta, m, v)
        kernel.Tallying([kept], [theta])([lr * decay])

    plain, counting = torch.compile(update), torch.compile(update_and_count)
    return {
        "AdamW, compiled step": lambda: plain(theta, m, v),
        "AdamW, compiled step, probe beside it": lambda: beside(theta, m, v),
        "AdamW, compiled step that counts": lambda: counting(theta, m, v),
    }


def triton_sides(weights, device):
    """The same of steps in Triton, by AdamW and by SGD, and torch's fused one."""
    from tests.benchmarks.triton_steps import Steps

    theta = torch.randn(weights, device=device)
    theta.grad = torch.randn_like(theta)
    kept = torch.empty_like(theta)
    fused = torch.optim.AdamW([theta], lr=1e-4, weight_decay=0.01, fused=True)

    def beside(step):
        kernel.Copying([kept], [theta])()
        step()
        kernel.Tallying([kept], [theta])([1e-6])

    sides = {"AdamW, torch's fused step": fused.step}
    for name in ("AdamW", "SGD"):
        plain, counting = (
            Steps(theta, 1e-4, 0.01, adam=name == "AdamW", count=count) for count in (False, True)
        )
        sides |= {
            f"{name}, Triton step": plain.step,
            f"{name}, Triton step, probe beside it": lambda step=plain.step: beside(step),
            f"{name}, Triton step that counts": counting.step,
        }
    return sides


def report(weights, rounds, device):
    """Print the table; ratios are to the plain step above in it."""
    sides = compiled_sides(weights, device)
    sides |= triton_sides(weights, device) if device.type == "cuda" else {}
    times = alternate(sides, rounds, device)
    header(f"a step, {weights / 1e6:.0f} M weights in one tensor", "ms", "ratio")
    for side in sides:
        if side.endswith(" step"):
            base = side
        row(side, f"{milliseconds(times, side):.1f}", f"{ratio(times, side, base):.2f}")
