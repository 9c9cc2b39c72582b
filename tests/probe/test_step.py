"""Steps of every kind, counted as a loop over the weights counts them."""

import copy
import math
import warnings

import pytest
import timm
import timm.optim
import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.small import LR, RATE, Oracle, adamw, batch, counted, loss_of, small, train
from wd_probe import (
    OpposingPenaltyProbe,
    WdProbeWarning,
    WeightDecay,
)

TORCH = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.3),
    "adamw-fused": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.3, fused=True),
    "adamw-single": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.3, foreach=False),
    "adam-flag": lambda ps: torch.optim.Adam(
        ps, lr=0.05, weight_decay=0.3, decoupled_weight_decay=True
    ),
    "nadam-flag": lambda ps: torch.optim.NAdam(
        ps, lr=0.05, weight_decay=0.3, decoupled_weight_decay=True
    ),
    "radam-flag": lambda ps: torch.optim.RAdam(
        ps, lr=0.05, weight_decay=0.3, decoupled_weight_decay=True
    ),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.05, weight_decay=0.3),
    "tensor-lr": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.05), weight_decay=0.3),
}


TIMM = [
    "adamw", "nadamw", "lion", "adabelief", "adafactorbv", "mars", "radamw", "sgdw",
    pytest.param(
        "muon",
        marks=pytest.mark.skipif(
            Version(timm.__version__) < Version("1.0.27"),
            reason="Muon of timm before 1.0.27 has a rate of its own for vectors",
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_steps_agree_with_the_oracle_on_every_weight(name, dtype):
    if name == "tensor-lr" and dtype is torch.bfloat16:
        pytest.skip("torch's foreach AdamW does not mix a float32 tensor rate with bfloat16")
    model = small(dtype)
    optimizer = TORCH[name](model.parameters())
    with OpposingPenaltyProbe(model, optimizer) as probe:
        expected = counted(model, optimizer, 0.05 * 0.3, 12)
    assert [record.step for record in probe.records] == list(range(1, 13))
    assert sum(record.total.opposing for record in probe.records) > 5
    for record, tensors in zip(probe.records, expected, strict=True):
        for tensor, counts in tensors.items():
            tally = record.tensors[tensor]
            assert tally.penalized == counts["penalized"]
            assert tally.opposing == counts["opposing"]
            assert tally.flipped == counts["flipped"]
            assert tally.total_penalty == pytest.approx(0.015 * counts["total_size"], rel=1e-5)


@pytest.mark.parametrize("name", TIMM)
def test_timms_decoupled_optimizers_agree_with_the_oracle(name):
    model = small()
    optimizer = timm.optim.create_optimizer_v2(
        model, name, lr=0.1, weight_decay=0.3, filter_bias_and_bn=False
    )
    with OpposingPenaltyProbe(model, optimizer) as probe:
        expected = counted(model, optimizer, 0.1 * 0.3, 8)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [record.total.opposing for record in probe.records] == counts
    assert sum(counts) > 0


def test_muon_where_torch_has_it():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.05, weight_decay=0.3)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        expected = counted(model, optimizer, 0.05 * 0.3, 8)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [record.total.opposing for record in probe.records] == counts
    assert sum(counts) > 0


@pytest.mark.parametrize("convention", ["lr*rate", "rate"])
@pytest.mark.parametrize("opt", ["momentum", "adam", "lamb", "lookahead_momentum"])
def test_wd_on_any_optimizer_in_both_conventions(convention, opt):
    model = small()
    optimizer = timm.optim.create_optimizer_v2(model, opt, lr=0.1, filter_bias_and_bn=False)
    c = 0.2 * 0.1 if convention == "lr*rate" else 0.2
    with (
        WeightDecay(model, optimizer, "wd", rate=0.2, convention=convention),
        OpposingPenaltyProbe(model, optimizer) as probe,
    ):
        if opt.startswith("lookahead"):
            train(model, optimizer, 10)
            assert len(probe.records) == 10
            return
        expected = counted(model, optimizer, c, 10)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [record.total.opposing for record in probe.records] == counts
    assert sum(counts) > 0


@pytest.mark.parametrize("keep", ["whole", "signs"])
@pytest.mark.parametrize("name", [*TORCH, "sgd-wd"])
def test_weights_are_bit_identical_with_the_probe_on_or_off(name, keep):
    def run(probed):
        model = small()
        if name == "sgd-wd":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            WeightDecay(model, optimizer, "wd", rate=0.1)
        else:
            optimizer = TORCH[name](model.parameters())
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] / 10  # so that signs will do
        if probed:
            profile = [0.1, 1.0] if keep == "whole" else []
            probe = OpposingPenaltyProbe(model, optimizer, profile=profile, keep=keep)
            assert not optimizer.state
        drawn = torch.rand(3)
        train(model, optimizer, 6)
        assert not probed or len(probe.records) == 6
        return list(model.parameters()), optimizer.state_dict(), drawn

    (plain, plain_state, plain_drawn), (probed, state, drawn) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))
    assert torch.equal(plain_drawn, drawn)
    assert str(plain_state) == str(state)


