"""The passes over many tensors, by every way there is, against the formulas and a slow loop."""

import math
import shutil
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from tests.probe.test_formulas import factors, numbers
from tests.small import Oracle, adamw, small, train
from wd_probe import OpposingPenaltyProbe, WdProbeWarning
from wd_probe.probe import formulas, kernel
from wd_probe.probe.kernel import cpu, plain
from wd_probe.probe.sums import RAW, Factors

SIZES = (0, 1, 7, 8, 33, 127, 128, 1000, 1024, 1031, (1 << 18) + 5)


def keep(tensors, signs=False):
    """What is kept of these weights."""
    return kernel.Kept(tensors, signs, [None] * len(tensors))


def counted(thetas, steppeds, factors, of_stepped=None, *, signs=False):
    """The sums of steps from one to the other, in weights that change in their places."""
    now = [theta.clone(memory_format=torch.preserve_format) for theta in thetas]
    kept = keep(now, signs)
    kept.copy()
    for one, stepped in zip(now, steppeds, strict=True):
        one.copy_(stepped)
    numbers, nothing = np.arange(len(now)), [False] * len(now)
    found = kept.count(Factors(numbers, factors, of_stepped or nothing))
    # what stands is what is kept, and so a second look finds nothing moved
    again = kept.count(Factors(numbers, factors, nothing))
    assert not again[:, [1, 2]].any()
    assert signs or not again[:, 7:9].nan_to_num(1).any()
    return found


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    """By C, and by torch as where there is no compiler."""
    if request.param == "plain":
        monkeypatch.setattr(cpu, "passes", lambda: None)
    elif not shutil.which("cc"):
        pytest.skip("no compiler")
    return request.param


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


def agrees(found, theta, stepped, c, *, of_stepped=False):
    """Counts as the formulas; sums within 1e-6, those of x·d within 1e-6 of Σ|x·d|."""
    expected = formulas.tally(theta, stepped, c, of_stepped=of_stepped)
    assert found[:4].tolist() == expected[:4].tolist()
    assert found[4:7].tolist() == pytest.approx(expected[4:7].tolist(), rel=1e-6, abs=1e-300)
    assert found[8].item() == pytest.approx(expected[8].item(), rel=1e-6, abs=1e-300)
    x, y = theta.double(), stepped.double()
    products = (x * (y - x)).abs()
    bound = 1e-6 * products[products.isfinite()].sum().item()
    assert abs(found[7] - expected[7]).item() <= bound + 1e-300


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=50), factors, st.booleans())
def test_every_way_agrees_with_the_oracle_on_edge_cases(pairs, c, is_plain):
    theta, stepped = (torch.tensor(column) for column in zip(*pairs, strict=True))
    far = ~reference.near_boundary(theta, stepped, c)
    theta, stepped = theta[far], stepped[far]
    expected = list(reference.tally(theta, stepped, c).values())
    ledger = reference.ledger(theta, stepped, "wd", c)
    expected += [ledger["squared"], ledger["along"], ledger["moved"]]
    passes = cpu.passes
    try:
        if is_plain:
            cpu.passes = lambda: None
        fast = counted([theta], [stepped], [c])[0]
    finally:
        cpu.passes = passes
    for found in (fast, formulas.tally(theta, stepped, c)):
        assert found[:4].tolist() == expected[:4]
        assert found[4:7].tolist() == pytest.approx(expected[4:7], rel=1e-6)
        assert found[8].item() == pytest.approx(expected[8], rel=1e-6)
        finite = theta.isfinite() & stepped.isfinite()
        products = theta.double() * (stepped.double() - theta.double())
        bound = 1e-6 * float(products[finite].abs().sum())
        assert abs(found[7].item() - expected[7]) <= bound


@pytest.mark.parametrize("of_stepped", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_sums_of_every_size(way, size, of_stepped):
    generator = torch.Generator().manual_seed(size)
    theta = torch.randn(size + 3, generator=generator)[3:]  # lined up by nothing
    theta[::11] = 0
    stepped = theta - torch.randn(size, generator=generator) * theta.abs().mean()
    found = counted([theta], [stepped], [0.01], [of_stepped])[0]
    agrees(found, theta, stepped, 0.01, of_stepped=of_stepped)
    if size > 100:
        assert found[1] > size / 20


@pytest.mark.parametrize("size", [1, 7, 5000, 100_000])
def test_numbers_of_every_kind(way, size):
    theta, stepped = spoiled(size, 0), spoiled(size, 1)
    agrees(counted([theta], [stepped], [0.01])[0], theta, stepped, 0.01)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e15, 1e30])
def test_squares_neither_under_nor_overflow(way, scale):
    generator = torch.Generator().manual_seed(0)
    theta = scale * torch.randn(5000, generator=generator)
    stepped = theta * (1 - 1e-4 * torch.randn(5000, generator=generator))
    agrees(counted([theta], [stepped], [1e-3])[0], theta, stepped, 1e-3)


