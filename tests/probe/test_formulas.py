import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from wd_probe import InputError, Tally, opposing
from wd_probe.probe import formulas
from wd_probe.probe.records import fields
from wd_probe.probe.sums import Taken, settle

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TINY32 = struct.unpack("<f", b"\x01\x00\x00\x00")[0]
EDGES = [0.0, -0.0, TINY32, -TINY32, 1e-40, -1e-40, 1e-30, -1e-30, 1e-22, 6e-8, -6e-8, 0.5, -0.5]
EDGES += [1.0, -1.0, 3e38, -3e38, 65504.0, math.inf, -math.inf, math.nan]

numbers = st.sampled_from(EDGES) | st.floats(width=32)
factors = st.sampled_from([1e-12, 1e-7, 1e-4, 0.01, 0.5, 1.0])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40), st.sampled_from(DTYPES))
def test_opposing_is_eq_10_for_every_representable_number(pairs, dtype):
    u_hat, p = (torch.tensor(column).to(dtype) for column in zip(*pairs, strict=True))
    expected = [
        reference.opposes(u, q)
        for u, q in zip(u_hat.double().tolist(), p.double().tolist(), strict=True)
    ]
    assert opposing(u_hat, p).tolist() == expected


def test_opposing_broadcasts_and_names_wrong_dtypes():
    assert opposing(torch.ones(2, 3), torch.tensor(3.0)).shape == (2, 3)
    with pytest.raises(InputError, match=r"floating-point tensors are needed, got torch\.int64"):
        opposing(torch.arange(3), torch.ones(3))


def test_squares_in_half_precision_would_miss_what_is_found():
    """Fact 1: the literal Eq. 10 underflows in float16."""
    generator = torch.Generator().manual_seed(0)
    theta = (torch.randn(20000, generator=generator) * 1e-3).half()
    u_hat = theta - (torch.randn(20000, generator=generator) * 1e-4).half()
    p = (1e-2 * theta).half()
    exact = sum(map(reference.opposes, u_hat.double().tolist(), p.double().tolist()))
    literal = ((u_hat - p) ** 2 > u_hat**2).sum().item()
    assert opposing(u_hat, p).sum().item() == exact
    assert literal < 0.5 * exact


def _pair(count, dtype, generator):
    theta = torch.randn(count, generator=generator) * 0.02
    step = torch.randn(count, generator=generator) * 0.002
    theta[::97] = 0
    theta[::31] *= 1e-20
    return theta.to(dtype), (theta - step).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1e-9, 1e-5, 0.05, 0.9])
def test_tally_agrees_with_the_oracle(dtype, c):
    theta, stepped = _pair(5000, dtype, torch.Generator().manual_seed(1))
    stepped = (stepped.double() - c * theta.double()).to(dtype)
    far = ~reference.near_boundary(theta, stepped, c)
    expected = reference.tally(theta[far], stepped[far], c)
    found = formulas.tally(theta[far], stepped[far], c).tolist()
    assert expected["opposing"] > 100
    assert found[:6] == pytest.approx(list(expected.values()), rel=1e-6)
    ledger = reference.ledger(theta[far], stepped[far], "wd", c)
    sums = [ledger[name] for name in ("squared", "along", "moved")]
    assert found[6:] == pytest.approx([*sums, 0, 0, 0], rel=1e-12)
    assert far.sum() > 4000


def tally_of(theta, u_hat, stepped):
    raw = formulas.tally_exact(theta, u_hat, stepped).numpy()[None]
    told, elements = np.array([True]), np.array([theta.numel()])
    return Tally(*fields(settle(raw, [Taken("exact", 0.0)], np.zeros(1, int), told, elements)[0]))


def test_rate_and_mass_are_nan_where_nothing_is_penalized():
    theta = u_hat = torch.tensor([1.0, -1.0])
    nothing = tally_of(theta, u_hat, u_hat)
    assert math.isnan(nothing.rate)
    assert math.isnan(nothing.mass)
    assert math.isnan(nothing.flip_rate)
    assert tally_of(theta, u_hat, u_hat - torch.tensor([3.0, 0.0])).rate == 1.0


def test_rate_and_mass_differ_by_the_size_of_what_opposes():
    """Fact 5: the weights that flip are the small ones."""
    u_hat, p = torch.tensor([-0.001, 1.0, 1.0, 1.0]), torch.tensor([0.0001, 0.1, 0.1, 0.1])
    found = tally_of(u_hat + p, u_hat.double(), u_hat.double() - p.double())
    assert found.rate == 0.25
    assert found.mass == pytest.approx(0.0001 / 0.3001)


@given(st.lists(st.floats(-1, 1, width=32).filter(bool), min_size=1, max_size=50), factors)
def test_penalties_taken_from_the_stepped_weight_never_oppose(values, c):
    """Eq. 8: rwd takes cû off, and |û − cû| ≤ |û| for 0 < c ≤ 1."""
    u_hat = torch.tensor(values, dtype=torch.float64)
    assert not opposing(u_hat, c * u_hat).any()


@settings(deadline=None)
@given(st.integers(0, 1000), factors)
def test_opposing_is_the_sign_flips_and_a_thin_band(seed, c):
    """Fact 3: {û/θ < 0} ∪ {0 ≤ û/θ < c/2}."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(500, generator=generator, dtype=torch.float64)
    u_hat = theta * torch.randn(500, generator=generator, dtype=torch.float64)
    ratio = u_hat / theta
    band = (ratio >= 0) & (ratio < c / 2)
    expected = formulas.sign_flips(theta, u_hat) | band
    assert torch.equal(opposing(u_hat, c * theta), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_profile_counts_what_every_factor_would_oppose(dtype):
    """Fact 4: one recorded step answers for every λ."""
    theta, stepped = _pair(20000, dtype, torch.Generator().manual_seed(2))
    c, asked = 1e-3, [0.5, 1e-3, 1e-6, 0.1, 1.0]
    old, new = theta.double(), stepped.double()
    known = old != 0
    u_hat = new + c * old
    expected = [int(opposing(u_hat[known], a * old[known]).sum()) for a in asked]
    assert formulas.profile(theta, stepped, c, asked).tolist() == pytest.approx(expected, abs=1)
    assert expected[0] > expected[2]


def test_profile_leaves_out_a_weight_exactly_on_the_boundary():
    """û/θ = c*/2: the penalty carries the weight to −û, as large as before, and does not oppose."""
    theta, stepped = torch.tensor([1.0]), torch.tensor([0.25])
    assert formulas.profile(theta, stepped, 0.0, [0.5, 0.51]).tolist() == [0, 1]
    assert not opposing(torch.tensor([0.25]), torch.tensor([0.5])).any()
