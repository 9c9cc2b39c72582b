"""What decay did in a run, in sentences: numbers come in, words go out.

Each is said where a measured condition holds, and names the option to change where there is one.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import counted
from ..probe.dynamics import BALANCED, IDLE, State, vanished
from ..probe.records import Tally, pooled
from ..wording import percent
from .states import Part, States

#: Below such a share of all that is taken off, opposing penalties are harmless; above it they are
#: not.
HARMLESS, HARMFUL = 1e-3, 1e-2
#: So many times as fast or as slow as the median layer is told.
APART = 5
#: Where so little of the start is left, its size is forgotten.
FORGOTTEN = 0.2
#: Below it decay did nothing, and not just little.
NOTHING = 0.01
#: In shorter runs no λ is named: it would take off a twentieth and more in a step.
SHORT = 20
#: Float32 rounds (1 − c)θ back to θ for every θ below it.
LEAST_C = 2.0**-25
#: Where P is linear in λ, and known from c.
CLOSED = ("wd", "scaled", "rwd", "proximal", "pwd", "lpwd", "cautious", "corrected")

#: So many times too small outputs are told.
TOO_SMALL = 1.5

#: How the states are told apart, for those who read them.
THRESHOLDS = (
    f"idle: more than {percent(IDLE)} of the start left; else by balance (what the steps give back "
    f"of what decay takes, last quarter): shrinking below {BALANCED[0]:g}, growing above "
    f"{BALANCED[1]:g}"
)


@dataclass(frozen=True, slots=True)
class Words:
    """What a reader would change things by: options of the command line, or their own code."""

    rate: str
    longer: str
    rwd: str
    spare: str
    amp: str


_OPTIONS = Words(
    rate="`--weight-decay`",
    longer=" (`--steps`, `--epochs`)",
    rwd="`--method rwd`",
    spare="`--filter-bias-and-bn`",
    amp="`--amp`",
)
_CODE = Words(
    rate="`weight_decay`",
    longer="",
    rwd='`wd_probe.WeightDecay(model, optimizer, "rwd", rate=...)`',
    spare="a parameter group of theirs with `weight_decay=0`",
    amp="autocast",
)


@dataclass(frozen=True, slots=True)
class BatchNorms:
    """Layers of batch norm whose running statistics a run has moved.

    Attributes:
        layers: how many.
        momentum: the share of a batch's statistics in the running ones.
        weights: the names of their own.
    """

    layers: int
    momentum: float
    weights: frozenset[str]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run was asked to do, as far as that is known.

    Attributes:
        rate: λ.
        lr: η.
        rule: the rule at work, as :func:`wd_probe.audit` names it.
        optimizer: as ``--opt`` takes it.
        momentum: β, see :func:`wd_probe.probe.dynamics.momentum`.
        steps: of the optimizer.
        steps_per_epoch: in a whole epoch.
        in_code: whether it is a loop of somebody's own, that has none of our options.
        batch_norms: where it is not known what they score.
    """

    rate: float = math.nan
    lr: float = math.nan
    rule: str = ""
    optimizer: str = ""
    momentum: float = math.nan
    steps: int = 0
    steps_per_epoch: float = math.nan
    in_code: bool = False
    batch_norms: BatchNorms | None = None

    @property
    def words(self) -> Words:
        """Those of whoever runs it."""
        return _CODE if self.in_code else _OPTIONS

    @property
    def is_closed(self) -> bool:
        """Whether what is taken off is c times a weight, and c a multiple of λ."""
        return self.rule in CLOSED and self.rate > 0

    @property
    def beta(self) -> float:
        """The momentum that the angle of equilibrium goes by; NaN where it goes by more."""
        return self.momentum if self.is_closed and self.rule != "cautious" else math.nan


def verdict(states: States, setting: Setting) -> list[str]:
    """The sentences, the first of which says what decay did."""
    last = states.run.last
    if last.nonfinite > 0 and last.squared == 0:
        return ["The weights are not finite, so what decay did to them cannot be told."]
    return [
        _headline(states, setting),
        *_opposing(states.run.whole, setting),
        *_apart(states.layers),
        *_norms_and_biases(states.tensors, setting),
        *_rounded(states.tensors, setting),
        *_outrun(states.tensors, setting),
    ]


# --- what decay did -------------------------------------------------------------------------------


