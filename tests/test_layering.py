import warnings
from collections import Counter

import pytest
import timm
import torch
from torch import nn

from wd_probe import InputError, layers, layerwise_rates
from wd_probe.layering import clean_name, decayed_parameters, unwrap


def on_meta(name, **options):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
    for name in timm.list_models():
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
    assert unwrap(compiled) is model
    assert layers(compiled) == layers(model)
    assert clean_name("module._orig_mod.0.weight") == "0.weight"
    assert clean_name("_orig_mod.module.0.weight") == "0.weight"


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.1), "n must be at least 1, got 0"),
        ((3, -1.0), "rate must be a finite number ≥ 0, got -1.0"),
        ((3, float("nan")), "rate must be a finite number ≥ 0, got nan"),
        ((3, 0.1, "top"), "unknown scale 'top'; choose from eq9, max2, mean"),
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
