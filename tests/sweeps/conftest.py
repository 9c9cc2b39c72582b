"""What the tests of sweeps share."""

import json
import time

import pytest
import torch
from hypothesis import strategies as st

from wd_probe.training.options import TrainOptions

TINY = ["--model", "test_convnext", "--batch-size", "32", "--steps", "2"]


BASE = TrainOptions(model="test_convnext", batch_size=32, steps=2, method="wd")
AXES = st.fixed_dictionaries(
    {
        "method": st.lists(st.sampled_from(["baseline", "wd", "rwd", "lpwd"]), min_size=1),
        "lr": st.lists(st.sampled_from([1e-4, 1e-3, 1e-2]), min_size=1, max_size=4),
        "weight_decay": st.lists(st.sampled_from([0.01, 0.1, 1.0]), min_size=1, max_size=4),
        "seed": st.lists(st.integers(0, 3), min_size=1, max_size=4),
        "batch_size": st.lists(st.integers(1, 3), min_size=1, max_size=2),
    }
)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Cells this small are faster so, the more where others use the machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Told:
    """A listener that remembers."""

    def __init__(self):
        self.kept, self.started, self.ended = None, [], []

    def begun(self, total, kept):
        self.kept = kept

    def cell_started(self, cell):
        self.started.append(cell.name)

    def cell_ended(self, cell, summary):
        self.ended.append((cell.name, summary["status"]))


def quick_train(options, listener, lock):
    """What `train` does to a folder, without training."""
    (options.output / "config.json").write_text("{}")
    top1 = 1 / (1 + options.weight_decay + options.seed / 100)
    summary = {
        "status": "finished", "steps": 2, "seconds": 0.1, "top1": top1,
        "best10": {"mean": top1}, "chosen": None, "val_top1": None, "run": str(options.output),
    }  # fmt: skip
    (options.output / "summary.json").write_text(json.dumps(summary))
    return summary


def stamps(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def wait_for(something, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := something():
            return found
        time.sleep(0.05)
    raise AssertionError("it never came")
