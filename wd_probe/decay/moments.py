"""When a method takes its share: in the gradient, with the step, after it, ahead of the forward.

A step may stop anywhere, by an exception or by Ctrl-C between any two lines. So what is to be taken
is written down before it is, taken by one operation that Python cannot break in two, and known for
taken by the versions which that operation gives the weights. What a stopped step has left is
settled ahead of the next one: weights that it moved get the decay of that step, others do not.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sharding import local

_Group = dict[str, Any]


class Rates(Protocol):
    """How strongly the weights of an optimizer are to decay."""

    def jobs(
        self, optimizer: Optimizer, needs_grad: bool = True
    ) -> Iterator[tuple[float | Tensor, list[Tensor], _Group]]:
        """Every c, the weights that it falls on, and their parameter group."""

    def penalties(self, optimizer: Optimizer) -> Iterator[tuple[float, list[Tensor]]]:
        """What times θ, or its sign, is added to the gradients of which weights."""

    def needs_both(self, optimizer: Optimizer, group: _Group, p: Tensor) -> bool:
        """Whether what is taken off, or the step, depends on the weights ahead of the step."""

    def decayed(self, stands: Tensor, theta: Tensor) -> Tensor:
        """What of θ it is that a share is taken off, after a step that put it where it stands."""


class Moment:
    """What is done around an optimizer's steps; this one does nothing.

    Attributes:
        due: whether the next forward pass in training mode is to be decayed.
        idle: whether nothing was decayed for the last step.
        given: what has its share of the next step off already, in the run that is resumed.
    """

    def __init__(self, optimizer: Optimizer, rates: Rates) -> None:
        self.optimizer, self.rates = optimizer, rates
        self.due, self.idle = True, False
        self.given: set[Tensor] = set()

    def before(self, has_closure: bool) -> None:
        """A step begins."""

    def after(self) -> None:
        """It is done."""

    def stopped(self, returned: bool) -> None:
        """It stopped ahead of `after`; whether the optimizer itself had returned."""

    def forward(self) -> None:
        """A forward pass in training mode begins."""

    def taken_ahead(self) -> set[Tensor]:
        """What has its share of the next step off already."""
        return set()

    def forget(self) -> None:
        """Weights and optimizer are those of another time."""


# --- what is taken off ------------------------------------------------------------------------


class _Share:
    """A share of some weights, taken off once however often that is asked for.

    Args:
        c: the share.
        weights: what it is taken off.
        of: what it is a share of, if not of what stands.
    """

    def __init__(
        self, c: float | Tensor, weights: list[Tensor], of: list[Tensor] | None = None
    ) -> None:
        self._c, self._weights, self._of = c, weights, of
        self._parts = [local(p) for p in weights]
        self._found: list[int] = []

    def take(self, void: Tensor | None) -> None:
        """Take it off, unless the weights were written since this was first asked for."""
        found = _versions(self._parts)
        if self._found and found != self._found:
            return
        self._found = found
        c = self._c if void is None else self._c * (1 - void)
        if isinstance(c, Tensor) and self._parts[0].dtype == torch.float64:
            c = c.double()
        if self._of is None:
            torch._foreach_mul_(self._parts, 1 - c)
        elif isinstance(c, Tensor):
            torch._foreach_sub_(self._parts, torch._foreach_mul(self._of, c))
        else:
            torch._foreach_add_(self._parts, self._of, alpha=-c)

    def standing(self) -> Iterator[Tensor]:
        """The weights that nobody has written since it was taken off them."""
        for p, part, found in zip(self._weights, self._parts, self._found, strict=False):
            if part._version == found + 1:
                yield p


def _versions(parts: Sequence[Tensor]) -> list[int]:
    return [part._version for part in parts]


def _version(made: Tensor) -> int:
    """How often it was written; what a step in inference mode makes is not counted."""
    return 0 if made.is_inference() else made._version


class _Marks:
    """By which to tell which weights have been written since."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.weights = list(weights)
        self._parts = [local(p) for p in self.weights]
        self._found = _versions(self._parts)
        places = [k for k, part in enumerate(self._parts) if part.numel()]
        some = places[:: max(1, len(places) // 4)]
        self._seen = {k: _corner(self._parts[k]).clone() for k in some}

    def _others(self) -> list[int]:
        """Where numbers are others, of those looked at."""
        return [
            k for k, seen in self._seen.items() if not torch.equal(_corner(self._parts[k]), seen)
        ]

    def differ(self) -> bool:
        """Whether some numbers are others."""
        return bool(self._others())

    def written(self) -> set[Tensor]:
        """Those whose version rose; where none did, all up to the last whose numbers differ."""
        now = _versions(self._parts)
        found = {p for p, a, b in zip(self.weights, self._found, now, strict=True) if a != b}
        others = self._others() if not found else ()
        return set(self.weights[: others[-1] + 1]) if others else found


def _corner(part: Tensor) -> Tensor:
    """A few numbers of it, as a view."""
    return part[(0,) * (part.ndim - 1)][:8] if part.ndim else part


def _has_graph(p: Tensor) -> bool:
    """Whether its gradient can be differentiated again, as AdaHessian does in its step."""
    return p.grad is not None and p.grad.requires_grad


def _signs(p: Tensor) -> Tensor:
    return p.sgn() if p.is_complex() else p.sign()


def voided(optimizer: Optimizer) -> Tensor | None:
    """1 where `GradScaler` found an overflow that makes a fused optimizer skip this step."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return None if found is None else local(found)


# --- when -------------------------------------------------------------------------------------


class WithStep(Moment):
    """θ' = θ − ηU(θ) − cθ.

    Where the step does not read the weights, (1 − c)θ is put there ahead of it. Else, and where the
    gradient is yet to be taken, θ is kept and cθ taken off after it.
    """

    def __init__(self, optimizer: Optimizer, rates: Rates) -> None:
        super().__init__(optimizer, rates)
        self._kept: list[tuple[float | Tensor, list[Tensor], list[Tensor]]] = []
        self._owed: list[_Share] = []
        self._ahead: list[_Share] = []
        self._marks: _Marks | None = None
        self._has_closure = False

    def before(self, has_closure: bool) -> None:
        """Keep θ where the gradient is yet to be taken."""
        self._has_closure, self._kept, self._owed = has_closure, [], []
        if has_closure:
            self._prepare(has_closure)

    def graded(self) -> None:
        """Keep θ, or take cθ off, but for what a stopped step has taken off already."""
        if not self._has_closure:
            self._prepare(has_closure=False)

    def _prepare(self, has_closure: bool) -> None:
        done, left = self.taken_ahead(), self._ahead
        kept, ahead = [], []
        for c, weights, group in self.rates.jobs(self.optimizer, needs_grad=not has_closure):
            keep: list[Tensor] = []
            take: list[Tensor] = []
            for p in weights:
                if p not in done:
                    read = has_closure or _has_graph(p)
                    read = read or self.rates.needs_both(self.optimizer, group, p)
                    (keep if read else take).append(p)
            if keep:
                kept.append((c, keep, [local(p).clone() for p in keep]))
            if take:
                ahead.append(_Share(c, take))
        self._kept = kept
        self._marks, self._ahead = None, [*left, *ahead]
        for share in ahead:
            share.take(voided(self.optimizer))
        self.given = set()
        if self._ahead:
            self._marks = _Marks(p for share in self._ahead for p in share.standing())

    def taken_ahead(self) -> set[Tensor]:
        """What a stopped step has taken its share off, and not moved."""
        standing = {p for share in self._ahead for p in share.standing()}
        return self.given | (standing - (self._marks.written() if self._marks else set()))

    def after(self) -> None:
        """Take off what is owed."""
        self._pay(lambda p, _: p.grad is not None or not self._has_closure)
        self._ahead, self._marks = [], None

    def stopped(self, returned: bool) -> None:
        """Take off what is owed by weights that were moved."""
        if returned:
            self.after()
        else:
            self._pay(lambda p, theta: not torch.equal(local(p), theta))

    def _pay(self, owes: Callable[[Tensor, Tensor], bool]) -> None:
        if not self._owed:
            owed = []
            for c, weights, thetas in self._kept:
                both = [(p, was) for p, was in zip(weights, thetas, strict=True) if owes(p, was)]
                if both:
                    of = [self.rates.decayed(local(p), was) for p, was in both]
                    owed.append(_Share(c, [p for p, _ in both], of))
            self._owed = owed
        for share in self._owed:
            share.take(voided(self.optimizer))
        self._kept = []
        self._owed = []

    def forget(self) -> None:
        """Nothing is kept, owed or taken."""
        self._kept, self._owed, self._ahead, self._marks = [], [], [], None


class _Marking(Moment):
    """Marks the weights ahead of a step, to tell what it moved should it stop."""

    def __init__(self, optimizer: Optimizer, rates: Rates) -> None:
        super().__init__(optimizer, rates)
        self._marks: _Marks | None = None
        self._shares: list[_Share] = []

    def before(self, has_closure: bool) -> None:
        """Mark the weights."""
        jobs = self.rates.jobs(self.optimizer, needs_grad=not has_closure)
        self._marks = _Marks(p for _, weights, _ in jobs for p in weights)

    def _moved(self) -> set[Tensor]:
        """What the stopped step moved; back where it was means that somebody put it back."""
        return self._marks.written() if self._marks is not None and self._marks.differ() else set()

    def forget(self) -> None:
        """No step is under way, and no decay half done."""
        self._marks = None
        self._shares = []


class AfterStep(_Marking):
    """θ' = (1 − c)(θ − ηU(θ))."""

    def before(self, has_closure: bool) -> None:
        """Mark the weights."""
        self._shares = []
        super().before(has_closure)

    def after(self) -> None:
        """Take it off what stands."""
        self._take(lambda _: True)

    def stopped(self, returned: bool) -> None:
        """Take it off the weights that were moved."""
        if self._marks is not None:
            moved = set() if returned else self._moved()
            self._take(lambda p: returned or p in moved)

    def _take(self, owes: Callable[[Tensor], bool]) -> None:
        if not self._shares:
            jobs = self.rates.jobs(self.optimizer)
            some = ((c, [p for p in weights if owes(p)]) for c, weights, _ in jobs)
            self._shares = [_Share(c, weights) for c, weights in some if weights]
        for share in self._shares:
            share.take(voided(self.optimizer))
        self.forget()


class AheadOfForward(_Marking):
    """φ = (1 − c)θ, once, ahead of the first forward pass after a step; then φ − ηU(φ)."""

    def __init__(self, optimizer: Optimizer, rates: Rates) -> None:
        super().__init__(optimizer, rates)
        self._void: Tensor | None = None

    def after(self) -> None:
        """The next forward pass is to be decayed."""
        self.idle = self.due
        self._let(set())

    def stopped(self, returned: bool) -> None:
        """So it is for what the step moved."""
        if self._marks is not None and not self.due:
            moved = self._moved()
            if returned or moved:
                self._let(set() if returned else set(self._marks.weights) - moved)
        self._marks = None

    def _let(self, given: set[Tensor]) -> None:
        self._shares = []
        self._void = voided(self.optimizer)
        self.given, self.due = given, True
        self._marks = None

    def forward(self) -> None:
        """Decay, if it is due, but for what a stopped pass has decayed already."""
        if not self.due:
            return
        done = self.given.union(*(share.standing() for share in self._shares))
        jobs = self.rates.jobs(self.optimizer, needs_grad=False)
        rest = ((c, [p for p in weights if p not in done]) for c, weights, _ in jobs)
        fresh = [_Share(c, weights) for c, weights in rest if weights]
        self._shares = [*self._shares, *fresh]
        for share in fresh:
            share.take(self._void)
        self.due = False
        self.given, self._shares = set(), []

    def taken_ahead(self) -> set[Tensor]:
        """What the next forward pass leaves as it is."""
        return self.given


@dataclass(frozen=True, slots=True)
class _Swapped:
    """A gradient whose place another has taken, with so many times θ or its sign added."""

    p: Tensor
    own: Tensor
    ours: Tensor
    version: int
    factor: float


class InGradient(Moment):
    """The optimizer is given g + λθ, or g + λ·sign(θ), in the place of g."""

    def __init__(self, optimizer: Optimizer, rates: Rates, *, signs: bool) -> None:
        super().__init__(optimizer, rates)
        self._signs = signs
        self._swapped: list[_Swapped] = []

    def graded(self) -> None:
        """The gradient is there."""
        for factor, weights in self.rates.penalties(self.optimizer):
            own = [p.grad for p in weights if p.grad is not None]
            with torch.set_grad_enabled(any(map(_has_graph, weights))):
                added = torch._foreach_add(own, self._terms(weights), alpha=factor)
            for p, g, ours in zip(weights, own, added, strict=True):
                self._swapped.append(_Swapped(p, g, ours, _version(ours), factor))
                p.grad = ours

    def _terms(self, weights: list[Tensor]) -> list[Tensor]:
        # one by one: torch 2.7 has no sign of several DTensors
        weights = [p.detach() for p in weights]
        terms = list(map(_signs, weights)) if self._signs else weights
        scale = getattr(self.optimizer, "grad_scale", None)  # of gradients not yet unscaled
        return terms if scale is None else list(torch._foreach_mul(terms, scale))

    def ungraded(self) -> None:
        """Give the gradients back."""
        for item in self._swapped:
            if item.p.grad is item.ours:
                item.p.grad = item.own
        self._swapped = []

    def after(self) -> None:
        """Give the gradients back."""
        self.ungraded()

    def stopped(self, returned: bool) -> None:
        """Give them back with what has been added to them since the step stopped."""
        for item in self._swapped:
            if item.p.grad is item.ours and _version(item.ours) != item.version:
                (term,) = self._terms([item.p])
                item.own.copy_(item.ours - item.factor * term)
                item.p.grad = item.own
        self.ungraded()

    def forget(self) -> None:
        """Give the gradients back."""
        self.ungraded()
