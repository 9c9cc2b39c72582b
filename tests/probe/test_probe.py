import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

from tests.small import LR, RATE, Oracle, adamw, loss_of, small, train
from wd_probe import (
    InputError,
    OpposingPenaltyProbe,
    WdProbeWarning,
    WeightDecay,
)
from wd_probe.layering import Layer, Layers
from wd_probe.probe.records import pooled


def test_bad_input():
    model, other = small(), small()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(InputError, match="unknown keep 'some'; choose from whole, signs"):
        OpposingPenaltyProbe(model, optimizer, keep="some")
    with pytest.raises(InputError, match="unknown reading 'free'; choose from paired, literal"):
        OpposingPenaltyProbe(model, optimizer, reading="free")
    with pytest.raises(InputError, match="every must be at least 1, got 0"):
        OpposingPenaltyProbe(model, optimizer, every=0)
    with pytest.raises(InputError, match="holds none of the model's parameters"):
        OpposingPenaltyProbe(other, optimizer)
    with pytest.raises(InputError, match="LBFGS moves the weights several times"):
        OpposingPenaltyProbe(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(InputError, match="the list of optimizers is empty"):
        OpposingPenaltyProbe(model, [])
    with pytest.raises(InputError, match="an optimizer is given twice"):
        OpposingPenaltyProbe(model, [optimizer, optimizer])
    with pytest.raises(InputError, match=r"a torch\.optim\.Optimizer is needed, got str"):
        OpposingPenaltyProbe(model, ["adamw"])
    with pytest.raises(InputError, match=r"a torch\.nn\.Module is needed, got list"):
        OpposingPenaltyProbe([model], optimizer)


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


@pytest.mark.parametrize("method", ["own", "wd", "lpwd"])
def test_parameters_that_join_later_are_measured_and_decayed(method):
    model = small()
    make = adamw if method == "own" else lambda ps: torch.optim.AdamW(ps, lr=LR, weight_decay=0)
    optimizer = make(model.parameters())
    if method != "own":
        WeightDecay(model, optimizer, method, rate=RATE)
    probe = OpposingPenaltyProbe(model, optimizer)
    train(model, optimizer, 2)
    model.append(nn.Linear(4, 4))
    optimizer.add_param_group({"params": model[3].parameters()})
    train(model, optimizer, 2)
    assert [record.penalized for record in probe.records] == [212, 212, 232, 232]
    assert [layer.name for layer in probe.records[-1].layers] == ["0", "2", "3"]
    assert [layer.name for layer in probe.records[0].layers] == ["0", "2"]
    assert probe.total.tensors["3.weight"].penalized == 2 * 16
    assert probe.total.penalized == sum(record.penalized for record in probe.records)


def test_replaced_parameters_are_let_go_and_their_sums_go_on():
    """As where a model is densified: other tensors, of other shapes, under the same names."""
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    alive = []
    for wide in (16, 20, 24, 28):
        if wide > 16:
            model[0], model[2] = nn.Linear(8, wide), nn.Linear(wide, 4)
            optimizer.state.clear()
            optimizer.param_groups[0]["params"] = list(model.parameters())
        alive.append(weakref.ref(model[0].weight))
        train(model, optimizer, 2)
    gc.collect()
    assert [one() is None for one in alive] == [True, True, True, False]
    names = tuple(name for name, _ in model.named_parameters())
    assert probe.names == names
    assert dict(probe.named_parameters()) == dict(model.named_parameters())
    assert [r.penalized for r in probe.records] == [
        13 * w + 4 for w in (16, 20, 24, 28) for _ in "ab"
    ]
    assert probe.total.penalized == sum(t.penalized for t in probe.total.tensors.values())
    assert probe.total.penalized == sum(r.penalized for r in probe.records)
    again = OpposingPenaltyProbe(model, optimizer)
    again.load_state_dict(probe.state_dict())
    assert again.total == probe.total


def test_strangers_are_told_once():
    model, other = small(), nn.Linear(2, 2)
    optimizer = adamw([*model.parameters(), *other.parameters()])
    probe = OpposingPenaltyProbe(model, optimizer)
    with pytest.warns(
        WdProbeWarning, match="AdamW steps 2 parameters that are none of the"
    ) as told:
        train(model, optimizer, 3)
    assert len(told) == 1
    assert len(probe.records) == 3


def test_layers_of_ones_own_need_not_hold_everything():
    model = small()
    groups = Layers([Layer(1, "first", ("0.weight", "0.bias"))], "registration")
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer, groups=groups)
    train(model, optimizer, 1)
    assert probe.records[0].penalized == 212
    assert [layer.penalized for layer in probe.records[0].layers] == [144]


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
        train(model, optimizer, 5, oracle.before, oracle.after)
    oracle.agrees_with(probe.records)


class Rounding(torch.optim.SGD):
    """Steps whole numbers by whole numbers."""

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        for p in group["params"]:
            if p.grad is not None and p.is_floating_point():
                p.copy_((1 - group["lr"] * group["weight_decay"]) * p - group["lr"] * p.grad)
            elif p.grad is not None:
                p.sub_(p.grad)


