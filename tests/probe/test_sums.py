from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from wd_probe import Tally
from wd_probe.probe import formulas, kernel
from wd_probe.probe.kernel import gpu
from wd_probe.probe.sums import AT, RAW, SUMS, WIDTH, Factors, Taken, settle

RAWS = [10.0, 4, 3, 1, 0.5, 2, 4, -1, 0.5, 0, 0, 0]
#: The rules by the names of their ways.
RULES = {"beside": "wd", "after": "rwd", "proximal": "proximal", "ahead": "pwd", "literal": "pwd",
         "cautious": "cautious", "none": "none", "exact": "exact"}  # fmt: skip


def settled(raw, *taken, is_told=False):
    elements = np.full(len(taken), 10)
    is_told = np.full(len(taken), is_told)
    return settle(np.array(raw), taken, np.arange(len(taken)), is_told, elements)


def test_everything_that_holds_sums_follows_the_table():
    assert [field.name for field in fields(Tally)] == [one.name for one in SUMS]
    assert settled([RAWS], Taken("beside", 0.1)).shape == (1, WIDTH)
    theta = torch.ones(3)
    assert formulas.tally(theta, theta, 0.1).shape == (len(RAW),)
    assert formulas.tally_exact(theta, theta, theta).shape == (len(RAW),)
    kept = kernel.Kept([theta], False, [None])
    assert kept.count(Factors(np.zeros(1, int), [0.1], [False])).shape == (1, len(RAW))
    assert "WIDTH" not in vars(gpu)


def test_sizes_become_those_of_the_penalty():
    found = settled([RAWS], Taken("beside", 0.1))
    assert found[0, :6].tolist() == [10, 4, 3, 1, 0.05, 0.2]
    found = settled([RAWS], Taken("exact", 0.0), is_told=True)
    assert found[0, :6].tolist() == [10, 4, 3, 1, 0.5, 2]


def test_what_cannot_oppose_does_not():
    """That the step alone flipped a weight's sign is told all the same."""
    found = settled([RAWS, RAWS], Taken("after", 0.5), Taken("literal", 0.5))
    assert found[:, :6].tolist() == [[10, 0, 3, 1, 0, 2], [10, 4, 3, 1, 0.5, 2]]


@pytest.mark.parametrize("c", [0.0, np.nan, -0.1])
def test_where_nothing_is_taken_off_nothing_is_penalized(c):
    found = settled([RAWS], Taken("beside", c))
    assert found[0, :6].tolist() == [0, 0, 0, 1, 0, 0]
    assert found[0, AT["taken"]] == found[0, AT["shares"]] == 0
    assert found[0, AT["growth"]] == 2 * -1 + 0.5


values = st.floats(-4, 4, width=32)
pairs = st.lists(st.tuples(values, values, values), min_size=1, max_size=30)


@settings(deadline=None, max_examples=300)
@given(pairs, st.sampled_from([1e-6, 1e-3, 0.1, 0.9]), st.sampled_from(sorted(RULES)))
def test_the_ledger_is_what_a_loop_over_the_weights_gives(rows, c, way):
    x, y, u_hat = (torch.tensor(column) for column in zip(*rows, strict=True))
    expected = reference.ledger(x, y, RULES[way], c, u_hat)
    if way == "exact":
        raw = formulas.tally_exact(x, u_hat, y)
    elif way == "cautious":
        raw = formulas.tally_parted(x, y, c, way)
    else:
        raw = formulas.tally(x, y, c)
    found = settled([raw.tolist()], Taken(way, c), is_told=way in ("exact", "cautious"))[0]
    scale = float((x.double() ** 2 + y.double() ** 2 + u_hat.double() ** 2).sum()) + 1e-30
    near = partial(pytest.approx, rel=1e-9, abs=1e-9 * scale / (1 - c) ** 2)
    for name, value in expected.items():
        assert found[AT[name]] == near(value), name
    # the identity of fact 20: from what stood, decay included, to what stands
    after = float((y.double() ** 2).sum())
    before = expected["squared"] + (expected["taken"] if RULES[way] == "pwd" else 0)
    assert found[AT["growth"]] - found[AT["taken"]] == near(after - before)
    assert found[AT["squared_norm"]] == near(after)


@pytest.mark.parametrize("way", ["beside", "after", "proximal", "ahead"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_rounded_away_is_not_taken(dtype, way):
    """Theory fact 27: of weights that (1 − c) leaves where they are nothing is taken."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=generator).to(dtype)
    y = (x.double() - 0.1 * torch.randn(2000, generator=generator)).to(dtype)
    for c in (1e-6, 0.003 if dtype is torch.bfloat16 else 4e-4, 0.1):
        of = y if way in ("after", "proximal") else x
        moves = (of * (1 - c)).to(dtype) != of
        raw = formulas.tally_parted(x, y, c, way)
        found = settled([raw.tolist()], Taken(way, c), is_told=True)[0]
        assert found[AT["penalized"]] == moves.sum()
        taken = reference.ledger(x[moves], y[moves], RULES[way], c)
        kept = reference.ledger(x[~moves], y[~moves], "none", c)
        for name in ("squared", "moved", "along", "growth", "taken", "updated"):
            assert found[AT[name]] == pytest.approx(taken[name] + kept[name], rel=1e-6, abs=1e-9)
        share = c / (1 + c) if way == "proximal" else c
        part = float(of[moves].double().square().sum() / of.double().square().sum())
        assert found[AT["shares"]] == pytest.approx(10 * share * part)
