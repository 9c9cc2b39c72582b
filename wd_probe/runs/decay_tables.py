"""What decay did, as the rows that a terminal, a page and a dashboard show of a run's summary."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import counted
from ..probe.dynamics import STATES
from ..wording import percent

#: The headings of :func:`layer_table`.
LAYER_COLUMNS = ("layer", "name", "state", "balance", "taken off", "angle", "norm")


def in_all(summary: Mapping[str, Any]) -> dict[str, str]:
    """By heading what decay did in a run whose summary has `dynamics`."""
    found = summary["dynamics"]
    states = [layer["state"] for layer in summary["layers"]]
    how = ", by each penalty's own step" if summary["method"] in ("l1", "l2") else ""
    scale, length = _lengths(summary["steps"], found)
    return {
        "taken off": f"{taken_off(found['remaining'])} of what stood at the start{how}",
        "timescale 1/c": scale,
        "the run": length,
        "balance": _mean_and_last(found["balance"]),
        "angle per step": _mean_and_last(found["angular_update"]),
        "layers": " · ".join(f"{states.count(one)} {one}" for one in STATES),
    }


def layer_table(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row of text for each layer whose state is known, the one furthest from balance first."""
    known = [layer for layer in layers if layer.get("state") is not None]
    return [
        (
            str(layer["index"]),
            str(layer["name"]),
            str(layer["state"]),
            number(layer["balance"]),
            taken_off(layer["remaining"]),
            number(layer["angular_update"]),
            number(layer["norm"]),
        )
        for layer in sorted(known, key=_goodness)
    ]


def taken_off(remaining: float | None) -> str:
    """What is not left, in per cent; a dash where that is not known."""
    return percent(None if remaining is None else max(1 - remaining, 0.0))


def number(value: float | None) -> str:
    """To three places in all; a dash for none."""
    return f"{value:.3g}" if _is_known(value) else "–"


def _goodness(layer: Mapping[str, Any]) -> tuple[bool, float]:
    """Balanced ones last, others by how far from 1 their balance is."""
    balance = layer["balance"]
    is_positive = _is_known(balance) and balance > 0
    return layer["state"] == "balanced", -abs(math.log(balance)) if is_positive else -math.inf


def _lengths(steps: int, found: Mapping[str, Any]) -> tuple[str, str]:
    """The timescale, and the run's length beside it."""
    scale, epochs = found["timescale_steps"], found["timescale_epochs"]
    if not _is_known(scale):
        return "none: nothing is taken off", counted(steps, "step")
    told = _rough(scale, "step"), counted(steps, "step")
    if not _is_known(epochs):
        return told
    return (
        f"{told[0]}, {_rough(epochs, 'epoch')}",
        f"{told[1]}, {_rough(steps * epochs / scale, 'epoch')}",
    )


def _mean_and_last(found: Mapping[str, Any]) -> str:
    return f"{number(found['mean'])} over all steps, {number(found['last'])} at the last"


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _rough(value: float, what: str) -> str:
    return counted(float(f"{value:.3g}"), what)
