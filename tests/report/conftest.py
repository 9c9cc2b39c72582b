import shutil
from pathlib import Path

import pytest
import torch

from tests.small import Silent, undrawn
from wd_probe.sweeps import cells as sweeps
from wd_probe.sweeps import grid
from wd_probe.training import scan as zeroshot
from wd_probe.training.options import TrainOptions
from wd_probe.training.train import train


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two runs, a scan of one, and a sweep of four cells."""
    root = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small steps gain nothing from more
    small = TrainOptions(model="test_convnext", batch_size=64, lr=1e-3, train_samples=256)
    for name, method, opt, rate in (("one", "wd", "adamw", 0.05), ("two", "lpwd", "adam", 50.0)):
        options = TrainOptions(
            command="rop", every=1, model="test_convnext", batch_size=64, lr=1e-3, epochs=2,
            train_samples=256, method=method, opt=opt, weight_decay=rate, output=root / name,
        )  # fmt: skip
        with undrawn():
            train(options, Silent())
    zeroshot.scan(
        zeroshot.ZeroshotOptions(
            run=root / "one", num_samples=64, steps=5, by="kind", by_steps=2, output=root / "scan"
        ),
        Silent(),
    )
    axes = {"method": ["wd", "rwd"], "weight_decay": [0.1, 1.0], "opt": ["adam"], "every": [1]}
    cells = grid.grid(small, axes | {"val_split": [0.1], "epochs": [1]})
    with undrawn():
        sweeps.sweep(cells, root / "sweep", Silent())
    torch.set_num_threads(threads)
    return root


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of one of them to be spoiled."""
    return lambda name, to="spoiled": Path(shutil.copytree(folders / name, tmp_path / to))
