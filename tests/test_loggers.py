"""The loops of docs/loggers.md with the real packages, offline: what they hold is what was told."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.test_docs import blocks

#: Notes what the probe tells, and adds what is no number, as R_op may be.
BEFORE = """
import json, math, pathlib, sqlite3, wd_probe
metrics, told = wd_probe.OpposingPenaltyProbe.metrics, []
def noting(self, **options):
    told.append(metrics(self, **options) | {"nothing": math.nan})
    return told[-1]
wd_probe.OpposingPenaltyProbe.metrics = noting
"""
#: What each holds of the last step that was logged, and how many were.
AFTER = {
    "wandb": """
    run.log({}, step=99)  # which ends the step before
    found = dict(run.summary)
(file,) = pathlib.Path("wandb").glob("offline-run-*/*.wandb")
assert b"R_op/rate" in file.read_bytes()
count = len(told)
""",
    "mlflow": """
found = mlflow.get_run(run.info.run_id).data.metrics
count = len(mlflow.MlflowClient().get_metric_history(run.info.run_id, "R_op/rate"))
""",
    "trackio": """
rows = list(sqlite3.connect("kept/mine.db").execute(
    "SELECT step, CAST(metrics AS TEXT) FROM metrics ORDER BY step"))
found, count = json.loads(rows[-1][1]), len(rows)
""",
    "SummaryWriter": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator("runs/mine").Reload()
found = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
count = len(events.Scalars("R_op/rate"))
""",
}
SAY = "\nprint('\\n' + json.dumps([told[-1], {k: found.get(k) for k in told[-1]}, count]))"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "store"), [*((name, "") for name in AFTER), ("mlflow", "file:mlruns")]
)
def test_what_a_logger_holds(name, store, tmp_path):
    if name != "SummaryWriter":
        pytest.importorskip(name)
    (snippet,) = [text for _, text in blocks("python") if f"import {name}\n" in text]
    if store:
        snippet = snippet.replace("sqlite:///mlflow.db", store)
    environment = {**os.environ, "TRACKIO_DIR": "kept", "MLFLOW_ALLOW_FILE_STORE": "true"}
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + snippet + AFTER[name] + SAY],
        cwd=tmp_path, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, found, count = json.loads(done.stdout.splitlines()[-1])
    assert count == 4
    for key, value in told.items():
        if not math.isnan(value):
            assert found[key] == pytest.approx(value, rel=1e-6), key
