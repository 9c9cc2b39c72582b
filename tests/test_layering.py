import warnings
from collections import Counter

import pytest
import timm
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.swa_utils import AveragedModel

import wd_probe
from wd_probe import InputError, layers, layerwise_rates, zero_shot_decay
from wd_probe.layering import (
    chosen_parameters,
    clean_name,
    decayed_parameters,
    named_parameters,
    unwrap,
)


def on_meta(name, **options):
    """Or on the CPU, where an older timm reads numbers as it builds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return timm.create_model(name, **options)
        except RuntimeError:
            return timm.create_model(name, **options)


def check(model):
    found = layers(model)
    placed = Counter(name for layer in found for name in layer.parameters)
    assert placed == Counter(name for name, _ in model.named_parameters())
    assert [layer.index for layer in found] == list(range(1, len(found) + 1))
    assert len({layer.name for layer in found}) == len(found)
    return found


def test_convnext_tiny_has_20_fine_and_6_coarse_layers():
    model = on_meta("convnext_tiny")
    found = check(model)
    assert (len(found), found.definition) == (20, "timm")
    assert found[0].name == "stem"
    assert found[4].name == "stages.1.{downsample,blocks.0}"
    assert found[-1].parameters == (
        "head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias",
    )  # fmt: skip
    assert [layer.name for layer in layers(model, coarse=True)] == [
        "stem", "stages.0", "stages.1", "stages.2", "stages.3", "head",
    ]  # fmt: skip


FAMILIES = [
    "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18", "efficientnet_b0",
    "mobilenetv3_small_050", "regnetx_002", "mixer_s32_224", "deit3_small_patch16_224",
    "convmixer_768_32", "densenet121", "vgg11", "maxvit_rmlp_pico_rw_256", "levit_128",
    "hrnet_w18_small", "eva02_tiny_patch14_224", "test_convnext", "test_vit", "nfnet_f0",
]  # fmt: skip
UNGROUPED = ["caformer_s18", "convformer_s18", "csatv2", "mobilenetv5_300m_enc", "pit_ti_224",
             "poolformer_s12", "poolformerv2_s12"]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_timm_groups(name):
    assert check(on_meta(name)).definition == "timm"


def test_bare_parameters_come_first():
    found = check(on_meta("pit_ti_224"))
    assert (found.definition, found[0].name) == ("forward", "pos_embed,cls_token")


@pytest.mark.parametrize("name", [n for n in UNGROUPED if n != "pit_ti_224" and timm.is_model(n)])
def test_families_without_a_grouping_come_in_the_order_of_the_forward_pass(name):
    found = check(on_meta(name))
    assert found.definition == "forward"
    assert any(word in found[0].name for word in ("stem", "patch_embed", "conv"))


@pytest.mark.slow
def test_census_every_timm_model_has_its_layers():
    definitions = Counter()
    own = [n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("timm.")]
    for name in own:  # and none that a test has registered
        definitions[check(on_meta(name)).definition] += 1
    print(definitions)
    assert set(definitions) == {"timm", "forward"}
    assert definitions["forward"] < 0.05 * definitions.total()


class Backwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.first = nn.Linear(3, 4)
        self.never = nn.Linear(1, 1)
        self.shift = nn.Parameter(torch.zeros(3))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.last(self.norm(self.first(x + self.shift)))


def test_any_module_by_its_forward_pass_which_is_not_run():
    model = Backwards()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    found = check(model)
    assert found.definition == "registration"
    found = layers(model, torch.randn(2, 3))
    torch.randn(2, 3)
    assert found.definition == "forward"
    assert [layer.name for layer in found] == ["shift", "first", "norm", "last", "never"]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not torch.equal(state, torch.get_rng_state())  # only the two randn calls drew


def test_a_model_that_cannot_run_weightless_falls_back():
    class Stubborn(Backwards):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else x

    found = layers(Stubborn(), torch.randn(2, 3))
    assert found.definition == "registration"


def test_wrappers_and_their_prefixes_are_seen_through():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compiled = torch.compile(model)
    parallel = nn.DataParallel(model)
    for wrapped in (compiled, parallel, torch.compile(parallel), nn.DataParallel(compiled),
                    AveragedModel(model)):  # fmt: skip
        assert [name for name, _ in named_parameters(wrapped)] == list(model.state_dict())
        assert layers(wrapped) == layers(model)
    assert unwrap(torch.compile(parallel)) is model
    assert unwrap(nn.DataParallel(compiled)) is model
    assert clean_name("module._orig_mod.0.weight", nn.DataParallel(compiled)) == "0.weight"


def test_wrappers_of_a_part_of_a_model_are_seen_through():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    plain = layers(model, torch.randn(1, 2))
    model[0], model[1] = torch.compile(model[0]), nn.DataParallel(model[1])
    model[2] = checkpoint_wrapper(model[2])
    assert layers(model, torch.randn(1, 2)) == plain
    assert list(chosen_parameters(model)) == [name for one in plain for name in one.parameters]


class Named(nn.Module):
    """Children that are called as wrappers call what they wrap, and siblings of what is inside."""

    def __init__(self, name):
        super().__init__()
        setattr(self, name, nn.ModuleDict({"head": nn.Linear(3, 3), "weight": nn.Linear(3, 3)}))
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        inner, _ = self.children()
        return self.head(inner["weight"](inner["head"](x)))


@pytest.mark.parametrize(
    "name", ["module", "_orig_mod", "_forward_module", "_checkpoint_wrapped_module"]
)
def test_what_is_only_called_as_a_wrapper_calls_it_keeps_its_name(name):
    model = Named(name)
    names = [key for key, _ in model.named_parameters()]
    assert [key for key, _ in named_parameters(model)] == names
    assert len(chosen_parameters(model)) == len(names) == 6
    assert [layer.name for layer in layers(model)] == [f"{name}.head", f"{name}.weight", "head"]
    assert [layer.name for layer in layers(nn.DataParallel(model))][2] == "head"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with wd_probe.WeightDecay(model, optimizer, "wd", rate=1.0):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), 0.9 * was)
    sums = zero_shot_decay(model, lambda m: {"sum": sum(p.abs().sum() for p in m.parameters())}, 1)
    assert sums[-1].metrics["sum"] == 0


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, orthogonal])
def test_what_parametrizes_a_weight_belongs_to_its_layer(wrap):
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    found = layers(model, torch.randn(1, 4))
    assert [layer.name for layer in found] == ["0", "2"]
    assert sorted(name for layer in found for name in layer.parameters) == sorted(
        name for name, _ in model.named_parameters()
    )
    distortion = wd_probe.feature_distortion(model, [torch.randn(8, 4)], [0.5])
    assert [one.name for one in distortion] == ["0", "2"]


class LowRank(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.up, self.down = nn.Linear(1, size), nn.Linear(size, 1)

    def forward(self, weight):
        return weight + self.up.weight @ self.down.weight


class BaseTunerLayer:
    """As PEFT's, which its layers are known by."""


