"""Zero-shot decay: scale a trained model's weights to zero and evaluate on the way (Eq. 12)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from ..arguments import check_callable, check_count, check_finite, check_rate, check_type
from ..errors import InputError, Teller, counted, shown
from ..layering import chosen_parameters
from ..sharding import local
from ..shown import Shown

if TYPE_CHECKING:
    from rich.table import Table

Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class ScanPoint:
    """One evaluation of a scan.

    Attributes:
        step: s, from 0 (the undecayed model) to the number of steps (all weights zero).
        scale: 1 − s/steps, what every scaled weight was multiplied by.
        metrics: what ``evaluate`` returned; NaN and infinity are kept as such.
    """

    step: int
    scale: float
    metrics: Mapping[str, float]


class Scan(Shown, tuple[ScanPoint, ...]):
    """The points of a scan, a tuple that is shown as a table."""

    __slots__ = ()

    def __rich__(self) -> "Table":
        """The metrics at some scales."""
        from .scan_tables import curve_table

        return curve_table([(point.scale, point.metrics) for point in self])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode is put back by its ``train()``.

    What only a change of mode writes (LoRA layers that merge in ``eval()``) is back bit for bit.
    """
    modes = {module: module.training for module in model.modules()}
    was: dict[str, Tensor] = {}
    if any(modes.values()):
        was = {name: t.detach().clone() for name, t in _tensors(model).items()}
        model.eval()
        stand = _tensors(model)
        was = {name: kept for name, kept in was.items() if not _is_same(stand.get(name), kept)}
    try:
        yield
    finally:
        for module, training in modes.items():
            if module.training != training:
                module.train(training)
        for module, training in modes.items():  # one that keeps a mode whatever is asked
            module.training = training
        stand = _tensors(model) if was else {}
        with _writing(stand.values()):
            for name, kept in was.items():
                stand[name].copy_(kept)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@contextmanager
def _writing(weights: Iterable[Tensor]) -> Iterator[None]:
    """Weights may be written, those made under `torch.inference_mode` too."""
    with torch.inference_mode() if any(map(Tensor.is_inference, weights)) else torch.no_grad():
        yield


def _is_scaled(p: Tensor) -> bool:
    return p.is_floating_point() or p.is_complex()


def _is_same(stands: Tensor | None, kept: Tensor) -> bool:
    return stands is not None and torch.equal(local(stands), local(kept))


