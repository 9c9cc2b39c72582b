import random

import numpy as np
import pytest
import torch

from tests.small import small, train
from wd_probe import OpposingPenaltyProbe, WdProbeWarning, WeightDecay


def test_a_copy_without_decay_wherever_the_rate_is_looked_up():
    class Own(torch.optim.SGD):
        """L2 by an attribute."""

        def __init__(self, ps, lr, weight_decay):
            super().__init__(ps, lr=lr, momentum=0.9)
            self.weight_decay = self.defaults["weight_decay"] = weight_decay
            self.param_groups[0]["weight_decay"] = weight_decay

        def step(self, closure=None):
            (group,) = self.param_groups
            group["weight_decay"] = self.weight_decay
            return super().step(closure)

    model = small(torch.float64)
    optimizer = Own(model.parameters(), 0.2, 0.1)
    with pytest.warns(WdProbeWarning, match="measured against a copy"):
        probe = OpposingPenaltyProbe(model, optimizer)
    train(model, optimizer, 4)
    assert [r.penalized for r in probe.records] == [212] * 4


def test_a_random_optimizer_and_its_copy_draw_the_same_numbers():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.add_(torch.randn_like(p) + random.random() + np.random.random())
            return super().step(closure)

    def run(probed):
        model = small(torch.float64)
        optimizer = Noisy(model.parameters(), lr=0.1, momentum=0.9)
        WeightDecay(model, optimizer, "wd", rate=0.5)
        probe = OpposingPenaltyProbe(model, optimizer, exact=True) if probed else None
        random.seed(0)
        np.random.seed(0)
        train(model, optimizer, 3)
        return model, probe

    (plain, _), (probed, probe) = run(False), run(True)
    assert all(map(torch.equal, plain.parameters(), probed.parameters()))
    sizes = probe.records[0].total.total_penalty
    assert sizes == pytest.approx(0.05 * sum(p.abs().sum().item() for p in small().parameters()))
