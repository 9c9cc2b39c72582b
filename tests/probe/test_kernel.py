"""The passes over many tensors, by every way there is, against the formulas."""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from tests.probe.test_formulas import factors, numbers
from tests.small import Oracle, adamw, small, train
from wd_probe import OpposingPenaltyProbe
from wd_probe.probe import formulas, kernel
from wd_probe.probe.movement import Moved


def tally(*jobs):
    """Of each job (θ or what is known of it, θ', c) the sums."""
    befores, afters, factors = zip(*jobs, strict=True)
    return kernel.Tallying(befores, afters)(factors)


def copied(theta, dtype=torch.float32):
    """What :class:`kernel.Copying` makes of it."""
    target = torch.empty(theta.shape, dtype=dtype)
    kernel.Copying([target], [theta])()
    return target


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=50), factors)
def test_tally_and_kernels_agree_on_edge_cases(pairs, c):
    theta, stepped = (torch.tensor(column) for column in zip(*pairs, strict=True))
    far = ~reference.near_boundary(theta, stepped, c)
    theta, stepped = theta[far], stepped[far]
    expected = list(reference.tally(theta, stepped, c).values())
    plain = formulas.tally(theta, stepped, c).tolist()
    fast = tally((theta, stepped, c))[0].tolist()
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
    assert tally((theta, stepped, 0.1))[0].tolist() == pytest.approx(expected)
    assert kernel.cpu.tally_numpy(theta.numpy(), stepped.numpy(), 0.1) == pytest.approx(expected)


def test_nan_and_infinity_are_named_and_counted_nowhere_else():
    theta = torch.tensor([math.nan, math.inf, 1.0, 1.0])
    stepped = torch.tensor([1.0, -1.0, math.nan, -1.0])
    for found in (formulas.tally(theta, stepped, 0.1), tally((theta, stepped, 0.1))[0]):
        assert found.tolist() == [1, 1, 1, 3, 1, 1]


def test_kernel_is_compiled_where_there_is_a_compiler_and_plain_torch_agrees(monkeypatch):
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
    fast = tally(*jobs)
    plain = torch.stack([formulas.tally(*job) for job in jobs])
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=0)
    monkeypatch.setattr(kernel.cpu, "passes", lambda: None)
    torch.testing.assert_close(fast, tally(*jobs), rtol=1e-5, atol=0)
    assert kernel.Tallying([], [])([]).shape == (0, 6)


def test_kernel_sums_do_not_depend_on_threads():
    theta = torch.randn(3_000_000)
    job = (theta, theta * torch.randn(3_000_000), 0.01)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = tally(job)
        torch.set_num_threads(2)
        assert torch.equal(alone, tally(job))
    finally:
        torch.set_num_threads(threads)


def test_no_compiler_falls_back(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    kernel.cpu.passes.cache_clear()
    try:
        assert kernel.cpu.passes() is None
        theta = torch.tensor([1.0])
        assert tally((theta, -theta, 0.1))[0, 1] == 1
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
        kernel.Copying([target], [source])()
        assert torch.equal(target, source)


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
    half = copied(theta, torch.bfloat16)
    found = tally((half, stepped, 0.01))[0]
    torch.testing.assert_close(
        found, formulas.tally(middle(theta), stepped, 0.01), rtol=1e-5, atol=0
    )


def test_a_tensor_that_is_not_for_the_passes_changes_no_others_copy():
    theta = torch.randn(64, 64) + 3
    strided = torch.randn(64, 128)[:, ::2]
    halves = [torch.empty(64, 64, dtype=torch.bfloat16) for _ in range(2)]
    kernel.Copying(halves, [theta, strided])()
    found = tally((halves[0], theta, 0.1), (halves[1], strided, 0.1))
    for tensor, counted in zip((theta, strided), found, strict=True):
        assert counted[5] == pytest.approx(float(tensor.double().abs().sum()), rel=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(1e-6, 0.5))
def test_half_copies_change_what_lies_within_their_rounding_alone(seed, c):
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(2000, generator=generator)
    stepped = theta * torch.randn(2000, generator=generator) * 2 * c
    half = copied(theta, torch.bfloat16)
    whole, found = tally((theta, stepped, c), (half, stepped, c))
    ratio = (stepped.double() / theta.double()).abs()
    for count, bound in ((1, c / 2), (2, c)):
        close = ((ratio / bound - 1).abs() < 2.0**-7).sum()
        assert abs(found[count] - whole[count]) <= close
    assert found[0] == whole[0] == 2000
    assert found[3] == 0
    assert found[5] == pytest.approx(float(whole[5]), rel=1e-3)


@pytest.mark.parametrize("second", [False, True])
def test_weights_recovered_from_the_state_are_counted_alike_by_every_way(second, monkeypatch):
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
    fast = tally((moved, stepped, 0.01))[0]
    monkeypatch.setattr(kernel.cpu, "passes", lambda: None)
    torch.testing.assert_close(fast, tally((moved, stepped, 0.01))[0], rtol=1e-5, atol=1)
    assert fast[0] == pytest.approx(size - 152, abs=1)  # still and zero, or no number
    assert fast[3] == 2


def test_jobs_of_every_way_in_one_call():
    theta, stepped = torch.randn(2, 1000, generator=torch.Generator().manual_seed(5))
    half = copied(theta, torch.bfloat16)
    moved = Moved((theta * 0.99 - stepped) / 0.1, None, 0.1, 1.0, 0.0, 1 / 0.99)
    double = (theta.double(), stepped.double(), 0.01)
    jobs = [(theta, stepped, 0.01), double, (half, stepped, 0.01), (moved, stepped, 0.01)]
    rows = tally(*jobs)
    assert rows[0, 1] > 100
    for row in rows[1:]:
        torch.testing.assert_close(row[:5], rows[0, :5], rtol=1e-2, atol=1)


def test_without_a_home_folder_the_passes_are_compiled_for_the_process(monkeypatch):
    """A container's user may have none."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    kernel.cpu.passes.cache_clear()
    try:
        model = small()
        optimizer = adamw(model.parameters())
        probe, oracle = OpposingPenaltyProbe(model, optimizer), Oracle(model.named_parameters())
        train(model, optimizer, 3, oracle.before, oracle.after)
        oracle.agrees_with(probe.records)
        assert (kernel.cpu.passes() is None) == (shutil.which("cc") is None)
    finally:
        kernel.cpu.passes.cache_clear()
