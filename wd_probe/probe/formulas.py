"""Eq. 1 to 11 as pure tensor functions.

Letters follow the paper: ``theta`` is a weight before the step, ``u_hat`` (û = θ − ηU) where the
step alone puts it, ``penalty`` (P) what weight decay takes off, ``stepped`` (θ') what stands after
the step, ``c`` the decay factor of one step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .sums import RAW, Way


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype wide enough to compare in: float64 if any is, else float32."""
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise InputError(f"floating-point tensors are needed, got {tensor.dtype}")
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.detach().to(wide) for t in tensors]


def opposing(unpenalized: Tensor, penalty: Tensor) -> Tensor:
    """Where a penalty pushes a weight away from zero: (û − P)² > û² (Eq. 10).

    Decided without squares, which underflow: for P > 0 the inequality is 2û < P, for P < 0 it is
    2û > P. Both are exact in floating point, whatever the size of the numbers.

    Args:
        unpenalized: û = θ − ηU, where the step alone puts the weights; any shape, any float dtype.
        penalty: P, what weight decay takes off; broadcasts against ``unpenalized``.

    Returns:
        A bool tensor of the broadcast shape. False where P = 0 and where either is NaN or infinite
        (such weights oppose nothing; :func:`tally` counts them as ``nonfinite``).

    Raises:
        InputError: a tensor is not floating point.

    Example:
        >>> u_hat = torch.tensor([0.5, -0.2, 0.001])
        >>> opposing(u_hat, torch.tensor([0.01, 0.01, 0.01]))
        tensor([False,  True,  True])
    """
    u_hat, p = _wide(unpenalized, penalty)
    doubled = 2 * u_hat
    away = ((p > 0) & (doubled < p)) | ((p < 0) & (doubled > p))
    return away & u_hat.isfinite() & p.isfinite()


def sign_flips(theta: Tensor, unpenalized: Tensor) -> Tensor:
    """Where the step alone carries a weight across zero: û/θ < 0 (theory fact 3).

    Args:
        theta: the weights before the step.
        unpenalized: û, where the step alone puts them; same shape.

    Returns:
        A bool tensor; False where either is zero or not a number.
    """
    old, new = _wide(theta, unpenalized)
    return ((old > 0) & (new < 0)) | ((old < 0) & (new > 0))


def tally(theta: Tensor, stepped: Tensor, c: float | Tensor, *, of_stepped: bool = False) -> Tensor:
    """Everything that is recorded of one tensor under decoupled decay, from θ, θ' and c alone.

    With P = cθ and θ' = û − cθ, a penalty opposes exactly where the weight ends on the other side
    of zero and θ' is larger than cθ/2 in size; the step alone flipped the sign exactly where it is
    larger than cθ (theory facts 2 and 3). Nothing is added or multiplied that could underflow.

    Args:
        theta: weights before the step, any shape and float dtype.
        stepped: weights after it, penalty included; same shape.
        c: the factor taken off, ηλ or λ (see :class:`wd_probe.WeightDecay`); a float, or a scalar
            tensor on the weights' device.
        of_stepped: whether the penalty is a share of what stands after the step: then that is
            weighed, and c is 0.

    Returns:
        A float64 tensor of the numbers of ``sums.RAW``: weights with P ≠ 0, opposing ones, those
        whose sign the step alone flipped, those with NaN or infinity before or after (counted
        nowhere else), Σ|θ| over opposing and Σ|θ| over all penalized weights (times c they are
        Σ|P|), Σθ², Σθ(θ' − θ), Σ(θ' − θ)².
    """
    old, new = _wide(theta, stepped)
    bad = ~(old.isfinite() & new.isfinite())
    old, new = (torch.where(bad, 0.0, t) for t in (old, new))
    size = (new if of_stepped else old).abs()
    across = sign_flips(old, new)
    opposes = across & (new.abs() > (c / 2) * old.abs())
    flipped = across & (new.abs() > c * old.abs())
    return _summed(size, opposes, flipped, bad, old, new)


def _summed(
    size: Tensor,
    opposes: Tensor,
    flipped: Tensor,
    bad: Tensor,
    old: Tensor,
    new: Tensor,
    told: Sequence[Tensor] = (),
) -> Tensor:
    """The numbers of ``sums.RAW``."""
    x = old.double()
    d = new.double() - x
    sums = [*(which.count_nonzero().double() for which in (size, opposes, flipped, bad))]
    sums += [(size * opposes).sum(dtype=torch.float64), size.sum(dtype=torch.float64)]
    sums += [(x * x).sum(), (x * d).sum(), (d * d).sum(), *told]
    row = torch.stack(sums)
    return torch.nn.functional.pad(row, (0, len(RAW) - len(row)))


