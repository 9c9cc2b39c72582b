import os
import shutil
import signal
import sys
from contextlib import nullcontext

import hypothesis
import pytest
import torch

collect_ignore = ["benchmarks"]

os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker, and for what it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


# However slow the machine; in CI the same cases at every run.
hypothesis.settings.register_profile("suite", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _ended_as_before():
    """A command has its own way to end by SIGTERM, for as long as its process lives."""
    was = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, was)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _undrawn(request):
    """A small run's figures take longer than the run: they are drawn for tests marked `figures`."""
    from tests.small import undrawn

    with nullcontext() if "figures" in request.keywords else undrawn():
        yield


@pytest.fixture
def wdprobe(capsys, monkeypatch, tmp_path):
    """Run a command in this process: (exit code, stdout, stderr)."""
    from wd_probe.cli import main as cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["wdprobe", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def quick(monkeypatch):
    """Cells are finished without training."""
    from tests.sweeps.conftest import quick_train

    monkeypatch.setattr("wd_probe.sweeps.cells.train", quick_train)
    monkeypatch.setattr("wd_probe.sweeps.cells.prepare", lambda options: None)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A run of three steps and a scan of it."""
    from tests.small import Silent, undrawn
    from wd_probe.training.options import TrainOptions, ZeroshotOptions
    from wd_probe.training.scan import scan
    from wd_probe.training.train import train

    root = tmp_path_factory.mktemp("made")
    options = TrainOptions(
        command="rop", model="test_convnext", batch_size=32, lr=1e-3, steps=3, every=1,
        train_samples=96, output=root / "run",
    )  # fmt: skip
    with undrawn():
        train(options, Silent())
    options = ZeroshotOptions(
        run=root / "run", num_samples=16, steps=2, by="kind", by_steps=1, output=root / "scan"
    )
    scan(options, Silent())
    return root


@pytest.fixture
def copy(made, tmp_path):
    """Makes a copy of one of them to be spoiled."""

    def made_again(name):
        kept = shutil.ignore_patterns("figures", "events*", "*.safetensors")
        return shutil.copytree(made / name, tmp_path / name, ignore=kept)

    return made_again
