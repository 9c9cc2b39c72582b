"""Runs killed at any moment and resumed, against the same runs never killed."""

import json
import shutil
from pathlib import Path

import pytest

from wd_probe.runs.reading import read_run

OLD = Path(__file__).parents[1] / "data/first_layout"


def test_a_killed_run_of_the_first_layout_is_resumed(wdprobe, tmp_path):
    run = shutil.copytree(OLD / "killed", tmp_path / "run")
    code, out, err = wdprobe("rop", "--resume", run, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["status"], summary["steps"], summary["measured_steps"]) == ("finished", 33, 33)
    assert json.loads((run / "config.json").read_text())["resumed_at"] == [15]
    for name in ("steps", "layers", "profile", "epochs"):
        before = (OLD / f"killed/{name}.csv").read_bytes()
        after = (run / f"{name}.csv").read_bytes()
        assert after.startswith(before)
        assert len(after) > len(before)
    assert not (run / "recovery.pt").exists()
    rates = read_run(run).steps["rate"]
    assert len(rates) == 33
    assert summary["rate"]["max"] == max(rates)
    assert summary["rate"]["mean"] == pytest.approx(sum(rates) / 33)
