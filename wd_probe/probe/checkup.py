"""Whether the probe counts right on a device, by which kernel, and how fast."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import RunError, first_line
from . import kernel
from .copies import Keep
from .sums import PASSED, RAW, Doubles, Factors

#: Weights that are counted against the oracle, and that are timed on a CPU and on another device.
WEIGHTS, TIMED, TIMED_ELSEWHERE = 1_000_000, 1 << 24, 1 << 26
#: What the probe does with weights, each with the words it moves; the first is torch's plain way.
WORDS = {
    "floor A: copy θ, read both": 4,
    "keep whole": 3,
    "keep whole, where they were written in between": 5,
    "looking whether somebody wrote them": 0,
    "keep signs": 1,
}
FLOOR = next(iter(WORDS))
_CASES: tuple[tuple[torch.dtype, Keep], ...] = (
    (torch.float32, "whole"),
    (torch.float32, "signs"),
    (torch.float64, "whole"),
    (torch.bfloat16, "whole"),
    (torch.float16, "whole"),
)
_COUNTS = RAW.index("opposing_size")  # the columns before it are counts
_CLOSE = 1e-6  # what sums may differ by, of what they sum
_C = 0.0137
_SECONDS = 3.0  # to time a device in


@dataclass(frozen=True, slots=True)
class Agreement:
    """Counts and sums beside those of a plain float64 oracle.

    Attributes:
        dtype: of the weights.
        keep: what is kept of them from step to step.
        kernel: what counts them: "C", "Triton" or "torch".
        weights: how many.
        error: the largest of the sums' differences, relative; NaN where none is taken.
        problem: what is wrong.
    """

    dtype: str
    keep: Keep
    kernel: str
    weights: int
    error: float
    problem: str | None


@dataclass(frozen=True, slots=True)
class Pace:
    """What a pass over float32 weights takes.

    Attributes:
        what: the pass, of ``WORDS``.
        words: that it moves, a weight.
        ms: milliseconds, of the quickest of several.
        ns_a_weight: nanoseconds.
        of_floor: times the floor's.
    """

    what: str
    words: int
    ms: float
    ns_a_weight: float
    of_floor: float


@dataclass(frozen=True, slots=True)
class Checkup:
    """What was found on one device.

    Attributes:
        device: as torch has it.
        name: the product's; empty where torch does not tell.
        kernel: what counts float32 weights there.
        why_not: why nothing faster does.
        should: whether it should.
        agreement: with the oracle, by dtype and by what is kept.
        timed: how many weights were.
        pace: of each pass.
        untimed: why nothing was.
    """

    device: str
    name: str
    kernel: str
    why_not: str | None
    should: bool
    agreement: list[Agreement]
    timed: int
    pace: list[Pace]
    untimed: str | None

    def problems(self) -> list[str]:
        """What is wrong, each in a line."""
        found = [f"{self.device}: {self.why_not}"] if self.should else []
        return found + [
            f"{self.device}, {one.dtype}, keep {one.keep}, by {one.kernel}: {one.problem}"
            for one in self.agreement
            if one.problem
        ]


def devices() -> list[torch.device]:
    """The CPU, and what else torch computes on."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        found += [torch.device(kind.type, k) for k in range(torch.accelerator.device_count())]
    return found


def checkup(device: torch.device) -> Checkup:
    """Count on a device against the oracle, and time it."""
    why_not = kernel.why_not(device)
    timed = TIMED if device.type == "cpu" else TIMED_ELSEWHERE
    pace, untimed = [], None
    try:
        pace = _pace(device, timed)
    except Exception as error:  # of memory, say
        untimed = first_line(error)
    return Checkup(
        device=str(device),
        name=_name(device),
        kernel=kernel.name_of(torch.empty(1, device=device), False),
        why_not=None if why_not is None else str(why_not),
        should=isinstance(why_not, RunError),
        agreement=[_agreement(device, *case) for case in _CASES],
        timed=timed,
        pace=pace,
        untimed=untimed,
    )


def _name(device: torch.device) -> str:
    tell = getattr(torch.get_device_module(device), "get_device_name", None)
    return "" if tell is None or device.type == "cpu" else str(tell(device))


# --- right ----------------------------------------------------------------------------------------


def _agreement(device: torch.device, dtype: torch.dtype, keep: Keep) -> Agreement:
    stands, by, error, problem = _walk(dtype), "", np.nan, None
    try:
        now = stands[0].to(device, copy=True)
        parts = _parts(now)
        by = kernel.name_of(parts[0], keep == "signs")
        kept = kernel.Kept(parts, keep == "signs", [None] * len(parts))
        kept.copy()
        for old, new in itertools.pairwise(stands):
            now.copy_(new)
            rows = kept.count(Factors(np.zeros(len(parts), np.int64), [_C], [False]))
            expected, scale = oracle(_doubles(old), _doubles(new), _C, keep)
            found = rows.cpu().numpy().sum(0)[:PASSED]
            with np.errstate(all="ignore"):
                off = np.abs(found - expected)[_COUNTS:] / scale
            problem = problem or _differs(found, expected, off)
            error = float(np.fmax(error, off.max()))
    except Exception as failure:  # whatever a kernel, a compiler and a driver may raise
        problem = f"it fails: {first_line(failure)}"
    name = str(dtype).removeprefix("torch.")
    return Agreement(name, keep, by, len(stands[0]), error, problem)


