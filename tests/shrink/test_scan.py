import contextlib
import copy
import math

import pytest
import timm
import torch
from torch import nn

from wd_probe import (
    InputError,
    WdProbeWarning,
    feature_distortion,
    half_life,
    layers,
    zero_shot_decay,
)
from wd_probe.shrink.scan import ScanPoint, Shrunk


def relu_network(bias=False):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32, bias=bias), nn.ReLU(), nn.Linear(32, 32, bias=bias), nn.ReLU(),
        nn.Linear(32, 4, bias=bias),
    )  # fmt: skip


def test_scales_are_eq_12_always_from_the_originals():
    """Fact 15."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    originals = [p.detach().clone() for p in model.parameters()]
    step = iter(range(101))

    def evaluate(m):
        scale = 1 - next(step) / 100
        for p, kept in zip(m.parameters(), originals, strict=True):
            assert torch.equal(p, kept * scale)
        assert torch.equal(m[1].running_var, before["1.running_var"])
        assert not m.training
        return {"scale": scale}

    curve = zero_shot_decay(model, evaluate)
    assert [p.step for p in curve] == list(range(101))
    assert [p.scale for p in curve] == [1 - s / 100 for s in range(101)]
    assert (curve[0].scale, curve[-1].scale) == (1, 0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_back_after_an_exception(error):
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3))
    model[0].eval()
    model[2].weight.requires_grad_(False)
    ids = [id(p) for p in model.parameters()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []

    def evaluate(_):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return {}

    with pytest.raises(error):
        zero_shot_decay(model, evaluate)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    assert [id(p) for p in model.parameters()] == ids


class Merging(nn.Linear):
    """A LoRA layer: in evaluation the low-rank part is merged into the weight."""

    def __init__(self, size, way):
        super().__init__(size, size)
        self.way, self.merged, self.merges = way, False, 0
        self.up, self.down = nn.Parameter(torch.randn(size, 1)), nn.Parameter(torch.randn(1, size))
        self.register_buffer("delta", torch.zeros(size, size))

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.merged, sign = not mode, -1 if mode else 1
            self.merges += 1
            delta = sign * (self.up @ self.down).detach()
            if self.way == "data":
                self.weight.data += delta
            elif self.way == "in place":
                with torch.no_grad():
                    self.weight += delta
            elif self.way == "buffer":
                self.delta += delta
            else:
                self.weight = nn.Parameter(self.weight.detach() + delta)
        return self

    def forward(self, x):
        weight = self.weight + self.delta
        return nn.functional.linear(x, weight if self.merged else weight + self.up @ self.down)


WAYS = ("data", "in place", "buffer", "another parameter")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fails", [False, True])
def test_layers_that_merge_in_evaluation_are_scaled_as_they_stand_there(way, fails):
    torch.manual_seed(0)
    model = nn.Sequential(Merging(5, way), nn.BatchNorm1d(5), nn.Linear(5, 2))
    model[1].eval()
    images = torch.randn(7, 5)
    twin = copy.deepcopy(model).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def evaluate(m):
        if fails:
            raise KeyboardInterrupt
        return {"top1": m(images).detach()[0, 0].abs().item()}

    with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext():
        curve = zero_shot_decay(model, evaluate, 4)
        assert curve[0].metrics["top1"] == twin(images).detach()[0, 0].abs().item()
        assert curve[-1].metrics["top1"] == 0
        assert 0 < half_life(model, evaluate, curve) < 1
        found = feature_distortion(model, [images], [1.0])
        assert [one.distortion for one in found] == [0, 0, 0]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not model[0].merged
    assert model[0].merges == (2 if fails else 6)  # once there and once back, for each scan


def test_what_is_merged_already_stays_so():
    model = nn.Sequential(Merging(5, "data")).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    zero_shot_decay(model, lambda m: {}, 2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (model[0].merged, model[0].merges) == (True, 1)


class Frozen(nn.BatchNorm1d):
    """Stays in evaluation, whatever is asked."""

    def train(self, mode=True):
        return super().train(False)


def test_modules_that_choose_their_own_mode_keep_it():
    model = nn.Sequential(nn.Linear(3, 3), Frozen(3), nn.Dropout()).train()
    model[2].eval()
    zero_shot_decay(model, lambda m: {}, 2)
    assert [m.training for m in model.modules()] == [True, True, False, False]


def test_a_homogeneous_network_keeps_its_answers_until_zero():
    """Fact 16: without biases and norms the logits scale by (1 − s/100)^depth."""
    model, images = relu_network(), torch.randn(64, 8)
    whole = model(images).detach()

    def evaluate(m):
        logits = m(images)
        return {
            "agreement": (logits.argmax(1) == whole.argmax(1)).float().mean().item(),
            "ratio": (logits.norm() / whole.norm()).item(),
            "spread": (logits.max() - logits.min()).item(),
        }

    curve = zero_shot_decay(model, evaluate)
    for point in curve[:-1]:
        assert point.metrics["agreement"] == 1
        assert point.metrics["ratio"] == pytest.approx(point.scale**3, rel=1e-4)
    assert curve[-1].metrics["spread"] == 0


def test_a_network_with_biases_does_not():
    model, images = relu_network(bias=True), torch.randn(64, 8)
    whole = model(images).argmax(1)
    curve = zero_shot_decay(
        model, lambda m: {"a": (m(images).argmax(1) == whole).float().mean().item()}, steps=20
    )
    assert min(p.metrics["a"] for p in curve[:-1]) < 1


def test_chosen_parameters_alone_are_scaled():
    model = relu_network()
    kept = model[0].weight.clone()

    def evaluate(m):
        assert torch.equal(m[0].weight, kept)
        return {"size": m[4].weight.abs().sum().item()}

    curve = zero_shot_decay(model, evaluate, steps=2, parameters=["4.weight"])
    assert curve[1].metrics["size"] == pytest.approx(curve[0].metrics["size"] / 2)


def test_half_life_is_refined_by_bisection():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    evaluations = []

    def evaluate(m):
        scale = m.weight.item()
        evaluations.append(scale)
        return {"top1": 0.1 + 0.8 * (scale > 0.7312)}

    curve = zero_shot_decay(model, evaluate, steps=10)
    evaluations.clear()
    found = half_life(model, evaluate, curve, chance=0.1)
    assert found == pytest.approx(0.7312, abs=1e-4)
    assert len(evaluations) <= 12
    assert model.weight.item() == 1
    assert half_life(model, evaluate, curve, chance=0.1, tolerance=0) == pytest.approx(0.7312)


def test_metrics_that_are_none():
    model = relu_network()
    with pytest.raises(InputError, match=r"evaluate must give metrics by name, .* and gave float"):
        zero_shot_decay(model, lambda _: 1.0, steps=2)
    curve = zero_shot_decay(model, lambda _: {"accuracy": 1.0, "loss": 0.0}, steps=2)
    with pytest.raises(InputError, match=r"has no metric 'top1'; it has accuracy, loss"):
        half_life(model, lambda _: {}, curve)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.1, 0.1, 0.1], math.nan), ([0.9, 0.9, 0.9], math.nan), ([0.9, math.nan, 0.1], 0.75)],
)
def test_half_life_where_there_is_none_or_a_gap(values, expected):
    curve = [ScanPoint(s, 1 - s / 2, {"top1": v}) for s, v in enumerate(values)]
    model = nn.Linear(1, 1)
    found = half_life(model, lambda _: {"top1": math.nan}, curve, chance=0.1, tolerance=0.6)
    assert found == pytest.approx(expected, nan_ok=True)


def test_peak_memory_is_one_copy_of_the_scaled_parameters():
    model = relu_network()
    with Shrunk(model) as shrunk:
        shrunk.to(0.5)
        kept = sum(t.numel() for t in shrunk._kept)
    assert kept == sum(p.numel() for p in model.parameters())
    with Shrunk(model, ["0.weight"]) as shrunk:
        assert sum(t.numel() for t in shrunk._kept) == model[0].weight.numel()
    assert shrunk._kept == []


def test_bad_input():
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        zero_shot_decay(relu_network(), lambda _: {}, steps=0)
    with pytest.raises(InputError, match="ReLU has no parameters to decay"):
        zero_shot_decay(nn.ReLU(), lambda _: {})
    with pytest.raises(InputError, match="the model has no parameter named 'head'"):
        zero_shot_decay(relu_network(), lambda _: {}, parameters=["head"])
    with pytest.raises(InputError, match="at least one scale"):
        feature_distortion(relu_network(), [], [])
    with pytest.raises(InputError, match="was given no images"):
        feature_distortion(relu_network(), [], [0.5])


class Quantized(nn.Module):
    """A layer whose weights are whole numbers, times a scale of each output."""

    def __init__(self, dtype):
        super().__init__()
        whole = torch.randint(-5, 6, (4, 8), generator=torch.Generator().manual_seed(0))
        self.whole = nn.Parameter(whole.to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x):
        return x @ (self.whole.float() * self.scale[:, None]).T


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_whole_numbers_are_left_alone_and_told(dtype):
    model = Quantized(dtype)
    kept = copy.deepcopy(model.state_dict())
    seen = []
    told = r"^1 parameter of whole numbers \('whole' first\) cannot be scaled, and is left alone$"
    with pytest.warns(WdProbeWarning, match=told):
        zero_shot_decay(model, lambda m: seen.append(copy.deepcopy(m.state_dict())) or {}, 2)
    assert [state["scale"][0].item() for state in seen] == [0.5, 0.25, 0]
    assert all(torch.equal(state["whole"], kept["whole"]) for state in seen)
    assert torch.equal(model.scale, kept["scale"])
    with pytest.raises(InputError, match="Quantized has no parameters to decay"):
        Shrunk(model, ["whole"])


def test_numbers_of_8_bits_are_scaled():
    model = Quantized(torch.float8_e4m3fn)
    kept = model.whole.float()
    with Shrunk(model) as shrunk:
        shrunk.to(0.5)
        assert torch.equal(model.whole.float(), kept / 2)
    assert torch.equal(model.whole.float(), kept)


@pytest.mark.parametrize("part", [0, 2, None])
def test_weights_made_in_inference_mode_are_scaled_and_come_back(part):
    with torch.inference_mode():
        model = relu_network()
    if part is not None:  # the others are ordinary
        inner, model = model[part], relu_network()
        model[part] = inner
    kept = copy.deepcopy(model.state_dict())
    images = torch.rand(2, 8)
    curve = zero_shot_decay(model, lambda m: {"size": m[0].weight.detach().abs().sum().item()}, 2)
    first = curve[0].metrics["size"]
    assert [point.metrics["size"] for point in curve] == pytest.approx([first, first / 2, 0])
    assert feature_distortion(model, [images], [0.5])[0].norm_ratio == pytest.approx(0.5)
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())
    assert model.training


def test_scans_whatever_torch_makes_by_default():
    model, images = relu_network(bias=True), torch.rand(4, 8)
    plain = feature_distortion(model, [images], [0.5])
    with torch.device("meta"):
        assert feature_distortion(model, [images], [0.5]) == plain


def test_weights_that_are_yet_to_be_made():
    with pytest.raises(InputError, match=r"^0\.weight has no shape yet: run a batch through"):
        zero_shot_decay(nn.Sequential(nn.LazyLinear(2)), lambda _: {})
    with pytest.raises(InputError, match=r"^weight is on the meta device, without numbers: load"):
        feature_distortion(nn.Linear(2, 2, device="meta"), [torch.rand(2, 2)], [0.5])


def test_a_positively_homogeneous_network_is_not_distorted():
    """Fact 19."""
    model, images = relu_network(), [torch.randn(16, 8), torch.randn(16, 8)]
    for found in feature_distortion(model, images, [0.9, 0.5]):
        assert found.distortion == pytest.approx(0, abs=1e-10)
        assert found.norm_ratio == pytest.approx(found.scale**found.index, rel=1e-5)


def test_distortion_agrees_with_two_plain_passes():
    model, images = relu_network(bias=True), torch.randn(16, 8)
    model[1] = nn.GELU()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def first_two():
        hidden = model[0](images)
        return hidden, model[2](model[1](hidden)), model(images)

    whole = first_two()
    with Shrunk(model) as shrunk:
        shrunk.to(0.7)
        decayed = first_two()
    found = feature_distortion(model, [images[:5], images[5:]], [0.7])
    assert [(f.index, f.name) for f in found] == [(1, "0"), (2, "2"), (3, "4")]
    for f, a, b in zip(found, whole, decayed, strict=True):
        a, b = a.detach().double().flatten(), b.detach().double().flatten()
        assert f.distortion == pytest.approx(1 - (a @ b).item() ** 2 / (a @ a * (b @ b)).item())
        assert f.norm_ratio == pytest.approx((b.norm() / a.norm()).item())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_every_layer_of_timm_models_has_an_output_in_one_pass_a_scale():
    for name in ("test_convnext", "test_vit", "test_resnet"):
        model = timm.create_model(name)
        passes = []
        handle = model.register_forward_pre_hook(lambda *_: passes.append(1))  # noqa: B023
        found = feature_distortion(torch.compile(model), [torch.randn(2, 3, 160, 160)], [0.9, 0])
        handle.remove()
        assert len(passes) == 3
        assert [f.index for f in found[: len(found) // 2]] == [x.index for x in layers(model)]
        assert all(0 <= f.distortion < 1 for f in found if f.scale)


def test_a_scan_is_printed_as_a_table():
    curve = zero_shot_decay(nn.Linear(2, 2), lambda _: {"top1": 0.5, "<loss>": math.nan}, steps=100)
    lines = [line.split() for line in str(curve).splitlines()]
    assert lines[0] == ["scale", "top-1", "<loss>"]
    assert lines[1] == ["1.00", "50.0", "%", "–"]
    assert [line[0] for line in lines[1:4]] == ["1.00", "0.99", "0.98"]
    assert len(lines) == 11
    assert "&lt;loss&gt;" in curve._repr_html_()
    odd = zero_shot_decay(nn.Linear(2, 2), lambda _: {"loss": 1}, steps=30)
    assert str(odd).split()[2:10:2] == ["1.00", "0.97", "0.93", "0.90"]
    few = zero_shot_decay(nn.Linear(2, 2), lambda _: {"loss": 1}, steps=3)
    assert [line.split()[0] for line in str(few).splitlines()] == [
        "scale",
        "1.00",
        "0.67",
        "0.33",
        "0.00",
    ]
    assert copy.deepcopy(few) == few == tuple(few)
