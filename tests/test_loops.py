"""The probe and the methods in the training loops people have; docs/compatibility.md lists them."""

import copy
import gc
import itertools
import math
import pickle
import shutil
import tracemalloc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests import reference
from wd_probe import InputError, OpposingPenaltyProbe, WdProbeWarning, WeightDecay
from wd_probe.layering import Layer, Layers
from wd_probe.probe import kernel
from wd_probe.probe.history import Thinned

LR, RATE = 0.05, 0.3


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(32, 8, generator=generator)
    return images, torch.randint(0, 4, (32,), generator=generator)


def loss_of(model, step):
    images, labels = batch(step)
    return F.cross_entropy(model(images.to(next(model.parameters()).dtype)).float(), labels)


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=RATE, **options)


class Oracle:
    """Counts each step with the float64 oracle, from the weights before and after it."""

    def __init__(self, named, c=LR * RATE):
        self.named, self.c, self.kept, self.steps = dict(named), c, {}, []

    def before(self):
        self.kept = {name: p.detach().clone() for name, p in self.named.items()}

    def after(self):
        self.steps.append(
            {
                name: reference.tally(self.kept[name], p.detach(), self.c)
                for name, p in self.named.items()
            }
        )

    def agrees_with(self, records):
        assert len(records) == len(self.steps)
        for record, tensors in zip(records, self.steps, strict=True):
            for name, expected in tensors.items():
                found = record.tensors[name]
                for count in ("penalized", "opposing", "flipped"):
                    assert getattr(found, count) == expected[count], (record.step, name)
        assert sum(t["opposing"] for tensors in self.steps for t in tensors.values()) > 0


def plain_loop(model, optimizer, steps, oracle=None):
    for step in range(steps):
        loss_of(model, step).backward()
        if oracle is not None:
            oracle.before()
        optimizer.step()
        if oracle is not None:
            oracle.after()
        optimizer.zero_grad()


# --- mixed precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["for-loop", "foreach", "fused"])
def test_autocast_and_grad_scaler(dtype, kind):
    """A step that overflows is no step: nothing is logged for it, least of all a rate of 0."""
    model = small()
    options = {
        "for-loop": {"foreach": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }
    optimizer = adamw(model.parameters(), **options[kind])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype is torch.float16)
    probe, oracle = OpposingPenaltyProbe(model, optimizer), Oracle(model.named_parameters())
    for step in range(8):
        with torch.autocast("cpu", dtype):
            loss = loss_of(model, step)
        scaler.scale(loss).backward()
        overflows = step == 3 and scaler.is_enabled()
        if overflows:
            model[0].weight.grad[0, 0] = torch.inf
        oracle.before()
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert torch.equal(oracle.kept["0.weight"], model[0].weight)
        else:
            oracle.after()
        optimizer.zero_grad()
    oracle.agrees_with(probe.records)


def test_bfloat16_weights():
    model = small(torch.bfloat16)
    optimizer = adamw(model.parameters())
    probe, oracle = OpposingPenaltyProbe(model, optimizer), Oracle(model.named_parameters())
    plain_loop(model, optimizer, 8, oracle)
    oracle.agrees_with(probe.records)


def test_float32_master_copies():
    """The optimizer steps copies; the probe is told which tensor is whose."""
    model = small(torch.bfloat16)
    masters = {name: p.detach().float() for name, p in model.named_parameters()}
    optimizer = adamw(masters.values())
    with pytest.raises(InputError, match=r"holds none of the model's parameters.*parameters="):
        OpposingPenaltyProbe(model, optimizer)
    probe = OpposingPenaltyProbe(model, optimizer, parameters=masters)
    oracle = Oracle(masters)
    for step in range(8):
        loss_of(model, step).backward()
        for name, p in model.named_parameters():
            masters[name].grad = p.grad.float()
        oracle.before()
        optimizer.step()
        oracle.after()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
        model.zero_grad()
    oracle.agrees_with(probe.records)
    assert [layer.name for layer in probe.records[0].layers] == ["0", "2"]


# --- several optimizers ---------------------------------------------------------------------------


def test_several_optimizers_make_one_record_a_round():
    model = small()
    first, second = adamw(model[0].parameters()), adamw(model[2].parameters(), amsgrad=True)
    probe, oracle = OpposingPenaltyProbe(model, [first, second]), Oracle(model.named_parameters())
    for step in range(8):
        loss_of(model, step).backward()
        oracle.before()
        first.step()
        second.step()
        oracle.after()
        model.zero_grad()
    oracle.agrees_with(probe.records)
    assert probe.total.penalized == sum(record.penalized for record in probe.records)


