import pytest
import torch
from torch import nn

from tests.small import adamw
from wd_probe import InputError, OpposingPenaltyProbe, WeightDecay
from wd_probe.sharding import Shards, local


def test_parameters_held_whole_are_summed_with_nobody():
    """Without torch.distributed; what is spread is tried in test_distributed.py."""
    weights = [torch.ones(3), nn.Parameter(torch.ones(2))]
    shards, rows = Shards(weights), torch.rand(2, 6)
    assert not shards
    assert shards.sum(weights, rows)() is rows
    assert [local(p) is p for p in weights] == [True, True]


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
