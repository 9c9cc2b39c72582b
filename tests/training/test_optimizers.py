"""The probe's closed forms against its exact mode, on every optimizer that runs here."""

import inspect
import warnings

import pytest
import torch

from tests.small import small, train
from wd_probe import OpposingPenaltyProbe
from wd_probe.training.optimizers import build_optimizer, known_optimizers


def third_party():
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    return sorted(
        f"pytorch_optimizer.{name}"
        for name, kind in vars(pytorch_optimizer).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    )


def both_ways(name):
    """What the probe counts as it is and in its exact mode; None where the optimizer cannot run."""
    model = small(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            optimizer = build_optimizer(name, model, lr=0.05, weight_decay=0.3)
            probes = [OpposingPenaltyProbe(model, optimizer, exact=exact) for exact in (None, True)]
            train(model, optimizer, 5)
        except Exception:  # it wants a closure, a graph behind the gradient, or groups of its own
            return None
    closed, exact = ([(r.penalized, r.total.opposing) for r in p.records] for p in probes)
    return closed, exact


@pytest.mark.slow
@pytest.mark.parametrize("collection", ["timm and torch", "pytorch_optimizer"])
def test_r_op_agrees_with_the_exact_mode_on_all_that_run(collection):
    names = third_party() if collection == "pytorch_optimizer" else known_optimizers()
    found = {name: both_ways(name) for name in names}
    ran = {name: counts for name, counts in found.items() if counts is not None}
    print(f"{collection}: {len(ran)} of {len(found)} run here")
    assert len(ran) > 60
    assert {name: counts for name, counts in ran.items() if counts[0] != counts[1]} == {}
    assert sum(sum(opposing for _, opposing in counts[0]) > 0 for counts in ran.values()) > 20