def _headline(states: States, setting: Setting) -> str:
    run = states.run
    if math.isinf(run.whole.timescale):
        return _nothing(setting)
    told: Mapping[State, Callable[[States, Setting], str]] = {
        "idle": _idle,
        "shrinking": _shrinking,
        "growing": _growing,
        "balanced": _balanced,
    }
    state = states.state
    if state is None:
        return (
            f"Decay took {percent(run.taken_off)} off ({_timescale(run.whole, setting)}); whether "
            "the weights shrink, hold or grow was not measured, since their sizes were not kept: "
            "keep='whole' measures it."
        )
    return told[state](states, setting)


def _nothing(setting: Setting) -> str:
    though = f", although λ is {setting.rate:g}" if setting.rate > 0 else ""
    where = f": `wdprobe audit --opt {setting.optimizer}` says why" if setting.optimizer else ""
    return f"Nothing was taken off in this run{though}{where}."


def _idle(states: States, setting: Setting) -> str:
    run = states.run
    if setting.rule == "l2" and setting.momentum > 0:
        return _through_momentum(run, setting)
    if setting.is_closed and _is_lost(states):
        return (
            f"Decay did nothing in this run: c = {1 / run.whole.timescale:.2g} is too small for "
            f"float32, where (1 − c)θ rounds back to θ below {LEAST_C:.0e}; raise λ "
            f"({setting.words.rate}) or leave it."
        )
    told = (
        f"Decay did {_little(run.taken_off)} in this run: it took {percent(run.taken_off)} off "
        f"({_timescale(run.whole, setting)})."
    )
    if setting.steps < SHORT:
        return f"{told} So short a run cannot tell more: train longer{setting.words.longer}."
    if not setting.is_closed:
        return f"{told} To act it needs a larger λ ({setting.words.rate}) or a longer run."
    wanted = setting.rate * run.whole.timescale / setting.steps
    return (
        f"{told} To act within such a run λ ({setting.words.rate}) would have to be near "
        f"{wanted:.3g}{_at(run.whole, setting)}; else train longer or leave it."
    )


def _little(taken_off: float) -> str:
    return "nothing" if taken_off < NOTHING else "little"


def _is_lost(states: States) -> bool:
    held = [one for one in states.tensors if one.whole.held]
    return all(one.dtype == "float32" and 1 / one.whole.timescale < LEAST_C for one in held)


def _through_momentum(run: Part, setting: Setting) -> str:
    in_all = 1 - _carried_on(run, setting)
    did = f"did {_little(in_all)}" if in_all < 1 - IDLE else "acts"
    return (
        f"Decay {did} in this run: its penalties took {percent(run.taken_off)} off in their own "
        f"steps, and about {percent(in_all)} with what the momentum of {setting.momentum:g} "
        f"carries on ({_timescale(run.whole, setting)})."
    )


def _carried_on(run: Part, setting: Setting) -> float:
    """What is left where a penalty goes through momentum: its own step shows but 1 − β of it."""
    return float(run.whole.remaining ** (1 / (1 - setting.momentum)))


def _left(run: Part, setting: Setting) -> str:
    told = f"{percent(run.whole.remaining)} of what stood at the start is left"
    if setting.is_closed:
        return told
    told = f"counting what each penalty takes in its own step, {told}"
    if setting.rule != "l2" or not setting.momentum > 0:
        return told
    return f"{told}, and about {percent(_carried_on(run, setting))} with what momentum carries on"


def _shrinking(states: States, setting: Setting) -> str:
    run, balance = states.run, _balance(states, "shrinking")
    if all(vanished(one.whole, one.late) for one in _in_state(states, "shrinking")):
        return (
            f"Decay has shrunk the weights to nothing in {_of(states, 'shrinking')} "
            f"({_timescale(run.whole, setting)}): lower λ ({setting.words.rate})."
        )
    told = f"Decay shrinks the weights in {_of(states, 'shrinking')}: {_left(run, setting)}"
    # what momentum carries on counts as the steps' own
    if not setting.is_closed or not balance < BALANCED[0]:
        return f"{told} ({_timescale(run.whole, setting)})."
    back = (
        f"give back {percent(balance, 0)} of what it takes"
        if balance > 0.005
        else "give nothing back"
    )
    told += f", and the steps {back} ({_timescale(run.whole, setting)})."
    if balance <= 0.005:
        return (
            f"{told} No balance is in sight yet: train longer, or lower λ ({setting.words.rate})."
        )
    # |x|² falls off to balance·|x|² as exp(−2ct) where G stays as it is
    low = BALANCED[0]
    steps = math.log(low / (1 - low) * (1 - balance) / balance) / 2 * run.whole.timescale
    return (
        f"{told} If the steps stay as large as they are, balance is about "
        f"{_steps(steps, setting)} away{setting.words.longer}."
    )