def test_r_op_follows_the_learning_rate_and_hardly_the_decay_rate():
    """Fact 3, measured."""

    def rate(lr, weight_decay):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        with OpposingPenaltyProbe(model, optimizer) as probe:
            train(model, optimizer, 30)
        assert all(r.flip_rate <= r.rate for r in probe.records)
        return sum(r.rate for r in probe.records) / 30

    assert rate(1e-2, 0.0005) == pytest.approx(rate(1e-2, 0.05), rel=0.05)
    assert rate(1e-2, 0.05) > 3 * rate(1e-3, 0.05)


def test_groups_frozen_weights_and_missing_gradients():
    """Fact 6: what is not penalized is in neither numerator nor denominator."""
    model = nn.ModuleDict({k: nn.Linear(4, 4) for k in ("a", "b", "c", "d")})
    model["b"].requires_grad_(False)
    with torch.no_grad():
        model["a"].bias.zero_()
    optimizer = torch.optim.AdamW(
        [
            {"params": model["a"].parameters(), "lr": 0.1, "weight_decay": 0.5},
            {"params": model["b"].parameters(), "weight_decay": 0.5},
            {"params": model["c"].parameters(), "weight_decay": 0.0},
            {"params": model["d"].parameters(), "weight_decay": 0.25},
        ],
        lr=0.2,
    )
    with OpposingPenaltyProbe(model, optimizer) as probe:
        sum(model[k](torch.ones(1, 4)).sum() for k in "abc").backward()
        model["d"].weight.grad = torch.zeros(4, 4)
        size = model["d"].weight.abs().sum().item()
        optimizer.step()
    record = probe.records[0]
    sizes = {name: tally.penalized for name, tally in record.tensors.items() if tally.penalized}
    assert sizes == {"a.weight": 16, "d.weight": 16}
    assert record.tensors["d.weight"].total_penalty == pytest.approx(0.2 * 0.25 * size, rel=1e-5)
    assert math.isnan(record.tensors["c.weight"].rate)
    assert record.penalized == 32


def test_live_learning_rates():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    sizes = []
    with OpposingPenaltyProbe(model, optimizer) as probe:
        train(
            model,
            optimizer,
            4,
            before=lambda: sizes.append(sum(p.abs().sum().item() for p in model.parameters())),
            after=schedule.step,
        )
    factors = [r.total.total_penalty / s for r, s in zip(probe.records, sizes, strict=True)]
    assert factors == pytest.approx([0.05, 0.025, 0.0125, 0.00625], rel=1e-5)


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        model(torch.ones(1, 6)).sum().backward()
        optimizer.step()
    assert probe.records[0].penalized == 36


def test_closures():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    WeightDecay(model, optimizer, "wd", rate=0.5)
    WeightDecay(twin, twin_optimizer, "wd", rate=0.5)
    images, labels = batch(0)
    probe = OpposingPenaltyProbe(model, optimizer)
    probe_twin = OpposingPenaltyProbe(twin, twin_optimizer)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
        twin_optimizer.zero_grad()
        F.cross_entropy(twin(images), labels).backward()
        twin_optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert [r.penalized for r in probe.records] == [r.penalized for r in probe_twin.records]


