import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from wd_probe import InputError, opposing
from wd_probe.probe import formulas as penalty
from wd_probe.probe import kernel
from wd_probe.probe.movement import Moved

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
    found = dict(
        zip(penalty.TALLY_FIELDS, penalty.tally(theta[far], stepped[far], c).tolist(), strict=True)
    )
    assert expected["opposing"] > 100
    assert found == pytest.approx(expected, rel=1e-6)
    assert far.sum() > 4000


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=50), factors)
def test_tally_and_kernels_agree_on_edge_cases(pairs, c):
    theta, stepped = (torch.tensor(column) for column in zip(*pairs, strict=True))
    far = ~reference.near_boundary(theta, stepped, c)
    theta, stepped = theta[far], stepped[far]
    expected = list(reference.tally(theta, stepped, c).values())
    plain = penalty.tally(theta, stepped, c).tolist()
    fast = kernel.tally_all([(theta, stepped, c)])[0].tolist()
    in_numpy = kernel.cpu.tally_numpy(theta.numpy(), stepped.numpy(), c)
    assert plain[:4] == expected[:4]
    assert fast[:4] == expected[:4]
    assert in_numpy[:4] == expected[:4]
    assert plain[4:] == pytest.approx(expected[4:], rel=1e-6)
    assert fast[4:] == pytest.approx(expected[4:], rel=1e-6, abs=1e-44)
    assert in_numpy[4:] == pytest.approx(expected[4:], rel=1e-6, abs=1e-44)


def test_sums_too_large_for_float32():
    theta = torch.full((5000,), 1e38)
    stepped = torch.where(torch.arange(5000) < 50, -theta, theta)
    stepped[-1] = torch.inf
    expected = [4999, 50, 50, 1, 50e38, 4999e38]
    assert kernel.tally_all([(theta, stepped, 0.1)])[0].tolist() == pytest.approx(expected)
    assert kernel.cpu.tally_numpy(theta.numpy(), stepped.numpy(), 0.1) == pytest.approx(expected)


def test_nan_and_infinity_are_named_and_counted_nowhere_else():
    theta = torch.tensor([math.nan, math.inf, 1.0, 1.0])
    stepped = torch.tensor([1.0, -1.0, math.nan, -1.0])
    for found in (penalty.tally(theta, stepped, 0.1), kernel.tally_all([(theta, stepped, 0.1)])[0]):
        assert found.tolist() == [1, 1, 1, 3, 1, 1]


def test_rate_and_mass_are_nan_where_nothing_is_penalized():
    u_hat, none = torch.tensor([1.0, -1.0]), torch.zeros(2)
    assert penalty.opposing_rate(u_hat, none).isnan()
    assert penalty.opposing_mass(u_hat, none).isnan()
    assert penalty.opposing_rate(u_hat, torch.tensor([3.0, 0.0])) == 1.0


def test_rate_and_mass_differ_by_the_size_of_what_opposes():
    """Fact 5: the weights that flip are the small ones."""
    u_hat, p = torch.tensor([-0.001, 1.0, 1.0, 1.0]), torch.tensor([0.0001, 0.1, 0.1, 0.1])
    assert penalty.opposing_rate(u_hat, p) == 0.25
    assert penalty.opposing_mass(u_hat, p).item() == pytest.approx(0.0001 / 0.3001)


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
    expected = penalty.sign_flips(theta, u_hat) | band
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
    assert penalty.profile(theta, stepped, c, asked).tolist() == pytest.approx(expected, abs=1)
    assert expected[0] > expected[2]


def test_kernel_is_compiled_where_there_is_a_compiler_and_plain_torch_agrees(monkeypatch):
    import shutil

    if shutil.which("cc"):
        assert kernel.cpu.passes() is not None
    generator = torch.Generator().manual_seed(3)
    shapes = [(3,), (1,), (700, 1000), (8, 4, 3, 3), (0,)]
    jobs = []
    for shape in shapes:
        theta = torch.randn(shape, generator=generator)
        jobs.append((theta, theta - torch.randn(shape, generator=generator), 0.01))
    layout = jobs[3][0].to(memory_format=torch.channels_last)
    jobs.append((layout, jobs[3][1].to(memory_format=torch.channels_last), torch.tensor(0.02)))
    fast = kernel.tally_all(jobs)
    plain = torch.stack([penalty.tally(*job) for job in jobs])
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=0)
    monkeypatch.setattr(kernel.cpu, "passes", lambda: None)
    torch.testing.assert_close(fast, kernel.tally_all(jobs), rtol=1e-5, atol=0)
    assert kernel.tally_all([]).shape == (0, 6)


def test_kernel_sums_do_not_depend_on_threads():
    theta = torch.randn(3_000_000)
    job = (theta, theta * torch.randn(3_000_000), 0.01)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = kernel.tally_all([job])
        torch.set_num_threads(2)
        assert torch.equal(alone, kernel.tally_all([job]))
    finally:
        torch.set_num_threads(threads)