def test_each_optimizers_own_rule():
    """One decays, the other has L2, and a third does not decay."""
    model = nn.Sequential(*small(), nn.Linear(4, 4))
    first, second = (
        adamw(model[0].parameters()),
        torch.optim.Adam(model[2].parameters(), lr=LR, weight_decay=RATE),
    )
    third = torch.optim.AdamW(model[3].parameters(), lr=LR, weight_decay=0.0)
    with pytest.warns(WdProbeWarning) as told:
        probe = OpposingPenaltyProbe(model, [first, second, third])
    l2, none = (str(warning.message) for warning in told)
    assert l2.startswith("Adam, parameter group 0: its weight_decay is L2")
    assert none.startswith("AdamW has weight_decay=0 in every group")
    loss_of(model, 0).backward()
    for one in (first, second, third):
        one.step()
    record = probe.records[0]
    assert record.tensors["0.weight"].total_penalty > 0
    assert record.tensors["2.weight"].total_penalty > 0
    assert record.tensors["3.weight"].penalized == 0


def test_optimizers_of_different_pace():
    """As a GAN's: a round ends when one of them steps again."""
    model = small()
    often, seldom = adamw(model[0].parameters()), adamw(model[2].parameters())
    probe = OpposingPenaltyProbe(model, [often, seldom])
    for step in range(6):
        loss_of(model, step).backward()
        often.step()
        if step % 3 == 2:
            seldom.step()
        model.zero_grad()
    assert [record.step for record in probe.records] == [1, 2, 3, 4, 5, 6]
    tail = [record.tensors["2.weight"].penalized for record in probe.records]
    assert tail == [0, 0, 64, 0, 0, 64]


@pytest.mark.parametrize("method", ["own", "wd", "rwd", "lpwd", "l2"])
def test_an_optimizer_for_each_tensor_in_the_backward_pass(method):
    """The same weights and counts as one optimizer after it."""

    def run(in_backward):
        model = small()
        make = torch.optim.SGD if method != "own" else adamw
        options = {} if method == "own" else {"lr": LR, "momentum": 0.9}
        if in_backward:
            several = [make([p], **options) for p in model.parameters()]
            for one in several:
                (p,) = one.param_groups[0]["params"]

                def step(p, one=one):
                    one.step()
                    one.zero_grad()

                p.register_post_accumulate_grad_hook(step)
        else:
            several = [make(model.parameters(), **options)]
        if method != "own":
            WeightDecay(model, several, method, rate=RATE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WdProbeWarning)
            probe = OpposingPenaltyProbe(model, several)
        for step in range(8):
            loss_of(model, step).backward()
            if not in_backward:
                several[0].step()
                several[0].zero_grad()
        return list(model.parameters()), probe.records

    (plain, expected), (weights, records) = run(False), run(True)
    assert all(map(torch.equal, plain, weights))
    assert [record.step for record in records] == list(range(1, 9))
    for one, other in zip(expected, records, strict=True):
        assert dict(one.tensors) == dict(other.tensors)


# --- parameters that come and go ------------------------------------------------------------------


def test_frozen_and_later_unfrozen_layers():
    model = small()
    optimizer = adamw(model.parameters())
    model[0].requires_grad_(False)
    probe = OpposingPenaltyProbe(model, optimizer)
    plain_loop(model, optimizer, 2)
    model[0].requires_grad_(True)
    plain_loop(model, optimizer, 2)
    assert [record.penalized for record in probe.records] == [68, 68, 212, 212]
    assert [record.layers[0].penalized for record in probe.records] == [0, 0, 144, 144]


@pytest.mark.parametrize("method", ["own", "wd", "lpwd"])
def test_parameters_that_join_later_are_measured_and_decayed(method):
    model = small()
    make = adamw if method == "own" else lambda ps: torch.optim.AdamW(ps, lr=LR, weight_decay=0)
    optimizer = make(model.parameters())
    if method != "own":
        WeightDecay(model, optimizer, method, rate=RATE)
    probe = OpposingPenaltyProbe(model, optimizer)
    plain_loop(model, optimizer, 2)
    model.append(nn.Linear(4, 4))
    optimizer.add_param_group({"params": model[3].parameters()})
    plain_loop(model, optimizer, 2)
    assert [record.penalized for record in probe.records] == [212, 212, 232, 232]
    assert [layer.name for layer in probe.records[-1].layers] == ["0", "2", "3"]
    assert [layer.name for layer in probe.records[0].layers] == ["0", "2"]
    assert probe.total.tensors["3.weight"].penalized == 2 * 16
    assert probe.total.penalized == sum(record.penalized for record in probe.records)


