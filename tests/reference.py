"""Slow oracles, written straight from the paper in Python floats (float64)."""
# ruff: noqa: B905

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


def _u_hat(rule: str, old: float, new: float, told: float, c: float) -> float:
    """Where the step alone puts a weight."""
    if rule == "wd":
        return new + c * old
    if rule == "rwd":
        return new / (1 - c)
    if rule == "proximal":
        return new * (1 + c)
    if rule == "cautious":  # decayed weights have not been moved away from zero
        return new + c * old if (new - old) * old <= 0 else new
    return told if rule == "exact" else new


def ledger(x: Tensor, y: Tensor, rule: str, c: float, u_hat: Tensor | None = None):
    """Theory facts 20 to 22 of one step, one weight at a time; of pwd x is what the step began at.

    Weights with NaN or infinity are left out.
    """
    found = dict.fromkeys(("squared", "along", "moved", "growth", "taken", "updated"), 0.0)
    columns = [t.double().flatten().tolist() for t in (x, y, y if u_hat is None else u_hat)]
    for old, new, told in zip(*columns, strict=True):
        if not all(map(math.isfinite, (old, new, told))):
            continue
        u = _u_hat(rule, old, new, told, c)
        found["squared"] += old * old
        found["along"] += old * (new - old)
        found["moved"] += (new - old) ** 2
        found["updated"] += (old - u) ** 2
        found["growth"] += (u - old) * (u + old)
        if rule == "pwd":
            before = old / (1 - c)
            found["taken"] += (before - old) * (before + old)
        else:
            found["taken"] += (u - new) * (u + new)
    return found


def near_boundary(theta: Tensor, stepped: Tensor, c: float, ulps: float = 4) -> Tensor:
    """Weights whose û − P/2 or û lies within some float32 ulp of zero, of the larger term."""
    old, new = theta.double(), stepped.double()
    term = c * old.abs()
    larger = new.abs().maximum(term)
    ulp = larger * 2.0**-23 + 2.0**-149
    return ((new.abs() - term / 2).abs() <= ulps * ulp) | ((new.abs() - term).abs() <= ulps * ulp)


def decayed_training(method, theta, update, eta, lam, layers=None, scale="max2"):
    """Eq. 1, Eq. 7 and Algorithms 1 to 3 as loops over lists of float64 numbers.

    ``theta``: for each layer a list of weights. ``update(t, theta, penalty)`` gives U for the
    gradient at theta, with ``penalty`` added to that gradient (for l1 and l2). Yields after every
    step what an evaluation would see.
    """
    n = len(theta)
    top = {"eq9": 1 / n, "max2": 2 / n, "mean": 2 / (n + 1)}[scale]
    rates = [lam * (i + 1) * top if method == "lpwd" or layers else lam for i in range(n)]
    sign = lambda x: (x > 0) - (x < 0)  # noqa: E731
    t = 0
    while True:
        t += 1
        added = [[0.0 for _ in layer] for layer in theta]
        if method in ("pwd", "lpwd"):
            theta = [[w - eta * lam_i * w for w in layer] for layer, lam_i in zip(theta, rates)]
        if method == "l2":
            added = [[lam_i * w for w in layer] for layer, lam_i in zip(theta, rates)]
        if method == "l1":
            added = [[lam_i * sign(w) for w in layer] for layer, lam_i in zip(theta, rates)]
        u = update(t, theta, added)
        u_hat = [[w - eta * d for w, d in zip(*pair)] for pair in zip(theta, u)]
        if method == "cautious":
            theta = [[w if d * w >= 0 else 0.0 for d, w in zip(*pair)] for pair in zip(u, theta)]
        if method in ("wd", "cautious", "corrected"):  # of one η, which is its largest
            theta = [
                [a - eta * lam_i * w for a, w in zip(*pair)]
                for *pair, lam_i in zip(u_hat, theta, rates)
            ]
        elif method == "rwd":
            theta = [[a - eta * lam_i * a for a in layer] for layer, lam_i in zip(u_hat, rates)]
        else:
            theta = u_hat
        yield [list(layer) for layer in theta]


def adam(gradient, beta1=0.9, beta2=0.999, eps=1e-8):
    """U of Adam (Kingma & Ba, Algorithm 1), as ``update`` for :func:`decayed_training`."""
    m, v = {}, {}

    def update(t, theta, added):
        g = [[a + b for a, b in zip(*pair)] for pair in zip(gradient(t, theta), added)]
        u = []
        for i, layer in enumerate(g):
            row = []
            for j, x in enumerate(layer):
                m[i, j] = beta1 * m.get((i, j), 0.0) + (1 - beta1) * x
                v[i, j] = beta2 * v.get((i, j), 0.0) + (1 - beta2) * x * x
                row.append(m[i, j] / (1 - beta1**t) / (math.sqrt(v[i, j] / (1 - beta2**t)) + eps))
            u.append(row)
        return u

    return update


def momentum(gradient, mu=0.9):
    """U of SGD with momentum (Polyak), as ``update`` for :func:`decayed_training`."""
    velocity = {}

    def update(t, theta, added):
        u = []
        for i, layer in enumerate(gradient(t, theta)):
            for j, x in enumerate(layer):
                velocity[i, j] = mu * velocity.get((i, j), 0.0) + x + added[i][j]
            u.append([velocity[i, j] for j in range(len(layer))])
        return u

    return update
