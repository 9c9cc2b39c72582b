"""What may be wrong with files from strangers, and what a reader may do about it."""

import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from wd_probe import InputError

QUICK = settings(max_examples=60, deadline=5000, suppress_health_check=list(HealthCheck))
SLOW = settings(QUICK, max_examples=12)
#: The files of `made` that are read: by run or scan.
READ = [
    *(("run", f"{n}.csv") for n in ("steps", "layers", "profile", "epochs")),
    *(("scan", f"{n}.csv") for n in ("curve", "parts", "distortion")),
    *((n, f"{kind}.json") for n in ("run", "scan") for kind in ("config", "summary")),
]
ESCAPE = "\x1b[31m[red]\x07\ud800\n<script>"


def outcome(read, *names):
    """What a reader gives; None where it refuses in one line that names the file."""
    try:
        return read()
    except InputError as error:
        told = str(error)
        assert told.isprintable(), ascii(told)
        assert len(told) < 600
        assert any(name in told for name in names), told
        return None


DAMAGES = st.sampled_from(["flip", "cut", "replace", "grow"])


@st.composite
def spoiled(draw, good):
    """Bytes flipped, cut short, replaced or grown."""
    where = st.integers(0, len(good))
    for _ in range(draw(st.integers(1, 3))):
        at, how = (
            min(draw(where), len(good)),
            draw(DAMAGES),
        )
        more = draw(st.binary(min_size=1, max_size=8))
        if how == "cut":
            good = good[:at]
        elif how == "grow":
            good = good[:at] + more * draw(st.sampled_from((1, 1000))) + good[at:]
        elif how == "replace":
            good = good[:at] + more + good[at + len(more) :]
        elif at < len(good):
            good = good[:at] + bytes([good[at] ^ (1 << draw(st.integers(0, 7)))]) + good[at + 1 :]
    return good


STRANGE = st.sampled_from(
    [None, True, -1, 0, 10**30, 2**63, 1e308, -1e300, 0.5, "", "x", ESCAPE, "$\\frac{$", [], {},
     [[]], [None], {"name": 1}, [[["deep"]]], "9" * 5000, math.nan, math.inf]
)  # fmt: skip


@st.composite
def mistyped(draw, value):
    """A JSON value with something else at a random place."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 4)) == 0:
        return draw(STRANGE)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(keys))
    changed = value.copy()
    if draw(st.integers(0, 5)) == 0:
        del changed[key]
    else:
        changed[key] = draw(mistyped(value[key]))
    return changed