class Tuned(nn.Module, BaseTunerLayer):
    def __init__(self, inner):
        super().__init__()
        self.base_layer = inner
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 1, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(1, 4, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_low_rank_adapters_belong_to_their_layer():
    adapted = nn.Linear(4, 4)
    register_parametrization(adapted, "weight", LowRank(4))
    model = nn.Sequential(adapted, Tuned(nn.Linear(4, 4)), nn.Linear(4, 2))
    found = layers(model, torch.randn(1, 4))
    assert [layer.name for layer in found] == ["0", "1", "2"]
    assert [len(layer.parameters) for layer in found] == [6, 4, 2]


def test_children_of_a_parametrized_module_are_layers_of_their_own():
    attention = weight_norm(nn.MultiheadAttention(4, 1), "in_proj_weight")
    found = layers(nn.Sequential(attention))
    assert [layer.name for layer in found] == ["0.{in_proj_bias,parametrizations}", "0.out_proj"]


def test_tied_weights_belong_to_one_layer():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert [layer.parameters for layer in layers(model)] == [("0.weight",)]


def test_a_model_without_parameters():
    with pytest.raises(InputError, match="ReLU has no parameters, so it has no layers"):
        layers(nn.ReLU())


@pytest.mark.parametrize("n", [1, 2, 20, 97])
def test_the_three_scales_have_the_means_they_should(n):
    """Fact 12."""

    def mean(scale):
        return sum(layerwise_rates(n, 0.3, scale)) / n

    assert mean("eq9") == pytest.approx(0.3 * (n + 1) / (2 * n))
    assert mean("max2") == pytest.approx(0.3 * (n + 1) / n)
    assert mean("mean") == pytest.approx(0.3)
    assert max(layerwise_rates(n, 0.3)) == pytest.approx(0.6)
    assert list(layerwise_rates(n, 0.3)) == sorted(layerwise_rates(n, 0.3))
    assert layerwise_rates(n, 0.3, "falling") == layerwise_rates(n, 0.3)[::-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.1), "n must be at least 1, got 0"),
        ((3, -1.0), "rate must be a finite number ≥ 0, got -1.0"),
        ((3, float("nan")), "rate must be a finite number ≥ 0, got nan"),
        ((3, 0.1, "top"), "unknown scale 'top'; choose from eq9, max2, mean, falling"),
    ],
)
def test_layerwise_rates_names_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        layerwise_rates(*arguments)


def test_what_decays_by_the_paper_and_by_timms_rule():
    """Fact 14."""
    model = on_meta("vit_tiny_patch16_224")
    assert decayed_parameters(model) == tuple(name for name, _ in model.named_parameters())
    spared = set(decayed_parameters(model)) - set(
        decayed_parameters(model, filter_bias_and_bn=True)
    )
    assert {"pos_embed", "cls_token", "head.bias", "norm.weight"} <= spared
    assert "head.weight" not in spared
