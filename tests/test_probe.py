import copy
import math
import warnings

import pytest
import timm
import timm.optim
import torch
from torch import nn
from torch.nn import functional as F

from tests import reference
from wd_probe import InputError, OpposingPenaltyProbe, WdProbeWarning, WeightDecay
from wd_probe.decay import attached


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(32, 8, generator=generator).to(dtype)
    return images, torch.randint(0, 4, (32,), generator=generator)


def train(model, optimizer, steps, before=lambda: None, after=lambda: None):
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        images, labels = batch(step, dtype)
        F.cross_entropy(model(images).float(), labels).backward()
        before()
        optimizer.step()
        after()
        optimizer.zero_grad()


def oracle(model, optimizer, factors, steps):
    """Train while counting every step with the float64 oracle: one dict per step and tensor."""
    found, kept = [], {}

    def before():
        kept.clear()
        kept.update({name: p.detach().clone() for name, p in model.named_parameters()})

    def after():
        found.append(
            {
                name: reference.tally(kept[name], p.detach(), factors(name))
                for name, p in model.named_parameters()
            }
        )

    train(model, optimizer, steps, before, after)
    return found


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
TIMM = ["adamw", "nadamw", "lion", "adabelief", "adafactorbv", "mars", "muon", "radamw", "sgdw"]


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_steps_agree_with_the_oracle_on_every_weight(name, dtype):
    if name == "tensor-lr" and dtype is torch.bfloat16:
        pytest.skip("torch's foreach AdamW does not mix a float32 tensor rate with bfloat16")
    model = small(dtype)
    optimizer = TORCH[name](model.parameters())
    with OpposingPenaltyProbe(model, optimizer) as probe:
        expected = oracle(model, optimizer, lambda _: 0.05 * 0.3, 12)
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
    if name not in timm.optim.list_optimizers():
        pytest.skip(f"this timm has no {name}")
    model = small()
    optimizer = timm.optim.create_optimizer_v2(
        model, name, lr=0.1, weight_decay=0.3, filter_bias_and_bn=False
    )
    with OpposingPenaltyProbe(model, optimizer) as probe:
        expected = oracle(model, optimizer, lambda _: 0.1 * 0.3, 8)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [record.total.opposing for record in probe.records] == counts
    assert sum(counts) > 0


def test_muon_where_torch_has_it():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.05, weight_decay=0.3)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        expected = oracle(model, optimizer, lambda _: 0.05 * 0.3, 8)
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
        expected = oracle(model, optimizer, lambda _: c, 10)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [record.total.opposing for record in probe.records] == counts
    assert sum(counts) > 0


@pytest.mark.parametrize("name", [*TORCH, "sgd-wd"])
def test_weights_are_bit_identical_with_the_probe_on_or_off(name):
    def run(probed):
        model = small()
        if name == "sgd-wd":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            WeightDecay(model, optimizer, "wd", rate=0.1)
        else:
            optimizer = TORCH[name](model.parameters())
        if probed:
            probe = OpposingPenaltyProbe(model, optimizer, profile=[0.1, 1.0])
            keys = set(probe.optimizer.state)
            assert not keys
        drawn = torch.rand(3)
        train(model, optimizer, 6)
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


def test_every_and_drain_and_layers():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    probe = OpposingPenaltyProbe(model, optimizer, every=3)
    train(model, optimizer, 7)
    assert [r.step for r in probe.drain()] == [1, 4, 7]
    assert probe.records == ()
    train(model, optimizer, 3)
    record = probe.records[0]
    assert record.step == 10
    assert [(t.index, t.name) for t in record.layers] == [(1, "0"), (2, "2")]
    assert sum(t.penalized for t in record.layers) == record.penalized
    assert sum(t.opposing for t in record.layers) == record.total.opposing
    probe.close()
    probe.close()
    train(model, optimizer, 3)
    assert [r.step for r in probe.records] == [10]
    assert not optimizer._optimizer_step_pre_hooks


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        model(torch.ones(1, 6)).sum().backward()
        optimizer.step()
    assert probe.records[0].penalized == 36


L2 = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.1, weight_decay=0.01),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=0.1, weight_decay=0.01),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.1, weight_decay=0.01),
}