def test_no_compiler_falls_back(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    kernel.cpu.passes.cache_clear()
    try:
        assert kernel.cpu.passes() is None
        theta = torch.tensor([1.0])
        assert kernel.tally_all([(theta, -theta, 0.1)])[0, 1] == 1
    finally:
        monkeypatch.undo()
        kernel.cpu.passes.cache_clear()


@pytest.mark.parametrize("compiled", [True, False])
def test_copies_are_exact_at_any_size_and_alignment(monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(kernel.cpu, "passes", lambda: None)
    for size in (0, 1, 7, 33, 1000, (1 << 18) + 5):
        source = torch.randn(size + 3)[3:]
        target = torch.zeros(size + 1)[1:]
        kernel.copy_all([target], [source])
        assert torch.equal(target, source)


def test_profile_leaves_out_a_weight_exactly_on_the_boundary():
    """û/θ = c*/2: the penalty carries the weight to −û, as large as before, and does not oppose."""
    theta, stepped = torch.tensor([1.0]), torch.tensor([0.25])
    assert penalty.profile(theta, stepped, 0.0, [0.5, 0.51]).tolist() == [0, 1]
    assert not opposing(torch.tensor([0.25]), torch.tensor([0.5])).any()


def spoiled(size, seed):
    """Numbers of every kind: zeros of both signs, tiny, huge, infinite, NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) * 10.0 ** torch.randint(
        -30, 30, (size,), generator=generator
    )
    odd = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 1e34, torch.inf, -torch.inf, torch.nan])
    where = torch.randint(0, size, (size // 4,), generator=generator)
    values[where] = odd[torch.randint(0, len(odd), (len(where),), generator=generator)]
    return values


def middle(theta):
    """The middle of the numbers whose upper halves are those of θ; zero stays zero."""
    upper = theta.view(torch.int32) & ~0xFFFF
    return torch.where(upper & 0x7FFF0000 != 0, upper | 0x8000, upper).view(torch.float32)


@pytest.mark.parametrize("size", [1, 7, 5000, (1 << 18) + 5])
def test_half_copies_are_read_as_the_middle_of_what_they_may_have_been(size):
    theta, stepped = spoiled(size, 0), spoiled(size, 1)
    half = torch.empty(size, dtype=torch.bfloat16)
    kernel.copy_all([half], [theta])
    found = kernel.tally_all([(half, stepped, 0.01)])[0]
    torch.testing.assert_close(
        found, penalty.tally(middle(theta), stepped, 0.01), rtol=1e-5, atol=0
    )


def test_a_tensor_that_is_not_for_the_passes_changes_no_others_copy():
    theta = torch.randn(64, 64) + 3
    strided = torch.randn(64, 128)[:, ::2]
    halves = [torch.empty(64, 64, dtype=torch.bfloat16) for _ in range(2)]
    kernel.copy_all(halves, [theta, strided])
    found = kernel.tally_all([(halves[0], theta, 0.1), (halves[1], strided, 0.1)])
    for tensor, counted in zip((theta, strided), found, strict=True):
        assert counted[5] == pytest.approx(float(tensor.double().abs().sum()), rel=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(1e-6, 0.5))
def test_half_copies_change_what_lies_within_their_rounding_alone(seed, c):
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(2000, generator=generator)
    stepped = theta * torch.randn(2000, generator=generator) * 2 * c
    half = torch.empty(2000, dtype=torch.bfloat16)
    kernel.copy_all([half], [theta])
    whole, found = kernel.tally_all([(theta, stepped, c), (half, stepped, c)])
    ratio = (stepped.double() / theta.double()).abs()
    for count, bound in ((1, c / 2), (2, c)):
        close = ((ratio / bound - 1).abs() < 2.0**-7).sum()
        assert abs(found[count] - whole[count]) <= close
    assert found[0] == whole[0] == 2000
    assert found[3] == 0
    assert found[5] == pytest.approx(float(whole[5]), rel=1e-3)


@pytest.mark.parametrize("second", [False, True])
def test_weights_had_again_from_the_state_are_counted_alike_by_every_way(second, monkeypatch):
    size = (1 << 18) + 77
    generator = torch.Generator().manual_seed(4)
    stepped, first = torch.randn(2, size, generator=generator)
    first[:100] = 0
    stepped[50:150] = 0
    stepped[200], first[201] = torch.nan, torch.inf
    squares = torch.rand(size, generator=generator) if second else None
    by = 0.7 * first / (squares.sqrt() * 1.1 + 1e-8 if second else 1)
    stepped[300:400] = -by[300:400] * (1 + 4e-7)  # within rounding of a zero
    stepped[400:500] = -by[400:500] * (1 + 4e-6)  # beyond it
    moved = Moved(first, squares, 0.7, 1.1, 1e-8, 1 / 0.99)
    fast = kernel.tally_all([(moved, stepped, 0.01)])[0]
    monkeypatch.setattr(kernel.cpu, "passes", lambda: None)
    torch.testing.assert_close(
        fast, kernel.tally_all([(moved, stepped, 0.01)])[0], rtol=1e-5, atol=1
    )
    assert fast[0] == pytest.approx(size - 152, abs=1)  # still and zero, or no number
    assert fast[3] == 2


def test_jobs_of_every_way_in_one_call():
    theta, stepped = torch.randn(2, 1000, generator=torch.Generator().manual_seed(5))
    half = torch.empty(1000, dtype=torch.bfloat16)
    kernel.copy_all([half], [theta])
    moved = Moved((theta * 0.99 - stepped) / 0.1, None, 0.1, 1.0, 0.0, 1 / 0.99)
    double = (theta.double(), stepped.double(), 0.01)
    jobs = [(theta, stepped, 0.01), double, (half, stepped, 0.01), (moved, stepped, 0.01)]
    rows = kernel.tally_all(jobs)
    assert rows[0, 1] > 100
    for row in rows[1:]:
        torch.testing.assert_close(row[:5], rows[0, :5], rtol=1e-2, atol=1)
