"""What every rank of `torchrun` does in tests/test_distributed.py; writes OUT/NAME.rank.json."""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import wd_probe
from wd_probe import sharding
from wd_probe.probe.formulas import tally

OUT = Path(sys.argv[1] if __name__ == "__main__" else ".")


def small():
    """Sizes that no number of ranks divides evenly."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 17), nn.GELU(), nn.Linear(17, 13), nn.GELU(), nn.Linear(13, 4)
    )


def plain(model):
    return model


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model, **options):
    """The last layer is gathered with the model itself, ahead of the whole forward pass."""
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def half(model):
    return fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def hybrid(model):
    """Replicated over one dimension of the mesh, sharded over the other."""
    return fsdp(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")))


def tensor_parallel(_):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    even = nn.Sequential(nn.Linear(8, 18), nn.GELU(), nn.Linear(18, 4))
    return parallelize_module(even, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def adamw(model, method):
    own = 0.1 if method == "own" else 0.0
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=own)


def zero(model, method):
    """The state in parts, the weights whole."""
    return ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, lr=0.05, weight_decay=0.1 if method == "own" else 0.0
    )


def sgd(model, method):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def prepared(wrap, method, make=adamw):
    model = wrap(small())
    optimizer = make(model, method)
    decay = None
    if method != "own":
        decay = wd_probe.WeightDecay(model, optimizer, method, rate=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wd_probe.WdProbeWarning)
        probe = wd_probe.OpposingPenaltyProbe(model, optimizer, profile=[0.01, 1.0])
    return model, optimizer, decay, probe


def train(model, optimizer, first, last, seen=None):
    """The same batch on every rank, so that the mean of the gradients is each rank's own."""
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(32, 8, generator=generator)
        labels = torch.randint(0, 4, (32,), generator=generator)
        F.cross_entropy(model(images).float(), labels).backward()
        before = whole(model)
        optimizer.step()
        if seen is not None:
            seen.append((before, whole(model)))
        optimizer.zero_grad()


def whole(model):
    return {
        name.removeprefix("module."): (
            p.full_tensor() if hasattr(p, "full_tensor") else p
        ).detach().clone()
        for name, p in model.named_parameters()
    }  # fmt: skip


def counts(record):
    ledger = ("growth", "taken", "updated", "remaining", "norm", "angular_update")
    return {
        name: [
            t.penalized,
            t.opposing,
            t.flipped,
            t.total_penalty,
            *(getattr(t, number) for number in ledger),
        ]
        for name, t in record.tensors.items()
    }


def result(wrap, method, make=adamw):
    model, optimizer, _, probe = prepared(wrap, method, make)
    train(model, optimizer, 1, 6)
    weights = whole(model)
    # one rank alone reads first; were that a collective, it would wait for ever
    found = None
    if dist.get_rank() == 0:
        found = {
            "records": [counts(record) for record in probe.records],
            "layers": [[layer.name, layer.opposing] for layer in probe.total.layers],
            "profile": [p.opposing for p in probe.profiles],
        }
    dist.barrier()
    return found or {"opposing": [record.total.opposing for record in probe.records]}, weights


def compared(wrap, method, make=adamw):
    alone, reference = result(plain, method, make)
    together, weights = result(wrap, method, make)
    return {
        "alone": alone,
        "together": together,
        "same weights": all(torch.equal(weights[name], reference[name]) for name in reference),
    }


def against_the_formula(wrap):
    """Every step's counts from the whole tensors before and after it."""
    model, optimizer, _, probe = prepared(wrap, "own")
    seen = []
    train(model, optimizer, 1, 4, seen)
    return {
        "probe": [counts(record) for record in probe.records],
        "formula": [
            {name: tally(before[name], after[name], 0.005)[[0, 1, 2]].tolist() for name in before}
            for before, after in seen
        ],
    }


def on_one_rank_only():
    sharding.PATIENCE = 3.0
    message = ""
    if dist.get_rank() == 0:
        try:
            prepared(fsdp, "own")
        except wd_probe.InputError as error:
            message = str(error)
    else:
        fsdp(small())
    dist.barrier()
    return {"message": message}


def checkpoint_state(model, optimizer):
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def saved():
    """Stop after three steps of six."""
    model, optimizer, decay, probe = prepared(fsdp, "lpwd")
    train(model, optimizer, 1, 3)
    dcp.save(checkpoint_state(model, optimizer), checkpoint_id=str(OUT / "checkpoint"))
    if dist.get_rank() == 0:
        ours = {"decay": decay.state_dict(), "probe": probe.state_dict()}
        (OUT / "checkpoint.json").write_text(json.dumps(ours))
    train(model, optimizer, 4, 6)
    return {"weights": listed(model), "total": counts(probe.total), "steps": probe.steps}


def resumed():
    """Go on with the other three, on another number of ranks."""
    model, optimizer, decay, probe = prepared(fsdp, "lpwd")
    state = checkpoint_state(model, optimizer)
    dcp.load(state, checkpoint_id=str(OUT / "checkpoint"))
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    ours = json.loads((OUT / "checkpoint.json").read_text())
    decay.load_state_dict(ours["decay"])
    probe.load_state_dict(ours["probe"])
    train(model, optimizer, 4, 6)
    return {"weights": listed(model), "total": counts(probe.total), "steps": probe.steps}


def listed(model):
    return {name: p.tolist() for name, p in whole(model).items()}


METHODS = ("own", "wd", "rwd", "pwd", "lpwd", "l1", "l2")
SCENARIOS = {
    **{f"fsdp-{m}": (lambda m=m: compared(fsdp, m)) for m in METHODS},
    "ddp-own": lambda: compared(ddp, "own"),
    "ddp-lpwd": lambda: compared(ddp, "lpwd"),
    "zero-own": lambda: compared(ddp, "own", zero),
    "zero-lpwd": lambda: compared(ddp, "lpwd", zero),
    "fsdp-sgd-wd": lambda: compared(fsdp, "wd", sgd),
    "hybrid-own": lambda: compared(hybrid, "own"),
    "hybrid-lpwd": lambda: compared(hybrid, "lpwd"),
    "half": lambda: against_the_formula(half),
    "tensor-parallel": lambda: against_the_formula(tensor_parallel),
    "one-rank": on_one_rank_only,
    "saved": saved,
    "resumed": resumed,
}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for wanted in sys.argv[2:]:
        found = SCENARIOS[wanted]()
        (OUT / f"{wanted}.{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