def test_strangers_are_told_once():
    model, other = small(), nn.Linear(2, 2)
    optimizer = adamw([*model.parameters(), *other.parameters()])
    probe = OpposingPenaltyProbe(model, optimizer)
    with pytest.warns(
        WdProbeWarning, match="AdamW steps 2 parameters that are none of the"
    ) as told:
        plain_loop(model, optimizer, 3)
    assert len(told) == 1
    assert len(probe.records) == 3


def test_layers_of_ones_own_need_not_hold_everything():
    model = small()
    groups = Layers([Layer(1, "first", ("0.weight", "0.bias"))], "registration")
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer, groups=groups)
    plain_loop(model, optimizer, 1)
    assert probe.records[0].penalized == 212
    assert [layer.penalized for layer in probe.records[0].layers] == [144]


# --- the loop itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["own", "wd", "rwd", "lpwd"])
def test_a_warm_up_from_zero(method):
    """Fact 6: where η = 0 nothing is taken off, and nothing of nothing opposes."""
    model = small()
    rate = RATE if method == "own" else 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=rate)
    decay = None if method == "own" else WeightDecay(model, optimizer, method, rate=RATE)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, k / 2))
    probe = OpposingPenaltyProbe(model, optimizer, profile=[0.1, 1.0])
    for step in range(4):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
    first, *rest = probe.records
    assert (first.penalized, first.total.total_penalty) == (0, 0)
    assert all(math.isnan(share) for share in (first.rate, first.mass, first.flip_rate))
    assert [r.penalized for r in rest] == [212] * 3
    assert probe.total.penalized == 3 * 212
    assert probe.total.rate == sum(r.total.opposing for r in rest) / (3 * 212)
    if probe.profiles:
        assert probe.profiles[0].opposing == (0, 0)
        assert sum(probe.profiles[1].opposing) > 0
    assert decay is None or decay.method == method


def test_accumulation_schedulers_and_averaged_copies():
    model = small()
    optimizer = adamw(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    probe, oracle = OpposingPenaltyProbe(model, optimizer), Oracle(model.named_parameters())
    for step in range(12):
        loss_of(model, step).backward()
        if step % 3 < 2:
            continue
        oracle.c = optimizer.param_groups[0]["lr"] * RATE
        oracle.before()
        optimizer.step()
        oracle.after()
        schedule.step()
        average.update_parameters(model)
        optimizer.zero_grad()
    oracle.agrees_with(probe.records)
    assert len(probe.records) == 4


def test_activation_checkpointing():
    class Checkpointed(nn.Sequential):
        def forward(self, images):
            hidden = checkpoint(self[0], images, use_reentrant=False)
            return self[2](self[1](hidden))

    model = Checkpointed(*small())
    optimizer = adamw(model.parameters())
    probe, oracle = OpposingPenaltyProbe(model, optimizer), Oracle(model.named_parameters())
    plain_loop(model, optimizer, 6, oracle)
    oracle.agrees_with(probe.records)


def test_a_notebook_that_runs_its_cell_twice():
    """The first probe goes with the name that held it, its hooks with it."""
    model = small()
    optimizer = adamw(model.parameters())
    for _ in range(5):
        probe = OpposingPenaltyProbe(model, optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert len(optimizer._optimizer_step_post_hooks) == 1
    plain_loop(model, optimizer, 2)
    assert [record.step for record in probe.records] == [1, 2]
    decay_free = small()
    other = torch.optim.SGD(decay_free.parameters(), lr=0.1)
    WeightDecay(decay_free, other, "wd", rate=0.1)
    with pytest.raises(InputError, match=r"has a WeightDecay already; detach\(\) that one first"):
        WeightDecay(decay_free, other, "wd", rate=0.1)


def test_copies_and_pickles_carry_no_probe():
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    copied_model, copied = copy.deepcopy((model, optimizer))
    unpickled_model, unpickled = pickle.loads(pickle.dumps((model, optimizer)))
    for net, one in ((copied_model, copied), (unpickled_model, unpickled)):
        plain_loop(net, one, 1)
    assert not probe.records
    plain_loop(model, optimizer, 1)
    assert len(probe.records) == 1
    assert all(map(torch.equal, model.parameters(), copied_model.parameters()))


def test_a_copied_or_pickled_probe_holds_what_was_measured():
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer, profile=[0.1])
    plain_loop(model, optimizer, 3)
    for other in (copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))):
        plain_loop(model, optimizer, 1)
        assert other.records == probe.records[:3]
        assert other.total == probe.total or other.total.step == 3
        assert other.profiles == probe.profiles[:3]
        assert not list(other.named_parameters())
        other.close()
    assert len(probe.records) == 5
    assert probe.records[0] != probe.records[1]