def test_a_step_that_raises_leaves_no_stale_copy():
    class Brittle(torch.optim.AdamW):
        broken = False

        def step(self, closure=None):
            if self.broken:
                raise RuntimeError("broken")
            return super().step(closure)

    model = small()
    optimizer = Brittle(model.parameters(), lr=0.05, weight_decay=0.3)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        train(model, optimizer, 1)
        optimizer.broken = True
        with pytest.raises(RuntimeError, match="broken"):
            train(model, optimizer, 1)
        optimizer.broken = False
        expected = counted(model, optimizer, 0.015, 3)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [r.total.opposing for r in probe.records][1:] == counts
    assert [r.step for r in probe.records] == [1, 2, 3, 4]


@pytest.mark.parametrize("probe_first", [True, False])
def test_probe_and_decay_attach_in_any_order(probe_first):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if probe_first:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WdProbeWarning)
            probe = OpposingPenaltyProbe(model, optimizer)
        WeightDecay(model, optimizer, "wd", rate=0.5)
    else:
        WeightDecay(model, optimizer, "wd", rate=0.5)
        probe = OpposingPenaltyProbe(model, optimizer)
    expected = counted(model, optimizer, 0.05, 6)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [r.total.opposing for r in probe.records] == counts


def test_nan_weights_are_named():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        images, labels = batch(0)
        F.cross_entropy(model(images), labels).backward()
        model[2].bias.grad.fill_(math.nan)
        optimizer.step()
    assert probe.records[0].nonfinite == 4
    assert repr(probe.records[0]).endswith("nonfinite=4)")
    assert probe.records[0].penalized == sum(p.numel() for p in model.parameters()) - 4


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


def test_steps_that_a_grad_scaler_voids_are_not_logged_as_zero():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3, fused=True)
    probe = OpposingPenaltyProbe(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        images, labels = batch(step)
        scaler.scale(F.cross_entropy(model(images), labels)).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert [r.step for r in probe.records] == [1, 3, 4]


@pytest.mark.parametrize("fused", [True, False])
def test_a_voided_step_decays_nothing(fused):
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=fused)
    WeightDecay(model, optimizer, "wd", rate=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    images, labels = batch(0)
    scaler.scale(F.cross_entropy(model(images), labels)).backward()
    model[0].weight.grad[0, 0] = math.inf
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_bfloat16_weights():
    model = small(torch.bfloat16)
    optimizer = adamw(model.parameters())
    probe, oracle = OpposingPenaltyProbe(model, optimizer), Oracle(model.named_parameters())
    train(model, optimizer, 8, oracle.before, oracle.after)
    oracle.agrees_with(probe.records)


def test_frozen_and_later_unfrozen_layers():
    model = small()
    optimizer = adamw(model.parameters())
    model[0].requires_grad_(False)
    probe = OpposingPenaltyProbe(model, optimizer)
    train(model, optimizer, 2)
    model[0].requires_grad_(True)
    train(model, optimizer, 2)
    assert [record.penalized for record in probe.records] == [68, 68, 212, 212]
    assert [record.layers[0].penalized for record in probe.records] == [0, 0, 144, 144]


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
    train(model, optimizer, 6, oracle.before, oracle.after)
    oracle.agrees_with(probe.records)


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


def test_steps_inside_a_cuda_graph_are_told(monkeypatch):
    """Capturing itself needs a GPU."""
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(WdProbeWarning, match="a CUDA graph replays its steps without hooks"):
        train(model, optimizer, 2)
    assert not probe.records


@pytest.mark.filterwarnings("ignore:SGD", "ignore:l2 goes")
@pytest.mark.parametrize("kind", ["own", "attached"])
@pytest.mark.parametrize("late", [False, True])
def test_hooks_that_clip_gradients_are_seen_by_the_copy_and_later_clamps_are_not(kind, late):
    def run(hooked):
        model, clamped = small(), []
        rate = 0.3 if kind == "own" else 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=rate)

        def clip(*_):
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

        def clamp(*_):
            for p in model.parameters():
                clamped.append(p.detach().clone())
                p.detach().clamp_(-0.2, 0.2)

        def hook():
            if hooked:
                optimizer.register_step_pre_hook(clip)
                optimizer.register_step_post_hook(clamp)

        if not late:
            hook()
        if kind == "attached":
            WeightDecay(model, optimizer, "l2", rate=0.3)
        probe = OpposingPenaltyProbe(model, optimizer, exact=True)
        if late:
            hook()
        if hooked:
            train(model, optimizer, 4)
        else:
            train(model, optimizer, 4, clip, clamp)
        return probe.records

    assert run(True) == run(False)