def _walk(dtype: torch.dtype) -> list[Tensor]:
    """Weights as they stand before and after two steps: many near where penalties come to oppose.

    P opposes from |θ'| = c|θ|/2 on, and the step alone flips a sign from c|θ| on.
    """
    random = np.random.default_rng(0)
    first = random.standard_normal(WEIGHTS)
    first[::1000] = 0.0
    second = (1 - _C) * first - 0.1 * random.standard_normal(WEIGHTS)
    near = random.choice([0.49, 0.51, 0.99, 1.01], WEIGHTS // 2)
    second[: len(near)] = -_C * near * first[: len(near)]
    third = first.copy()
    third[1::1009], third[2::1013], third[3::1019] = np.nan, np.inf, -np.inf
    return [torch.from_numpy(one).to(dtype) for one in (first, second, third)]


def _parts(now: Tensor) -> list[Tensor]:
    """Tensors of the same memory that begin and end at any place."""
    half = len(now) // 2
    return [now[:half], now[half : half + 77], now[half + 77 :]]


def _doubles(tensor: Tensor) -> Doubles:
    found: Doubles = tensor.double().numpy()
    return found


def oracle(x: Doubles, y: Doubles, c: float, keep: Keep) -> tuple[Doubles, Doubles]:
    """Eq. 10 and 11 of θ and θ' as they are written, with P = cθ and û = θ' + P.

    Returns:
        The sums of ``sums.RAW`` that a pass takes; and of each but the counts what a difference is
        relative to.
    """
    sound = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(sound, x, 0.0), np.where(sound, y, 0.0)
    u_hat = y + c * x
    across = np.sign(x) * np.sign(y) < 0
    opposes = np.abs(y) > np.abs(u_hat)
    flipped = np.sign(x) * np.sign(u_hat) < 0
    if keep == "signs":  # of which it is unknown how far they go (theory fact 30)
        opposes = flipped = across
    counts = [np.count_nonzero(which) for which in (x, opposes, flipped, ~sound)]
    size, d = np.abs(x), y - x
    xx, dd = x.dot(x), d.dot(d)
    sums = np.array([size[opposes].sum(), size.sum(), xx, x.dot(d), dd])
    scale = np.array([sums[0], sums[1], xx, np.sqrt(xx * dd), dd])
    if keep == "signs":
        sums[:] = np.nan
    return np.array([*counts, *sums]), scale


def _differs(found: Doubles, expected: Doubles, off: NDArray[np.float64]) -> str | None:
    """The first number that is not what it should be."""
    is_off = found[:_COUNTS] != expected[:_COUNTS]
    unsummed = np.isnan(expected[_COUNTS:])
    is_off = np.append(is_off, np.where(unsummed, ~np.isnan(found[_COUNTS:]), ~(off <= _CLOSE)))
    if not is_off.any():
        return None
    k = int(is_off.argmax())
    shown = "{:,.0f} instead of {:,.0f}" if k < _COUNTS else "{:.9g} instead of {:.9g}"
    return f"{RAW[k]} is {shown.format(found[k], expected[k])}"


# --- fast -----------------------------------------------------------------------------------------


def _pace(device: torch.device, weights: int, tensors: int = 4, rounds: int = 9) -> list[Pace]:
    sizes = [weights // tensors] * tensors
    stands = [torch.randn(size, device=device) for size in sizes]
    away = [p + 1e-4 * torch.randn_like(p) for p in stands]
    times = alternate(sides(stands, away), rounds, device, warm_up=1, at_most=_SECONDS)
    best = {what: min(taken) for what, taken in times.items()}
    return [
        Pace(what, words, 1e3 * best[what], 1e9 * best[what] / sum(sizes), best[what] / best[FLOOR])
        for what, words in WORDS.items()
    ]


def sides(stands: Sequence[Tensor], away: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    """The passes of ``WORDS`` over weights that stand in one place and, a step later, in another.

    Floor A is torch alone: read θ, write the copy, read the copy and θ'.
    """
    copies = [torch.empty_like(p) for p in stands]
    unchanged = np.zeros(len(stands), dtype=bool)
    numbers = np.zeros(len(stands), dtype=np.int64)

    def floor() -> None:
        torch._foreach_copy_(copies, list(stands))
        for p, q in zip(copies, away, strict=True):
            p.sum()
            q.sum()

    def kept(signs: bool) -> Iterator[kernel.Kept]:
        """Two sets of weights that take turns as what stands: each pass finds them moved."""
        one = kernel.Kept(stands, signs, [None] * len(stands))
        one.copy()
        return itertools.cycle((kernel.Kept(away, signs, one.rooms), one))

    def carried(signs: bool) -> Callable[[], object]:
        turns = kept(signs)
        return lambda: next(turns).count(Factors(numbers, [1e-6], [False]))

    def written(turns: Iterator[kernel.Kept]) -> Callable[[], object]:
        def both() -> None:
            next(turns).copy()
            next(turns).count(Factors(numbers, [1e-6], [False]))

        return both

    still = next(kept(False))
    still.copy()
    passes = (floor, carried(False), written(kept(False)), lambda: still.renew(unchanged, 1))
    return dict(zip(WORDS, (*passes, carried(True)), strict=True))


def alternate(
    sides: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm_up: int = 3,
    at_most: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each callable, round by round, in an order that turns around every round.

    Args:
        sides: the callables by name.
        rounds: that are timed, unless there is no time for them.
        device: what they work on.
        warm_up: rounds before these.
        at_most: seconds, after which no other round is begun but the first timed one.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + at_most
    for number in range(warm_up + rounds):
        if number > warm_up and time.perf_counter() > end:
            break
        for name in sides if number % 2 else reversed(sides):
            begun = clock(device)
            sides[name]()
            taken = clock(device) - begun
            if number >= warm_up:
                times[name].append(taken)
    return times


def clock(device: torch.device) -> float:
    """Seconds, once a device has done all it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