def tally_exact(theta: Tensor, unpenalized: Tensor, stepped: Tensor) -> Tensor:
    """As :func:`tally`, from û itself: for penalties that no closed rule gives.

    The penalty is P = û − θ', and opposes exactly where |θ'| > |û| (Eq. 10).

    Args:
        theta: weights before the step.
        unpenalized: û, where the same step without the penalty puts them; same shape.
        stepped: θ', where the step put them.

    Returns:
        The numbers of :func:`tally`, with Σ|P| itself for the sizes, and Σ(û² − θ'²), Σ(θ − û)² and
        ΣP·θ.
    """
    old, u_hat, new = _wide(theta, unpenalized, stepped)
    bad = ~(old.isfinite() & u_hat.isfinite() & new.isfinite())
    old, u_hat, new = (torch.where(bad, 0.0, t) for t in (old, u_hat, new))
    size = (u_hat - new).abs()
    opposes = new.abs() > u_hat.abs()
    flipped = sign_flips(old, u_hat) & (size > 0)
    x, u, y = old.double(), u_hat.double(), new.double()
    told = [((u - y) * (u + y)).sum(), (x - u).square().sum(), ((u - y) * x).sum()]
    return _summed(size, opposes, flipped, bad, old, new, told)


def tally_parted(theta: Tensor, stepped: Tensor, c: float | Tensor, way: Way) -> Tensor:
    """As :func:`tally_exact`, where a closed rule holds for some of the weights alone.

    Of two-byte weights what (1 − c) of it is rounded back to is not penalized (theory fact 27), and
    by "cautious" what moves away from zero; from others what the rule says is taken.

    Args:
        theta: weights before the step.
        stepped: weights after it.
        c: the share taken off.
        way: how, by a closed rule.

    Returns:
        The numbers of :func:`tally_exact`.
    """
    is_after, is_ahead = way in ("after", "proximal"), way in ("ahead", "literal")
    of = stepped if is_after else theta
    stays = torch.zeros_like(of, dtype=torch.bool)
    if of.element_size() == 2:
        stays = ((of * (1 - c)).to(of.dtype) == of) & of.isfinite()
    bad = ~(theta.isfinite() & stepped.isfinite())
    old, new = (torch.where(bad, 0.0, t.double()) for t in (theta, stepped))
    if way == "cautious":
        stays |= ((new > old) & (old > 0)) | ((new < old) & (old < 0))
    weighed = torch.where(stays, 0.0, new if is_after else old)
    part = c if way in ("beside", "cautious", "proximal") else c / (1 - c)
    penalty = part * weighed
    across = sign_flips(old, new) & (weighed != 0)
    least = part * old.abs() * (way in ("beside", "literal", "cautious"))
    base, move = (old, new - old) if is_ahead else (new, new - old + penalty)
    whole = (new if is_after else old).square().sum()
    share = (c / (1 + c) if way == "proximal" else c) * weighed.square().sum() / whole
    told = [
        (2 * base * penalty + penalty * penalty).sum(),
        move.square().sum(),
        torch.where(whole > 0, share, 0.0) * old.square().sum(),
    ]
    opposes, flipped = across & (new.abs() > least / 2), across & (new.abs() > least)
    return _summed(penalty.abs(), opposes, flipped, bad, old, new, told)


def profile(theta: Tensor, stepped: Tensor, c: float, factors: Sequence[float]) -> Tensor:
    """How many weights would oppose at other decay factors, from one recorded step (fact 4).

    Opposing depends on û/θ and the factor alone, so the û of this step answers for every factor;
    the trajectory stays the run's own.

    Args:
        theta: weights before the step.
        stepped: weights after it, decayed by ``c``.
        c: the factor this step took off.
        factors: the factors asked about.

    Returns:
        An int64 tensor on the weights' device, one count for each factor.
    """
    old, new = (t.flatten() for t in _wide(theta, stepped))
    widest = max(factors) / 2
    # A superset in one cheap test; the few weights in it are then decided in float64.
    near = (new.abs() <= 1.001 * widest * old.abs()) | sign_flips(old, new)
    near &= (old != 0) & old.isfinite() & new.isfinite()
    ratio = new[near].double() / old[near].double() + c
    bounds = torch.tensor(factors, dtype=torch.float64, device=ratio.device) / 2
    order = bounds.argsort()
    # Opposing at c* means û/θ < c*/2: each ratio counts for every bound strictly above it.
    counts = torch.bincount(
        torch.searchsorted(bounds[order], ratio, right=True), minlength=len(factors) + 1
    )[:-1].cumsum(0)
    result = torch.empty_like(counts)
    result[order] = counts
    return result