def _growing(states: States, setting: Setting) -> str:
    run, balance = states.run, _balance(states, "growing")
    more = "" if math.isnan(balance) else f"the steps add {balance:.3g} times what it takes off; "
    told = (
        f"The weights grow in spite of decay in {_of(states, 'growing')}: {more}"
        f"{_left(run, setting)} ({_timescale(run.whole, setting)})."
    )
    if not setting.is_closed or math.isnan(balance):
        return told
    return (
        f"{told} To hold them at their size λ ({setting.words.rate}) would have to be near "
        f"{setting.rate * balance:.3g}."
    )


def _balanced(states: States, setting: Setting) -> str:
    run = states.run
    if pooled(one.whole for one in _in_state(states, "balanced")).remaining > FORGOTTEN:
        return (
            f"Decay is in balance in {_of(states, 'balanced')}: the steps give back what it takes; "
            f"{_left(run, setting)} ({_timescale(run.whole, setting)})."
        )
    turning = _turning(states, setting)
    return (
        f"Decay is in balance in {_of(states, 'balanced')}: their size no longer depends on where "
        f"they started, and λ ({setting.words.rate}) now sets how fast they turn{turning}."
    )


def _turning(states: States, setting: Setting) -> str:
    """The angle a step, and how much of what equilibrium predicts that is, of the median tensor."""
    found = [
        one
        for one in _in_state(states, "balanced")
        if one.kind == "matrices and kernels" and one.angle > 0
    ]
    if not found:
        return ""
    angle = f"angle per step {statistics.median(one.angle for one in found):.2g}"
    turns = [one.turn(setting.beta) for one in found]
    if any(map(math.isnan, turns)):
        return f" ({angle})"
    return f" ({angle}, {percent(statistics.median(turns), 0)} of what equilibrium predicts)"


def _of(states: States, state: State) -> str:
    """In how many of the layers that decay that is so."""
    known = [one for one in states.layers if one.whole.held]
    alike = [one for one in known if one.state == state]
    if len(alike) == len(known):
        return f"all {len(known)} layers" if len(known) > 1 else "its only layer"
    told = f"{len(alike)} of {counted(len(known), 'layer')}"
    if 2 * len(alike) > len(known):
        return told
    share = sum(one.whole.held for one in _in_state(states, state)) / states.run.whole.held
    return f"{told}, {percent(share, 0)} of the weights"


def _balance(states: States, state: State) -> float:
    """That of all tensors of a state, over the last quarter of the steps; NaN if none is known."""
    return pooled(one.telling for one in _in_state(states, state)).balance


def _in_state(states: States, state: State) -> list[Part]:
    return [one for one in states.tensors if one.state == state]


def _timescale(whole: Tally, setting: Setting) -> str:
    """1/c against the run's length, by name where it is that."""
    by_lr, by_rate = setting.lr * setting.rate * whole.timescale, setting.rate * whole.timescale
    name = next(
        (name for name, one in ((" 1/(ηλ)", by_lr), (" 1/λ", by_rate)) if 0.99 < one < 1.01), " 1/c"
    )
    return (
        f"its timescale{name} is {_rounded_steps(whole.timescale)}, the run had {setting.steps:,}"
    )


def _at(whole: Tally, setting: Setting) -> str:
    return " at this η" if 0.5 < setting.lr * setting.rate * whole.timescale < 2 else ""


def _rounded_steps(steps: float) -> str:
    return counted(float(f"{steps:.3g}"), "step")


def _steps(steps: float, setting: Setting) -> str:
    """So many steps, roughly, and epochs."""
    told = counted(float(f"{math.ceil(steps):.2g}"), "step")
    epochs = steps / setting.steps_per_epoch
    return told if not epochs >= 1 else f"{told} ({counted(float(f'{epochs:.2g}'), 'epoch')})"


# --- and what else there is to it -----------------------------------------------------------------