@pytest.mark.filterwarnings("ignore:l2 goes", "ignore:SGD", "ignore:Converting a tensor")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["closed", "exact", "wd", "wd read", "l2"])
def test_hooks_that_clip_gradients_in_a_compiled_step(kind, late):
    """They come after the copy and, if registered after it, after l2: told where that matters."""

    def run(compiled):
        torch._dynamo.reset()
        model = small()
        rate = 0.3 if kind in ("closed", "exact") else 0.0
        if kind == "wd read":
            optimizer = timm.optim.create_optimizer_v2(model, "lars", lr=0.5, weight_decay=0)
        else:
            momentum = 0 if kind == "closed" else 0.9
            optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum, weight_decay=rate)

        def clip(*_):
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=False)

        if not late and compiled:
            optimizer.register_step_pre_hook(clip)
        if not rate:
            WeightDecay(model, optimizer, kind[:2], rate=0.3)
        probe = OpposingPenaltyProbe(model, optimizer)
        if late and compiled:
            optimizer.register_step_pre_hook(clip)
        step_it = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(3):
                loss_of(model, step).backward()
                if not compiled:
                    clip()
                step_it()
                optimizer.zero_grad()
        told = sorted(str(w.message) for w in caught if w.category is WdProbeWarning)
        return list(model.parameters()), probe.records, told

    (weights, records, told), (plain, expected, silent) = run(True), run(False)
    added = "a compiled step calls hooks registered after l2 when it has added to the gradients"
    copied = "a compiled step calls other hooks after R_op's copy of it has stepped"
    says = {"exact": [copied], "l2": [added, copied] if late else [copied]}.get(kind, [])
    assert [line.partition(":")[0] for line in told] == says
    assert silent == []
    assert (records == expected) == (not says)
    is_same = all(map(torch.equal, weights, plain))
    assert is_same == (added not in says)


def test_a_group_that_has_gone_between_measured_steps_ends_no_compiled_one():
    torch._dynamo.reset()
    model = small()
    first, *others = model.parameters()
    groups = [{"params": [first]}, {"params": others}]
    optimizer = torch.optim.SGD(groups, 0.5, weight_decay=0.3)
    probe = OpposingPenaltyProbe(model, optimizer, every=2)
    optimizer.register_step_pre_hook(lambda *_: None)
    train(model, optimizer, 1)
    del optimizer.param_groups[1]
    before = first.detach().clone()
    loss_of(model, 1).backward()
    torch.compile(optimizer.step, backend="eager")()
    assert len(probe.records) == 1
    assert not torch.equal(first, before)


@pytest.mark.filterwarnings("ignore:R_op is not measured while a learning rate is negative")
@pytest.mark.parametrize("lr", [0.0, -LR, math.nan, math.inf])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_learning_rate_that_tells_nothing_spoils_its_own_steps_alone(lr, kind):
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), kind(LR), weight_decay=RATE, foreach=False)
    probe = OpposingPenaltyProbe(model, optimizer)
    train(model, optimizer, 3)
    before = probe.total
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = kind(lr)
    train(model, optimizer, 1)
    assert math.isnan(probe.records[-1].rate)
    assert math.isnan(probe.records[-1].mass)
    assert (probe.total.rate, probe.total.mass) == (before.rate, before.mass)
    with torch.no_grad():
        for p, was in zip(model.parameters(), weights, strict=True):
            p.copy_(was)
    optimizer.param_groups[0]["lr"] = kind(LR)
    train(model, optimizer, 1)
    assert probe.records[-1].penalized == 212
    assert probe.total.penalized == before.penalized + 212
    assert 0 <= probe.total.mass <= 1
