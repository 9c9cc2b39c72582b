"""wandb itself, offline."""

import importlib.util
import json

import pytest
import wandb

from tests.small import FAST, rows
from tests.sweeps.conftest import wait_for
from wd_probe.probe.probe import METRICS


@pytest.fixture
def logged(monkeypatch, tmp_path):
    """What wandb's runs are given: by step what was logged, and the summaries."""
    found, log, summaries = {}, wandb.Run.log, []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("wd_probe.runs.figures.draw_training", lambda run: {})

    def spy(run, data, step):
        found.setdefault(step, {}).update(data)
        summaries[:] = [run.summary, dict(run.config), run.id]
        log(run, data, step=step)

    monkeypatch.setattr(wandb.Run, "log", spy)
    return found, summaries


def test_each_recorded_step_and_epoch_is_logged(wdprobe, logged, tmp_path):
    found, told = logged
    code, out, err = wdprobe("rop", *FAST, "--steps", 4, "--every", 2, "--log-wandb", "--output",
                             "run", "--json")  # fmt: skip
    assert code == 0, err
    summary = json.loads(out)
    table = rows(tmp_path / "run/steps.csv")
    assert list(found) == [1, 3, 4]
    assert found[1]["R_op/rate"] == float(table[0]["rate"])
    assert found[1]["train/loss"] == float(table[0]["loss"])
    assert found[4] == {"epoch": 1, "test/top1": summary["top1"], "test/loss": summary["loss"]}
    assert set(found[1]) == set(found[3]) == {"train/loss", "train/lr", *METRICS}
    assert told[1]["model"] == "test_convnext"
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    wait_for(lambda: b"R_op/rate" in file.read_bytes())  # another process writes it
    assert (tmp_path / "run/wandb.id").read_text() == told[2]


def test_without_wandb_it_is_one_line(wdprobe, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *a: None if name == "wandb" else find(name, *a))  # fmt: skip
    code, _, err = wdprobe("rop", *FAST, "--log-wandb")
    assert code == 2
    assert err == (
        "wdprobe: error: --log-wandb needs wandb, which is not installed: pip install wandb\n"
    )


def test_what_wandb_refuses_is_one_line(wdprobe, monkeypatch, tmp_path):
    def refuse(**_):
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    code, _, err = wdprobe("rop", *FAST, "--steps", 1, "--log-wandb", "--output", "run")
    assert code == 2
    assert "wandb cannot begin (api_key not configured (no-tty)); WANDB_MODE=offline" in err