class Shrunk:
    """A model whose weights can be scaled and come back bit for bit.

    A context manager: on leaving it, also by an exception, the weights are the ones kept on
    entering, and every module is in the mode it was in. Inside it the model is in evaluation mode.
    Buffers (BatchNorm statistics) are never scaled, nor are parameters of whole numbers (quantized
    weights), which a warning names.

    Args:
        model: any module; holds one copy of the scaled parameters while it lasts.
        parameters: names of those to scale; default all.

    Raises:
        InputError: the model has no parameters, or none of such a name; some are yet to be made.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[str] | None = None) -> None:
        self.model = model
        chosen = chosen_parameters(model, parameters)
        self._names = None if parameters is None else list(chosen)
        whole = [name for name, p in chosen.items() if not _is_scaled(p)]
        if len(whole) == len(chosen):
            raise InputError(f"{type(model).__name__} has no parameters to decay")
        if whole:
            Teller()(
                f"{counted(len(whole), 'parameter')} of whole numbers ({whole[0]!r} first) cannot "
                "be scaled, and is left alone"
            )
        self._weights: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._mode = ExitStack()

    def __enter__(self) -> Self:
        """Go to evaluation mode, and keep the weights that stand there."""
        self._mode.enter_context(evaluating(self.model))
        with self._mode.pop_all() as mode:  # put back if this raises
            chosen = chosen_parameters(self.model, self._names).values()
            self._weights = list(filter(_is_scaled, chosen))
            self._kept = [p.detach().clone() for p in self._weights]
            self._mode = mode.pop_all()
        return self

    def to(self, scale: float) -> None:
        """Set every scaled weight to ``scale`` times its original, always from the original."""
        with _writing(self._weights):
            if scale == 1:
                torch._foreach_copy_(self._weights, self._kept)
                return
            for weight, kept in zip(self._weights, self._kept, strict=True):
                if weight.dtype.itemsize == 1:  # torch does not multiply numbers of 8 bits
                    weight.copy_(kept.float() * scale)
                else:
                    torch.mul(kept, scale, out=weight)

    def __exit__(self, *_: object) -> None:
        """Put weights and modes back."""
        with self._mode:
            self.to(1)
            self._kept = []


def zero_shot_decay(
    model: nn.Module,
    evaluate: Evaluate,
    steps: int = 100,
    *,
    parameters: Iterable[str] | None = None,
    on_point: Callable[[ScanPoint], None] | None = None,
) -> Scan:
    """Scale the weights to zero in ``steps`` steps, without training, and evaluate each (Eq. 12).

    θ_s = (1 − s/steps)·θ₀ for s = 0 to ``steps``, both included, always from θ₀ (theory fact 15).

    Args:
        model: a trained model; its weights, modes and ``requires_grad`` are as before when this
            returns or raises.
        evaluate: called with the model, in evaluation mode, at every scale.
        steps: number of steps to zero; there are ``steps + 1`` evaluations.
        parameters: names of those to scale; default all.
        on_point: is told every point as soon as it is measured.

    Returns:
        ``steps + 1`` points, a tuple that `print` and a notebook show as a table.

    Raises:
        InputError: ``steps`` < 1, a model without parameters, an unknown parameter name;
            ``evaluate`` gives no mapping.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = net.weight.fill_(1.0)
        >>> curve = zero_shot_decay(net, lambda m: {"sum": m.weight.sum().item()}, steps=4)
        >>> print(*(point.metrics["sum"] for point in curve))
        2.0 1.5 1.0 0.5 0.0
        >>> net.weight.sum().item()
        2.0
    """
    check_count(steps, "steps")
    check_callable(evaluate, "evaluate", "a function of the model")
    if on_point is not None:
        check_callable(on_point, "on_point", "a function of a point")
    points = []
    with Shrunk(model, parameters) as shrunk:
        for step in range(steps + 1):
            scale = 1 - step / steps
            shrunk.to(scale)
            found = evaluate(model)
            if not isinstance(found, Mapping):
                raise InputError(
                    'evaluate must give metrics by name, as {"top1": 0.9}, and gave '
                    f"{type(found).__name__}"
                )
            points.append(ScanPoint(step, scale, dict(found)))
            if on_point is not None:
                on_point(points[-1])
    return Scan(points)


def bracket(
    points: Sequence[tuple[float, float]], chance: float
) -> tuple[float, float, float] | None:
    """Where a metric first falls to half of what it had above chance.

    Args:
        points: (scale, metric) from scale 1 downward.
        chance: the metric's value for a model that knows nothing.

    Returns:
        (target, the last scale above it, the first scale at or below it); None where the metric
        starts at or below chance, or never falls so far. A NaN counts as fallen.
    """
    if not points or not points[0][1] > chance:
        return None
    target = chance + (points[0][1] - chance) / 2
    for (above, _), (below, value) in pairwise(points):
        if not value > target:
            return target, above, below
    return None


def half_life(
    model: nn.Module,
    evaluate: Evaluate,
    curve: Sequence[ScanPoint],
    *,
    metric: str = "top1",
    chance: float = 0.0,
    tolerance: float = 1e-4,
    parameters: Iterable[str] | None = None,
) -> float:
    """The scale at which a metric has lost half of what it had above chance (theory fact 17).

    Bracketed by the curve, then refined by bisection.

    Args:
        model: the model of the curve, undecayed.
        evaluate: as for the curve.
        curve: what :func:`zero_shot_decay` returned.
        metric: its name in ``ScanPoint.metrics``; higher is better.
        chance: the metric of a model that knows nothing, 1/classes for top-1.
        tolerance: width of the last bracket.
        parameters: as for the curve.

    Returns:
        A scale in (0, 1): the closer to 1, the more fragile. NaN where the metric starts at or
        below chance or never falls so far.

    Raises:
        InputError: the curve has no such metric; a chance that is not finite, a tolerance < 0.
    """
    check_callable(evaluate, "evaluate", "a function of the model")
    check_finite(chance, "chance")
    check_rate(tolerance, "tolerance")
    check_type(curve, "curve", Sequence, "what zero_shot_decay gives")
    for point in curve:
        check_type(point, "each of curve", ScanPoint, "a ScanPoint")
    known = {name for point in curve for name in point.metrics}
    if metric not in known:
        raise InputError(
            f"the curve has no metric {shown(metric)}; it has {', '.join(sorted(known)) or 'none'}"
        )
    found = bracket([(p.scale, p.metrics.get(metric, math.nan)) for p in curve], chance)
    if found is None:
        return math.nan
    target, above, below = found
    with Shrunk(model, parameters) as shrunk:
        while above - below > tolerance:
            middle = (above + below) / 2
            if not below < middle < above:  # as close as numbers can be
                break
            shrunk.to(middle)
            if evaluate(model).get(metric, math.nan) > target:
                above = middle
            else:
                below = middle
    return (above + below) / 2