def test_equal_numbers_are_added_up_without_drift(way):
    theta = torch.full((1 << 18,), 0.1)
    stepped = torch.full((1 << 18,), 0.1 - 1e-5)
    agrees(counted([theta], [stepped], [1e-3])[0], theta, stepped, 1e-3)


def test_what_stands_still_needs_no_closer_look(monkeypatch):
    monkeypatch.setattr(cpu, "passes", lambda: None)
    monkeypatch.setattr(formulas, "tally", lambda *_, **__: pytest.fail("looked at closely"))
    stands, zeros = torch.randn(10_000), torch.zeros(10_000)
    found = counted([stands, zeros], [stands, zeros], [0.01, 0.01])
    expected = [10_000, 0, 0, 0, 0, stands.abs().sum(), stands.square().sum(), 0, 0]
    torch.testing.assert_close(found[0, :9], torch.tensor(expected).double())
    assert not found[1].any()


def test_sums_too_large_for_float32(way):
    theta = torch.full((5000,), 1e38)
    stepped = torch.where(torch.arange(5000) < 50, -theta, theta)
    stepped[-1] = torch.inf
    expected = [4999, 50, 50, 1, 50e38, 4999e38]
    assert counted([theta], [stepped], [0.1])[0, :6].tolist() == pytest.approx(expected)