def _opposing(whole: Tally, setting: Setting) -> Iterator[str]:
    if not whole.opposing or math.isnan(whole.mass):
        return
    carried = (
        f"{percent(whole.rate)} of the weights carry {percent(whole.mass)} of what is taken off"
    )
    if whole.mass < HARMLESS:
        yield f"Opposing penalties are harmless here: {carried}."
    elif whole.mass < HARMFUL:
        yield f"Opposing penalties matter little here: {carried}."
    else:
        yield (
            f"Opposing penalties are not harmless here: {carried}, away from zero. "
            f"{setting.words.rwd} takes it off the weight that stands, where none opposes."
        )


def _apart(layers: Sequence[Part]) -> Iterator[str]:
    """Layers that turn much faster or slower than the median one."""
    angles = {one.name: one.angle for one in layers}
    angles = {name: angle for name, angle in angles.items() if angle > 0}
    if len(angles) < 4:
        return
    median = statistics.median(angles.values())
    slowest, fastest = min(angles, key=angles.__getitem__), max(angles, key=angles.__getitem__)
    for name, ratio, how in (
        (slowest, median / angles[slowest], "slower"),
        (fastest, angles[fastest] / median, "faster"),
    ):
        if ratio >= APART:
            yield f"`{name}` turns {ratio:,.0f} times {how} than the median layer."


def _norms_and_biases(tensors: Sequence[Part], setting: Setting) -> Iterator[str]:
    held = [one for one in tensors if one.whole.held]
    spared = [one for one in held if one.kind in ("biases", "norm weights")]
    whole = pooled([one.whole for one in spared])
    if spared and len(spared) < len(held) and whole.remaining <= IDLE:
        yield (
            f"Biases and norms decay too, {percent(1 - whole.remaining)} is taken off them: "
            f"{setting.words.spare} leaves them out."
        )


def _rounded(tensors: Sequence[Part], setting: Setting) -> Iterator[str]:
    """Where half of the weights and more lose their decay to rounding."""
    if not setting.lr * setting.rate > 0:
        return
    coarse = [one for one in tensors if one.dtype in ("bfloat16", "float16")]
    whole = pooled([one.whole for one in coarse])
    lost = 1 - whole.penalized / whole.decayed if whole.decayed else 0.0
    if lost > 0.5 and not whole.nonfinite:
        named = " and ".join(sorted({one.dtype for one in coarse}))
        yield (
            f"In {named} (1 − c)θ rounds back to θ: {percent(lost)} of the decays are lost there; "
            f"keep the weights in float32 ({setting.words.amp} computes in less and does)."
        )


def _outrun(tensors: Sequence[Part], setting: Setting) -> Iterator[str]:
    """Where batch norm's running statistics stay behind weights that shrink."""
    norms = setting.batch_norms
    if norms is None:
        return
    kernels = _shrinks([one for one in tensors if one.kind == "matrices and kernels"])
    shrinks = kernels + _shrinks([one for one in tensors if one.name in norms.weights])
    if not shrinks > 0:
        return
    forgets, steps = 1 - norms.momentum, 1 / norms.momentum
    still = 1 - forgets * math.exp(2 * shrinks)
    logarithm = norms.layers / 2 * math.log(norms.momentum / still) if still > 0 else math.inf
    if logarithm < math.log(TOO_SMALL):
        return
    how = f"some {math.exp(logarithm):.2g} times" if logarithm < math.log(1000) else "by far"
    yield (
        f"Decay outruns batch norm: in the {steps:.0f} steps that its running statistics remember, "
        f"weights ahead of each of its {counted(norms.layers, 'layer')} shrink by "
        f"{percent(-math.expm1(-shrinks * steps))}, so in evaluation outputs are {how} too small, "
        "and scores may be too low. Take the statistics anew before you evaluate "
        "(`torch.optim.swa_utils.update_bn`), or let η fall to 0 first."
    )


def _shrinks(parts: Sequence[Part]) -> float:
    """How fast weights lose size a step, as a rate; over the last quarter, at the last η."""
    late, last = (pooled(getattr(one, when) for one in parts) for when in ("late", "last"))
    if not late.squared > 0:
        return 0.0
    change = (2 * late.along + late.moved) / late.squared  # of the squared norm
    slower = min(late.timescale / last.timescale, 1.0) if late.shares else 1.0
    return max(-math.log1p(max(change, -1 + 1e-12)) / 2, 0.0) * slower
