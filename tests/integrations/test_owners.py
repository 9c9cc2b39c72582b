import time

import pytest
import timm
import torch
from torch import nn

from tests.small import adamw, small
from wd_probe.integrations.owners import find_owner


class Lit(nn.Module):
    """A shell around a model, such as a LightningModule."""

    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, nn.CrossEntropyLoss()


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = small(), small()


def found(optimizer):
    owner = find_owner(optimizer)
    return owner.root, owner.model, list(owner.parameters)


def test_the_smallest_module_that_owns_all_by_names_of_the_outermost():
    gan = Gan()
    root, model, names = found(adamw(gan.generator.parameters()))
    assert (root, model) == (gan.generator, gan)
    assert names == [f"generator.{name}" for name, _ in small().named_parameters()]
    assert find_owner(adamw(gan.parameters())).root is gan


def test_the_outermost_of_those_alike_and_names_without_what_wrappers_add():
    net = small()
    compiled = torch.compile(net)
    root, model, names = found(adamw(net.parameters()))
    assert (root, model) == (compiled, compiled)
    assert names == [name for name, _ in net.named_parameters()]
    assert find_owner(adamw(net.parameters())).title == "Sequential"


def test_copies_such_as_averages_own_nothing():
    net = small()
    average = torch.optim.swa_utils.AveragedModel(net)
    assert find_owner(adamw(net.parameters())).model is net
    assert find_owner(adamw(average.parameters())).model is average


def test_the_part_that_is_trained_has_its_name():
    net = small()
    root, model, names = found(adamw(net[2].parameters()))
    assert (root, model, names) == (net[2], net, ["2.weight", "2.bias"])


def test_optimizers_beside_each_other_share_a_root():
    net = nn.ModuleDict({"embed": nn.Embedding(4, 4), "blocks": small()})
    inner = adamw([p for p in net["blocks"].parameters() if p.ndim > 1])
    outer = adamw([net["embed"].weight, net["blocks"][0].bias])
    assert find_owner(inner).root is find_owner(outer).root is net
    leaves = [adamw([p]) for p in net.parameters()]  # an optimizer for every tensor
    del inner, outer
    assert {find_owner(one).root for one in leaves} == {net}


def test_what_no_module_owns_is_named_by_its_place():
    loose = [torch.zeros(3, requires_grad=True), torch.zeros(2, 2, requires_grad=True)]
    owner = find_owner(torch.optim.SGD([{"params": loose[:1]}, {"params": loose[1:]}], lr=1.0))
    assert list(owner.parameters) == ["group0.0", "group1.0"]
    assert [one.name for one in owner.layers] == ["group0", "group1"]
    assert owner.title == "2 tensors"


def test_what_several_modules_own_together_keeps_their_names():
    one, other, scale = small(), nn.Linear(3, 3), torch.zeros((), requires_grad=True)
    owner = find_owner(adamw([*one.parameters(), scale, *other.parameters()]))
    assert list(owner.parameters) == [
        "Sequential.0.weight", "Sequential.0.bias", "Sequential.2.weight", "Sequential.2.bias",
        "Linear.weight", "Linear.bias", "group0.4",
    ]  # fmt: skip
    assert owner.title == "Sequential and Linear"
    assert sorted(n for x in owner.layers for n in x.parameters) == sorted(owner.parameters)


@pytest.mark.parametrize("shell", [lambda net: net, Lit, torch.compile])
def test_layers_are_timms_where_it_groups_the_model(shell):
    net = timm.create_model("test_convnext")
    model = shell(net)
    owner = find_owner(adamw(net.parameters()))
    prefix = "model." if shell is Lit else ""
    assert owner.model is model
    assert owner.layers.definition == "timm"
    assert owner.layers[0].name.startswith(prefix)
    assert owner.stages[0].parameters[0].startswith(prefix)
    assert sorted(n for x in owner.layers for n in x.parameters) == sorted(owner.parameters)
    assert len(owner.stages) < len(owner.layers)


def test_layers_are_blocks_where_timm_has_no_say():
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))  # noqa: E731
    net = nn.ModuleDict({"stem": nn.Linear(4, 4), "blocks": nn.ModuleList([block(), block()])})
    net.register_parameter("token", nn.Parameter(torch.zeros(4)))
    owner = find_owner(adamw(net.parameters()))
    assert [one.name for one in owner.layers] == ["token", "stem", "blocks.0", "blocks.1"]
    assert [one.name for one in owner.stages] == ["token", "stem", "blocks"]


def test_lazy_objects_are_not_woken_and_a_million_of_others_take_no_second():
    class Lazy:
        woken = 0

        @property
        def __class__(self):
            Lazy.woken += 1
            return nn.Module

        def __getattribute__(self, name):
            Lazy.woken += 1
            return object.__getattribute__(self, name)

    net, others = small(), [[] for _ in range(1_000_000)]
    lazy = Lazy()
    optimizer = adamw(net.parameters())
    Lazy.woken = 0
    started = time.perf_counter()
    assert find_owner(optimizer).root is net
    assert time.perf_counter() - started < 1
    assert Lazy.woken == 0
    del lazy, others