def test_what_a_probe_and_a_method_say_of_themselves():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    decay = WeightDecay(model, optimizer, "lpwd", rate=0.5)
    assert repr(decay) == "WeightDecay('lpwd', rate=0.5, scale='max2')"
    probe = OpposingPenaltyProbe(model, optimizer)
    assert repr(probe) == "OpposingPenaltyProbe(SGD, steps=0, rate=nan)"
    plain_loop(model, optimizer, 2)
    assert repr(probe) == "OpposingPenaltyProbe(SGD, steps=2, rate=0)"


def test_loading_an_optimizers_state_keeps_the_probe():
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    plain_loop(model, optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plain_loop(model, optimizer, 2)
    assert len(probe.records) == 4


def test_a_measuring_that_fails_does_not_end_the_training(monkeypatch):
    model, untouched = small(), small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)

    def full(*_):
        raise MemoryError("no memory for the counts")

    monkeypatch.setattr("wd_probe.probe.plan.kernel.Tallying", full)
    with pytest.warns(
        WdProbeWarning, match=r"R_op of step 1 is not measured: no memory for the counts"
    ) as told:
        plain_loop(model, optimizer, 3)
    assert told[0].filename == __file__
    monkeypatch.undo()
    plain_loop(model, optimizer, 1)
    assert [record.step for record in probe.records] == [4]
    plain_loop(untouched, plain := adamw(untouched.parameters()), 3)
    plain_loop(untouched, plain, 1)
    assert all(map(torch.equal, model.parameters(), untouched.parameters()))


