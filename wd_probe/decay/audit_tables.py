"""An audit as a table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..tables import ByWidth, RenderableType, Table, escape, plain_table

_RULES = {
    "none": "nothing decays",
    "baseline": "nothing decays",
    "mixed": "tensors decay by several rules",
    "l1": "L1: λ·sign(θ) is added to the gradient",
    "l2": "L2: λθ is added to the gradient and goes through the step",
    "wd": "decoupled: ηλθ is taken off beside the step",
    "rwd": "decoupled: c·û is taken off after the step",
    "pwd": "decoupled: c·θ is taken off before the forward pass",
    "lpwd": "decoupled, with a rate for each layer: c·θ is taken off before the forward pass",
    "cautious": "decoupled: ηλθ is taken off where the step draws the weight in, too",
    "corrected": "decoupled: ηλθ·η/η_max is taken off beside the step",
    "proximal": "decoupled: û is divided by 1 + ηλ after the step",
    "scaled": "decoupled: a multiple of ηλθ is taken off beside the step",
    "other": "no closed rule",
}


def audit_told(
    rule: str, tensors: Sequence[Mapping[str, Any]], warnings: Sequence[str], title: str = ""
) -> ByWidth:
    """The rule in words, the tensors by what is taken off them, and what to look at.

    Args:
        rule: as :class:`wd_probe.AuditReport` names it.
        tensors: the fields of :class:`wd_probe.TensorAudit` of each.
        warnings: of the report.
        title: what stands before the rule.
    """

    def parts(width: int) -> Iterator[RenderableType]:
        yield f"{title}[bold]{rule}[/]: {_RULES[rule]}"
        yield _table(tensors, width)
        yield from (f"• {escape(warning)}" for warning in warnings)

    return ByWidth(parts)


def _table(tensors: Sequence[Mapping[str, Any]], width: int) -> Table:
    table = plain_table()
    table.add_column("groups", justify="right", no_wrap=True)
    table.add_column("tensors", justify="right")
    table.add_column("such as", overflow="ellipsis", no_wrap=True, max_width=width // 3)
    table.add_column("rule")
    for title in ("ηλ", "takes off", "× ηλ"):
        table.add_column(title, justify="right", no_wrap=True)
    for alike in _alike(tensors):
        first, shares = alike[0], [t["observed"] for t in alike if t["observed"] == t["observed"]]
        share = sum(shares) / len(shares) if shares else None
        expected = first["expected"]
        table.add_row(
            _span([t["group"] for t in alike]), str(len(alike)), escape(first["name"]),
            first["rule"],
            f"{expected:.3g}",
            "–" if share is None else f"{share:.3g}",
            f"{share / expected:.3g}" if share is not None and expected else "–",
        )  # fmt: skip
    return table


def _alike(tensors: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Tensors of one rule, one strength and one number of dimensions together."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for tensor in tensors:
        kind = (tensor["rule"], len(tensor["shape"]), tensor["expected"])
        found.setdefault(kind, []).append(tensor)
    return list(found.values())


def _span(numbers: list[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least}–{most}"