def test_nan_and_infinity_are_named_and_counted_nowhere_else(way):
    theta = torch.tensor([math.nan, math.inf, 1.0, 1.0])
    stepped = torch.tensor([1.0, -1.0, math.nan, -1.0])
    for found in (formulas.tally(theta, stepped, 0.1), counted([theta], [stepped], [0.1])[0]):
        assert found[:9].tolist() == [1, 1, 1, 3, 1, 1, 1, -2, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_ends_exactly_at_the_boundary_does_not_oppose(way, dtype):
    """θ = 1, c = 1/2, ends at −1/4: û = 1/4, and the penalty carries it to −û."""
    theta = torch.ones(200, dtype=dtype)
    at, beyond = torch.full_like(theta, -0.25), torch.full_like(theta, -0.2519)
    assert counted([theta], [at], [0.5])[0, :3].tolist() == [200, 0, 0]
    assert counted([theta], [beyond], [0.5])[0, :3].tolist() == [200, 200, 0]


def test_tensors_of_every_layout_and_dtype_in_one_call(way):
    generator = torch.Generator().manual_seed(3)
    thetas = [torch.randn(shape, generator=generator) for shape in ((3,), (700, 100), (8, 4, 3, 3))]
    thetas.append(thetas[2].to(memory_format=torch.channels_last))
    thetas.append(torch.randn(64, 128, generator=generator)[:, ::2])
    thetas += [thetas[1].to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    thetas.append(torch.tensor(0.5))
    steppeds = [t - torch.randn(t.shape, generator=generator).to(t.dtype) for t in thetas]
    cs = [0.01, torch.tensor(0.02), *[0.03] * (len(thetas) - 2)]
    found = counted(thetas, steppeds, cs)
    for row, theta, stepped, c in zip(found, thetas, steppeds, cs, strict=True):
        agrees(row, theta, stepped, c)
    assert keep([]).count(Factors(np.zeros(0, int), [], [])).shape == (0, len(RAW))


def test_kernel_is_compiled_where_there_is_a_compiler():
    assert (cpu.passes() is not None) == (shutil.which("cc") is not None)


def test_kernel_sums_do_not_depend_on_threads():
    theta = torch.randn(3_000_000)
    stepped = theta * torch.randn(3_000_000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = counted([theta], [stepped], [0.01])
        torch.set_num_threads(2)
        assert torch.equal(alone, counted([theta], [stepped], [0.01]))
    finally:
        torch.set_num_threads(threads)


def test_no_compiler_falls_back(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    cpu.passes.cache_clear()
    try:
        assert cpu.passes() is None
        theta = torch.tensor([1.0])
        assert counted([theta], [-theta], [0.1])[0, 1] == 1
        model = small()
        with pytest.warns(WdProbeWarning, match=r"no C compiler was found .* six times as fast"):
            OpposingPenaltyProbe(model, adamw(model.parameters()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            OpposingPenaltyProbe(model.double(), adamw(model.parameters()))
            monkeypatch.setenv("WD_PROBE_KERNEL", "0")
            OpposingPenaltyProbe(model.float(), adamw(model.parameters()))
    finally:
        monkeypatch.undo()
        cpu.passes.cache_clear()


# --- signs alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_signs_tell_what_crosses_zero(way, size):
    generator = torch.Generator().manual_seed(size)
    theta = torch.randn(size, generator=generator)
    stepped = theta - torch.randn(size, generator=generator)
    stepped[3::50] = 0
    c = 1e-6
    found = counted([theta], [stepped], [c], signs=True)[0]
    expected = formulas.tally(theta, stepped, c)
    assert found[:4].tolist() == expected[:4].tolist()
    assert found[4:9].isnan().all()


def test_signs_of_zeros_and_of_what_is_no_number(way):
    """A weight that is zero is not penalized, wherever it goes."""
    theta = torch.tensor([0.0, -0.0, 0.0, 1.0, -1.0, 1.0, 1.0] * 10)
    stepped = torch.tensor([-1.0, 1.0, 0.0, -1.0, 0.0, torch.nan, -torch.inf] * 10)
    assert counted([theta], [stepped], [0.0], signs=True)[0, :4].tolist() == [20, 10, 10, 20]
    now = torch.tensor([1.0, -1.0, 0.0] * 100)
    kept = keep([now], signs=True)
    kept.copy()
    for ends, penalized, opposing in (
        ([0.0, -1.0, -1.0], 200, 0),  # one becomes zero, another is no longer
        ([-1.0, -1.0, 1.0], 200, 100),
        ([1.0, 1.0, 1.0], 300, 200),
    ):
        now.copy_(torch.tensor(ends * 100))
        assert kept.count(Factors(np.zeros(1, int), [0.0], [False]))[0, :2].tolist() == [
            penalized,
            opposing,
        ]


def test_signs_take_a_bit_of_each_weight():
    if cpu.passes() is None:
        pytest.skip("no compiler")
    weights = torch.randn(1 << 20)
    assert keep([weights], signs=True).rooms[0].nbytes == (1 << 20) // 8


# --- what somebody has written --------------------------------------------------------------------


def test_what_is_known_to_have_changed_is_kept_anew(way):
    now = [torch.randn(5000), torch.randn(5000)]
    kept = keep(now)
    kept.copy()
    olds = [one.clone() for one in now]
    now[0][7] += 1
    now[1][9] += 1
    kept.renew(np.array([True, False]), turn=1)
    assert torch.equal(kept.rooms[0], now[0])
    assert torch.equal(kept.rooms[1], olds[1])


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("size", [1, 50, 257, 5000, 70_000, 600_000])
def test_a_whole_tensor_that_has_changed_is_found(way, size, signs):
    now = [torch.randn(size), torch.randn(size)]
    kept = keep(now, signs)
    kept.copy()
    before = kept.count(Factors(np.zeros(2, int), [0.0], [False]))
    now[0].data.neg_()
    kept.renew(np.zeros(2, dtype=bool), turn=5)
    found = kept.count(Factors(np.zeros(2, int), [0.0], [False]))
    assert torch.equal(found.nan_to_num(0), before.nan_to_num(0))


def test_a_share_that_has_changed_is_found_as_often_as_is_said():
    """Of a share p, spread over a tensor of n, (1 − p)^(n/2048) go unseen; here p is 1 %."""
    if cpu.passes() is None:
        pytest.skip("no compiler")
    size, seen = 200_000, 0
    generator = torch.Generator().manual_seed(0)
    for turn in range(100):
        now = torch.zeros(size)
        kept = keep([now])
        kept.copy()
        now[torch.rand(size, generator=generator) < 0.01] = 1
        kept.renew(np.zeros(1, dtype=bool), turn)
        seen += bool(kept.rooms[0].any())
    expected = 1 - 0.99 ** (size / 2048)
    assert seen / 100 == pytest.approx(expected, abs=0.12)


def test_a_sample_is_another_one_at_each_turn():
    if cpu.passes() is None:
        pytest.skip("no compiler")
    now = torch.zeros(100_000)
    kept = keep([now])
    kept.copy()
    now[::2000] = 1
    turns = []
    for turn in range(60):
        kept.renew(np.zeros(1, dtype=bool), turn)
        turns.append(bool(kept.rooms[0].any()))
        kept.rooms[0].zero_()
    assert 0 < sum(turns) < 60


def test_without_a_home_folder_the_passes_are_compiled_for_the_process(monkeypatch):
    """A container's user may have none."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    cpu.passes.cache_clear()
    try:
        model = small()
        optimizer = adamw(model.parameters())
        probe, oracle = OpposingPenaltyProbe(model, optimizer), Oracle(model.named_parameters())
        train(model, optimizer, 3, oracle.before, oracle.after)
        oracle.agrees_with(probe.records)
        assert (cpu.passes() is None) == (shutil.which("cc") is None)
    finally:
        cpu.passes.cache_clear()


def test_what_weights_were_kept_in_serves_again():
    weights = [torch.randn(10), torch.randn(4, 4)]
    first = keep(weights)
    again = kernel.Kept(weights, False, first.rooms)
    assert all(one is other for one, other in zip(first.rooms, again.rooms, strict=True))
    other = kernel.Kept([weights[0].double(), weights[1].T], False, first.rooms)
    assert other.rooms[0].dtype == torch.float64
    assert other.rooms[1].stride() == (1, 4)
    assert issubclass(plain.Signs, plain.Whole)
