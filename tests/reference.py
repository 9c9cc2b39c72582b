"""Slow oracles, written straight from the paper in Python floats (float64)."""

import math
from fractions import Fraction

from torch import Tensor


def opposes(u_hat: float, penalty: float) -> bool:
    """Eq. 10, in exact rational arithmetic."""
    if not (math.isfinite(u_hat) and math.isfinite(penalty)):
        return False
    u, p = Fraction(u_hat), Fraction(penalty)
    return (u - p) ** 2 > u**2


def tally(theta: Tensor, stepped: Tensor, c: float) -> dict[str, float]:
    """Eq. 10 and 11 of one tensor under P = cθ, û = θ' + cθ, one weight at a time."""
    found = dict.fromkeys(
        ("penalized", "opposing", "flipped", "nonfinite", "opposing_size", "total_size"), 0.0
    )
    factor = Fraction(c)
    for old, new in zip(
        theta.double().flatten().tolist(), stepped.double().flatten().tolist(), strict=True
    ):
        if not (math.isfinite(old) and math.isfinite(new)):
            found["nonfinite"] += 1
            continue
        if old == 0:
            continue
        penalty = factor * Fraction(old)
        u_hat = Fraction(new) + penalty
        found["penalized"] += 1
        found["total_size"] += abs(old)
        if (u_hat - penalty) ** 2 > u_hat**2:
            found["opposing"] += 1
            found["opposing_size"] += abs(old)
        if u_hat / Fraction(old) < 0:
            found["flipped"] += 1
    return found


def near_boundary(theta: Tensor, stepped: Tensor, c: float, ulps: float = 4) -> Tensor:
    """Weights whose û − P/2 or û lies within some float32 ulp of zero, of the larger term."""
    old, new = theta.double(), stepped.double()
    term = c * old.abs()
    larger = new.abs().maximum(term)
    ulp = larger * 2.0**-23 + 2.0**-149
    return ((new.abs() - term / 2).abs() <= ulps * ulp) | ((new.abs() - term).abs() <= ulps * ulp)