def test_weights_of_whole_numbers_are_left_out():
    model = small()
    model[0].register_parameter("whole", nn.Parameter(torch.ones(4).to(torch.int8), False))
    whole = model[0].whole
    optimizer = Rounding(model.parameters(), lr=LR, weight_decay=RATE)
    probe = OpposingPenaltyProbe(model, optimizer)
    oracle = Oracle((name, p) for name, p in model.named_parameters() if p.is_floating_point())

    def before():
        whole.grad = torch.ones_like(whole)
        oracle.before()

    train(model, optimizer, 2, before, oracle.after)
    oracle.agrees_with(probe.records)


def test_weights_that_are_yet_to_be_made_are_refused():
    lazy, empty = nn.Sequential(nn.LazyLinear(2)), nn.Linear(2, 2, device="meta")
    with pytest.raises(InputError, match=r"^0\.weight has no shape yet: run a batch through"):
        OpposingPenaltyProbe(lazy, adamw(lazy.parameters()))
    with pytest.raises(InputError, match=r"^weight is on the meta device, without numbers: load"):
        OpposingPenaltyProbe(empty, adamw(empty.parameters()))


def test_a_measuring_that_fails_does_not_end_the_training(monkeypatch):
    model, untouched = small(), small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)

    def full(*_):
        raise MemoryError("no memory for the counts")

    monkeypatch.setattr("wd_probe.probe.copies.kernel.Kept", full)
    with pytest.warns(
        WdProbeWarning, match=r"R_op of step 1 is not measured: no memory for the counts"
    ) as told:
        train(model, optimizer, 3)
    assert told[0].filename == train.__code__.co_filename
    monkeypatch.undo()
    train(model, optimizer, 1)
    assert [record.step for record in probe.records] == [4]
    train(untouched, plain := adamw(untouched.parameters()), 3)
    train(untouched, plain, 1)
    assert all(map(torch.equal, model.parameters(), untouched.parameters()))


def test_a_copied_or_pickled_probe_holds_what_was_measured():
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer, profile=[0.1])
    train(model, optimizer, 3)
    for other in (copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))):
        train(model, optimizer, 1)
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
    train(model, optimizer, 2)
    assert repr(probe) == "OpposingPenaltyProbe(SGD, steps=2, rate=0)"


def test_loading_an_optimizers_state_keeps_the_probe():
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    train(model, optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2)
    assert len(probe.records) == 4


def test_a_dropped_probe_frees_model_and_optimizer():
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    train(model, optimizer, 2)
    seen = weakref.ref(model), weakref.ref(optimizer), weakref.ref(probe)
    del model, optimizer, probe
    gc.collect()
    assert [ref() for ref in seen] == [None, None, None]


@pytest.mark.parametrize(("groups", "got"), [("conv1", "str"), (5, "int"), ([1], "int")])
def test_metrics_of_what_are_no_layers_are_refused(groups, got):
    model = small()
    probe = OpposingPenaltyProbe(model, adamw(model.parameters()))
    told = rf"^groups: a layer, as of wd_probe.layers\(model\), is needed, got {got}$"
    with pytest.raises(InputError, match=told):
        probe.metrics(groups=groups)


def test_metrics_are_of_the_steps_since_the_last_call():
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    assert probe.metrics() == {}
    train(model, optimizer, 3)
    first = probe.metrics(peek=True)
    assert first == probe.metrics()
    assert probe.metrics() == {}
    assert first["R_op/rate"] == probe.total.rate
    assert first["decay/balance"] == probe.total.balance
    train(model, optimizer, 2)
    found, late = probe.metrics(groups=probe.layers), pooled(r.total for r in probe.records[3:])
    assert {name for name in found if name.count("/") == 1} == set(first)
    assert found["R_op/mass"] == pytest.approx(late.mass)
    assert found["decay/balance"] == pytest.approx(late.balance)
    assert found["decay/remaining"] == probe.total.remaining == probe.records[-1].remaining
    assert found["decay/norm"] == probe.records[-1].norm
    layer = [r.layers[1] for r in probe.records[3:]]
    assert found["decay/angular_update/02 2"] == pytest.approx(pooled(layer).angular_update)
    assert all(isinstance(value, float) for value in found.values())
    again = OpposingPenaltyProbe(model, optimizer)
    again.load_state_dict(probe.state_dict())
    assert again.metrics() == {}


def test_optimizers_that_join_and_leave():
    """Those over the same weights make rounds of their own, others one together."""
    model = small()
    halves = [adamw(model[k].parameters()) for k in (0, 2)]
    probe = OpposingPenaltyProbe(model, halves[0])
    probe.join(halves[1])
    oracle = Oracle(model.named_parameters())

    def step(*optimizers):
        loss_of(model, len(oracle.steps)).backward()
        oracle.before()
        for one in optimizers:
            one.step()
        oracle.after()
        model.zero_grad()

    for _ in range(3):
        step(*halves)
    whole = adamw(model.parameters())
    probe.join(whole)
    for one in halves:
        probe.leave(one)
    for _ in range(3):
        step(whole)
    assert probe.optimizers == (whole,)
    assert not halves[0]._optimizer_step_pre_hooks
    oracle.agrees_with(probe.records)
