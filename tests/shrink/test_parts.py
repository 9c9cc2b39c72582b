import pytest
import timm
import torch
from torch import nn

from wd_probe import layers
from wd_probe.shrink.parts import PartScan


def sums(logits, number):
    return torch.stack([logits.double().sum(), logits.double().square().sum(), torch.tensor(1.0)])


MODELS = ["test_convnext", "test_vit", "test_resnet", "test_efficientnet", "hrnet_w18_small"]


@pytest.mark.parametrize("name", MODELS)
def test_reuse_is_exact_and_saves_work(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parts = {f"{layer.index} {layer.name}": layer.parameters for layer in layers(model)}
    parts = dict(list(parts.items())[:: max(1, len(parts) // 6)])
    batches = [torch.randn(2, 3, 64, 64), torch.randn(1, 3, 64, 64)]
    if name == "test_vit":
        batches = [torch.randn(2, 3, 160, 160)]
    scales = {part: [0.9, 0.5, 0.0] for part in parts}
    plain = PartScan(model, parts, reuse=False).run(batches, scales, sums)
    reusing = PartScan(model, parts)
    found = reusing.run(batches, scales, sums)
    assert all(torch.equal(plain[part], found[part]) for part in parts)
    skipped = [len(names) for names in reusing.skipped.values()]
    assert skipped[0] == 0
    assert skipped[-1] > 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


def test_a_model_that_uses_a_weight_early_is_run_whole():
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.first(x * self.last.bias.sum()))

    model, images = Peeking(), [torch.randn(3, 4)]
    parts, scales = {"last": ["last.bias"]}, {"last": [0.5]}
    scan, plain = PartScan(model, parts), PartScan(model, parts, reuse=False)
    assert torch.equal(*(s.run(images, scales, sums)["last"] for s in (scan, plain)))
    assert scan.skipped == {"last": []}


def test_tied_weights_count_where_they_are_first_used():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    scan = PartScan(model, {"tied": ["0.weight"], "head": ["3.weight"]})
    scan.run([torch.randn(3, 4)], {"tied": [0.5], "head": [0.5]}, sums)
    assert scan.skipped["tied"] == []
    assert set(scan.skipped["head"]) == {"0", "1", "2"}


def test_kept_outputs_survive_in_place_operations():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.first(x).add_(1))

    model, images = InPlace(), [torch.randn(3, 4)]
    parts, scales = {"last": ["last.weight"]}, {"last": [0.9, 0.5, 0.1]}
    scan, plain = PartScan(model, parts), PartScan(model, parts, reuse=False)
    assert torch.equal(*(s.run(images, scales, sums)["last"] for s in (scan, plain)))
    assert scan.skipped == {"last": ["first"]}