def test_a_copy_that_fails_is_not_counted(monkeypatch):
    """Not against the copy of a step before it either."""
    torch.manual_seed(0)
    net = nn.Linear(8, 16)
    optimizer = adamw([net.weight])
    probe = OpposingPenaltyProbe(net, optimizer)

    def step(times):
        for seed in range(times):
            net(batch(seed)[0]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    step(1)
    optimizer.add_param_group({"params": [net.bias], "weight_decay": 0.0})

    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory for the copy")

    with monkeypatch.context() as patched:
        patched.setattr("wd_probe.probe.copies.torch.empty_like", full)
        with pytest.warns(WdProbeWarning, match="no memory for the copy"):
            step(3)
    assert [record.step for record in probe.records] == [1]
    step(1)
    assert [record.step for record in probe.records] == [1, 5]


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
        plain_loop(model, optimizer, 3, oracle)
        oracle.agrees_with(probe.records)
        assert (kernel.cpu.passes() is None) == (shutil.which("cc") is None)
    finally:
        kernel.cpu.passes.cache_clear()


def test_a_complex_parameter_is_left_out():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small()
            self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def forward(self, x):
            return self.inner(x.real) * self.phase.real

    model = Turned()
    optimizer = adamw(model.parameters())
    with pytest.warns(WdProbeWarning, match="phase is complex, and R_op leaves it out"):
        probe = OpposingPenaltyProbe(model, optimizer)
    oracle = Oracle(model.inner.named_parameters(prefix="inner"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain_loop(model, optimizer, 5, oracle)
    oracle.agrees_with(probe.records)


def test_steps_inside_a_cuda_graph_are_told(monkeypatch):
    """Capturing itself needs a GPU."""
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(WdProbeWarning, match="a CUDA graph replays its steps without hooks"):
        plain_loop(model, optimizer, 2)
    assert not probe.records


def test_fsdp1_is_refused():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = nn.Parameter(torch.zeros(4))

    model = nn.Sequential(FullyShardedDataParallel())
    optimizer = adamw(model.parameters())
    for attach in (
        lambda: OpposingPenaltyProbe(model, optimizer),
        lambda: WeightDecay(model, torch.optim.SGD(model.parameters()), "wd", rate=0.1),
    ):
        with pytest.raises(InputError, match=r"use its successor torch\.distributed\.fsdp"):
            attach()


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", ["model", "step", "both"])
def test_compiled(compiled):
    """The same counts as the oracle, no graph break in the model, no compiling after the first."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = small()
    optimizer = adamw(model.parameters())
    called = torch.compile(model, backend="aot_eager") if compiled != "step" else model
    probe, oracle = OpposingPenaltyProbe(called, optimizer), Oracle(model.named_parameters())
    step_it = optimizer.step
    if compiled != "model":
        step_it = torch.compile(optimizer.step, backend="aot_eager")
    graphs = []
    for step in range(6):
        counters.clear()
        loss = loss_of(called, step)
        assert not counters["graph_break"]
        loss.backward()
        oracle.before()
        step_it()
        oracle.after()
        graphs.append(counters["stats"]["unique_graphs"])
        optimizer.zero_grad()
    oracle.agrees_with(probe.records)
    assert graphs[0] > 0
    assert graphs[2:] == [0, 0, 0, 0]  # torch itself compiles AdamW's second step anew


@pytest.mark.parametrize("method", ["wd", "rwd", "lpwd", "l2"])
def test_methods_on_a_compiled_step(method):
    def run(compiled):
        torch._dynamo.reset()
        model = small()
        # One by one, torch 2.7 rounds otherwise where it is compiled.
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, foreach=True)
        WeightDecay(model, optimizer, method, rate=RATE)
        step_it = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for step in range(5):
            loss_of(model, step).backward()
            step_it()
            optimizer.zero_grad()
        return list(model.parameters())

    assert all(map(torch.equal, run(False), run(True)))


# --- long runs ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_thousand_steps_in_bounded_memory():
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    WeightDecay(model, optimizer, "wd", rate=0.01)
    probe = OpposingPenaltyProbe(model, optimizer, history=64)
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(100_000, 2, 2, generator=generator)

    def run(first, last):
        for step in range(first, last):
            model.weight.grad = gradients[step]
            optimizer.step()

    seen = 0
    run(0, 20_000)
    _ = probe.records
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        run(20_000, 100_000)
        kept = probe.records
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 200_000
    assert 32 <= len(kept) <= 65
    assert kept[-1].step == probe.steps == 100_000
    assert probe.total.penalized == 400_000
    assert seen < probe.total.total.opposing < 400_000


@pytest.mark.parametrize("limit", [2, 8, 9])
@pytest.mark.parametrize("count", [1, 8, 9, 100, 1000])
def test_a_thinned_series_keeps_its_maximum_and_its_newest(limit, count):
    generator = torch.Generator().manual_seed(count)
    values = torch.rand(count, generator=generator).tolist()
    values[count // 2] = float("nan")
    thinned = Thinned(limit, lambda item: item[1])
    for step, value in enumerate(values):
        thinned.append((step, value))
    kept = list(thinned)
    assert len(kept) <= limit + 1
    assert kept[-1] == (count - 1, values[-1]) or count - 1 == count // 2
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    finite = [value for value in values if value == value]
    if finite:
        assert max(finite) in [value for _, value in kept]
    if count <= limit:
        assert [step for step, _ in kept] == list(range(count))


@pytest.mark.parametrize("limit", [2, 3, 8, 9])
def test_a_thinned_series_is_thinned_evenly(limit):
    for count in range(1, 100):
        thinned = Thinned(limit, float)
        for value in range(count):
            thinned.append(value)
        kept = list(thinned)  # of rising values each stretch keeps its last
        strides = {b - a for a, b in itertools.pairwise([-1, *kept[:-1]])}
        assert len(strides) <= 1
        assert len(kept) > limit / 2 or count <= limit


def test_a_dropped_probe_frees_model_and_optimizer():
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    plain_loop(model, optimizer, 2)
    seen = weakref.ref(model), weakref.ref(optimizer), weakref.ref(probe)
    del model, optimizer, probe
    gc.collect()
    assert [ref() for ref in seen] == [None, None, None]


def test_state_goes_on_counting():
    model = small()
    optimizer = adamw(model.parameters())
    with OpposingPenaltyProbe(model, optimizer) as whole:
        with OpposingPenaltyProbe(model, optimizer) as first:
            plain_loop(model, optimizer, 3)
        with OpposingPenaltyProbe(model, optimizer) as second:
            second.load_state_dict(first.state_dict())
            plain_loop(model, optimizer, 3)
    assert [record.step for record in second.records] == [4, 5, 6]
    assert dict(second.total.tensors) == dict(whole.total.tensors)
    other = OpposingPenaltyProbe(nn.Sequential(model), optimizer)
    with pytest.raises(InputError, match="this state is of a probe on other parameters"):
        other.load_state_dict(first.state_dict())
