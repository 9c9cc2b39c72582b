"""What wandb is told, by one that notes it; and wandb itself, offline."""

import importlib.machinery
import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.small import FAST, rows
from tests.sweeps.conftest import wait_for
from wd_probe.probe.probe import METRICS


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


class Run:
    def __init__(self, **asked):
        self.asked, self.rows, self.summary, self.code = asked, {}, {}, None
        self.id = asked["id"] or "abc"

    def log(self, found, step):
        self.rows.setdefault(step, {}).update(found)

    def finish(self, exit_code):
        self.code = exit_code


@pytest.fixture
def noted(monkeypatch):
    """The runs that wandb was asked for; or None, to have it refuse the next one."""
    runs = []

    class Error(Exception):
        pass

    def init(**asked):
        if runs == [None]:
            raise Error("api_key not configured\nand more")
        runs.append(Run(**asked))
        return runs[-1]

    fake = ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init, fake.Settings, fake.errors = init, SimpleNamespace, SimpleNamespace(Error=Error)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return runs


def test_each_recorded_step_and_epoch_is_logged(wdprobe, noted, tmp_path):
    code, out, err = wdprobe("rop", *FAST, "--steps", 4, "--every", 2, "--log-wandb", "--output",
                             "run", "--json")  # fmt: skip
    assert code == 0, err
    (run,), summary = noted, json.loads(out)
    table = rows(tmp_path / "run/steps.csv")
    assert list(run.rows) == [1, 3, 4]
    assert run.rows[1]["R_op/rate"] == float(table[0]["rate"])
    assert run.rows[1]["train/loss"] == float(table[0]["loss"])
    assert set(run.rows[1]) == set(run.rows[3]) == {"train/loss", "train/lr", *METRICS}
    assert run.rows[4] == {"epoch": 1, "test/top1": summary["top1"], "test/loss": summary["loss"]}
    assert run.summary["top1"] == summary["top1"]
    assert run.summary["verdict"] == " ".join(summary["verdict"])
    assert run.code == 0
    assert (run.asked["name"], run.asked["project"]) == ("run", "wd-probe")
    assert run.asked["config"]["model"] == "test_convnext"


def test_without_measuring_every_step_is_logged(wdprobe, noted):
    assert wdprobe("train", *FAST, "--steps", 2, "--log-wandb", "--output", "run")[0] == 0
    assert [set(row) >= {"train/loss", "train/lr"} for row in noted[0].rows.values()] == [True] * 2


def test_a_resumed_run_goes_on_under_its_name(wdprobe, noted, tmp_path, monkeypatch):
    def stop(_, step, record):
        if step.step == 2:
            raise KeyboardInterrupt

    options = (*FAST, "--steps", 3, "--log-wandb", "--output", "run", "--recovery-interval", 1)
    with monkeypatch.context() as patch:
        patch.setattr("wd_probe.cli.progress.TrainingProgress.stepped", stop)
        assert wdprobe("train", *options)[0] == 130
    assert wdprobe("train", "--resume", "run")[0] == 0
    assert [run.asked["id"] for run in noted] == [None, "abc"]
    assert noted[1].asked["resume"] == "allow"


def test_what_is_wrong_is_one_line(wdprobe, noted, monkeypatch):
    noted.append(None)
    code, _, err = wdprobe("rop", *FAST, "--steps", 1, "--log-wandb", "--output", "run")
    assert code == 2
    assert "wandb cannot begin (api_key not configured); WANDB_MODE=offline needs no account" in err
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a)
    )
    assert wdprobe("rop", *FAST, "--log-wandb")[::2] == (
        2,
        "wdprobe: error: --log-wandb needs wandb, which is not installed: pip install wandb\n",
    )


@pytest.mark.slow
def test_wandb_itself_offline(wdprobe, tmp_path):
    pytest.importorskip("wandb")
    code, _, err = wdprobe("rop", *FAST, "--steps", 2, "--log-wandb", "--output", "run")
    assert code == 0, err
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    wait_for(lambda: b"R_op/rate" in file.read_bytes())  # another process writes it
    assert (tmp_path / "run/wandb.id").read_text() in file.name
