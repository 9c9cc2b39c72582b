"""What a run's numbers say, in plain sentences, each from a measured condition."""

import math
from collections.abc import Mapping, Sequence

from ..errors import counted
from ..probe.records import ProfileRecord, Tally, pooled
from ..wording import percent

#: Such a share of right answers more or less, by other statistics of batch norm, says nothing yet.
LITTLE = 0.03

_LAYER_SCALES = ("gamma", "gamma_1", "gamma_2", "gamma1", "gamma2", "layer_scale", "scale")


def kind_of(name: str, ndim: int) -> str:
    """What sort of tensor a parameter is, by its name and number of dimensions."""
    leaf = name.rpartition(".")[2]
    if leaf in _LAYER_SCALES:
        return f"layer scales `{leaf}`"
    if leaf == "bias":
        return "biases"
    if ndim <= 1:
        return "norm weights"
    if any(word in leaf for word in ("pos_embed", "token", "position")):
        return "embeddings and tokens"
    return "matrices and kernels"


def findings(
    tensors: Mapping[str, tuple[int, Tally]], profiles: Sequence[ProfileRecord], rate: float
) -> list[str]:
    """Plain sentences about a run.

    Args:
        tensors: by name the number of dimensions and the tally over the whole run.
        profiles: R_op at other decay rates.
        rate: the decay rate λ of the run.

    Returns:
        None, one or a few sentences.
    """
    return [*_by_kind(tensors), *_flips(tensors), *_profile(profiles, rate)]


def _by_kind(tensors: Mapping[str, tuple[int, Tally]]) -> list[str]:
    kinds: dict[str, list[Tally]] = {}
    for name, (ndim, tally) in tensors.items():
        kinds.setdefault(kind_of(name, ndim), []).append(tally)
    found = []
    for kind, tallies in kinds.items():
        rest = pooled([t for other, ts in kinds.items() if other != kind for t in ts])
        own = pooled(tallies)
        if own.opposing >= 50 and rest.opposing >= 50 and own.rate > 4 * rest.rate:
            advice = "" if kind == "matrices and kernels" else "; they are usually left undecayed"
            found.append((own.rate / rest.rate, kind, advice))
    return [
        f"The {kind} oppose {ratio:.0f} times as often as the rest{advice}."
        for ratio, kind, advice in sorted(found, reverse=True)[:2]
    ]


def _flips(tensors: Mapping[str, tuple[int, Tally]]) -> list[str]:
    total = pooled([tally for _, tally in tensors.values()])
    if total.opposing < 50 or total.flipped / total.opposing <= 0.95:
        return []
    return [
        f"{percent(total.flipped / total.opposing)} of the opposing weights had their sign "
        "flipped by the step alone: R_op follows the learning rate far more than the decay rate."
    ]


def _profile(profiles: Sequence[ProfileRecord], rate: float) -> list[str]:
    """R_op under a tenth and ten times of λ beside that under λ itself, of the same steps."""
    penalized = sum(p.penalized for p in profiles)
    if not penalized:
        return []
    low, own, high = (_nearest(profiles[0].rates, to) for to in (rate / 10, rate, rate * 10))
    if not (low < own < high and math.isclose(own, rate, rel_tol=1e-6)):
        return []
    below, here, above = (
        sum(p.opposing[p.rates.index(_nearest(p.rates, asked))] for p in profiles) / penalized
        for asked in (low, own, high)
    )
    if not above:
        return []
    return [
        f"With the same updates R_op would have been {percent(below)} under "
        f"λ = {_rounded(low):g} and {percent(above)} under λ = {_rounded(high):g}; "
        f"it is {percent(here)} under this run's "
        f"λ = {own:g} ({counted(len(profiles), 'step')}, the same for all three)."
    ]


def _rounded(value: float) -> float:
    """To two places in all."""
    return float(f"{value:.2g}")


def _nearest(rates: Sequence[float], to: float) -> float:
    return min(rates, key=lambda rate: abs(rate / to - 1))