@pytest.mark.parametrize("kind", L2)
def test_l2_is_said_in_one_line_and_nothing_false_is_measured(kind):
    model = small()
    optimizer = L2[kind](model.parameters())
    with pytest.warns(WdProbeWarning, match="L2 regularization") as told:
        probe = OpposingPenaltyProbe(model, optimizer)
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    train(model, optimizer, 2)
    assert all(math.isnan(r.rate) and r.penalized == 0 for r in probe.records)


def test_l2_of_plain_sgd_is_decoupled_decay_and_is_measured():
    """Without momentum η(g + λθ) = ηg + ηλθ: the one case where the two are the same."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        expected = oracle(model, optimizer, lambda _: 0.05, 5)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [record.total.opposing for record in probe.records] == counts


@pytest.mark.parametrize(
    ("opt", "why"),
    [
        ("laprop", "decays after the update"),
        ("lamb", "is not known"),
        ("sgdp", "is not known"),
        ("adamp", "is not known"),
        ("adamc", "is not known"),  # c = η²λ/η_max
    ],
)
def test_rules_that_are_not_the_papers_wd(opt, why):
    model = small()
    optimizer = timm.optim.create_optimizer_v2(
        model, opt, lr=0.1, weight_decay=0.01, filter_bias_and_bn=False
    )
    with pytest.warns(WdProbeWarning, match=why):
        OpposingPenaltyProbe(model, optimizer)


def test_no_decay_at_all_is_said():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    with pytest.warns(WdProbeWarning, match="nothing is penalized, so R_op is undefined"):
        OpposingPenaltyProbe(model, optimizer)


def test_bad_input():
    model, other = small(), small()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(InputError, match="every must be at least 1, got 0"):
        OpposingPenaltyProbe(model, optimizer, every=0)
    with pytest.raises(InputError, match="holds none of the model's parameters"):
        OpposingPenaltyProbe(other, optimizer)
    with pytest.raises(InputError, match="LBFGS moves the weights several times"):
        OpposingPenaltyProbe(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(InputError, match=r"a torch\.optim\.Optimizer is needed, got list"):
        OpposingPenaltyProbe(model, [])


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
        expected = oracle(model, optimizer, lambda _: 0.015, 3)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [r.total.opposing for r in probe.records][1:] == counts
    assert [r.step for r in probe.records] == [1, 2, 3, 4]


def test_a_subclass_that_calls_super_is_measured_and_decayed_once():
    class Louder(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = small()
    twin = copy.deepcopy(model)
    optimizer, plain = (
        kind(m.parameters(), lr=0.1, momentum=0.9)
        for kind, m in ((Louder, model), (torch.optim.SGD, twin))
    )
    WeightDecay(model, optimizer, "wd", rate=0.3)
    WeightDecay(twin, plain, "wd", rate=0.3)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        train(model, optimizer, 4)
    train(twin, plain, 4)
    assert [r.step for r in probe.records] == [1, 2, 3, 4]
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


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
    expected = oracle(model, optimizer, lambda _: 0.05, 6)
    counts = [sum(t["opposing"] for t in tensors.values()) for tensors in expected]
    assert [r.total.opposing for r in probe.records] == counts


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


def test_nan_weights_are_named():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        images, labels = batch(0)
        F.cross_entropy(model(images), labels).backward()
        model[2].bias.grad.fill_(math.nan)
        optimizer.step()
    assert probe.records[0].nonfinite == 4
    assert probe.records[0].penalized == sum(p.numel() for p in model.parameters()) - 4


def test_profile_of_a_live_run():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    with OpposingPenaltyProbe(model, optimizer, profile=[0.3, 3.0, 20.0], profile_every=2) as probe:
        train(model, optimizer, 6)
    assert [p.step for p in probe.profiles] == [1, 3, 5]
    for profile in probe.profiles:
        record = probe.records[profile.step - 1]
        assert abs(profile.opposing[0] - record.total.opposing) <= 1
        assert list(profile.opposing) == sorted(profile.opposing)
        assert profile.penalized == record.penalized


def test_deepcopy_of_an_optimizer_is_not_attached():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = WeightDecay(model, optimizer, "wd", rate=0.1)
    assert attached(optimizer) is decay
    assert attached(copy.deepcopy(optimizer)) is None
    decay.detach()
    assert attached(optimizer) is None
