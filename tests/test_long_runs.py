"""Runs of very many steps: flat memory, small files, true maxima."""

import csv
import math
import shutil
import statistics
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wd_probe import OpposingPenaltyProbe, WdProbeWarning, layers
from wd_probe.runs import figures
from wd_probe.runs.folder import RunFolder
from wd_probe.runs.reading import read_run
from wd_probe.runs.recorder import Journal
from wd_probe.runs.running import Running, Stretches
from wd_probe.runs.tensorboard import Dashboard
from wd_probe.training.loop import Step

STEPS = 100_000
HIGHEST = 77_777


@pytest.fixture(scope="module")
def measured():
    """A small model on real images, its probe, and the records of twenty steps."""
    pixels, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.GELU(), torch.nn.Linear(16, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    probe = OpposingPenaltyProbe(model, optimizer)
    for k in range(20):
        batch = slice(64 * k, 64 * k + 64)
        logits = model(pixels[batch].float() / 16)
        torch.nn.functional.cross_entropy(logits, labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, probe, probe.records


@pytest.mark.slow
def test_a_hundred_thousand_steps(measured, tmp_path, monkeypatch):
    model, probe, real = measured
    ordered = sorted(real, key=lambda record: record.rate)
    highest, rest = ordered[-1], [r for r in ordered if r.rate < ordered[-1].rate]
    dice = np.random.default_rng(0)
    chosen = dice.integers(len(rest), size=STEPS + 1).tolist()
    now = [0]

    def drain():
        record = highest if now[0] == HIGHEST else rest[chosen[now[0]]]
        return (replace(record, step=now[0]),)

    monkeypatch.setattr(probe, "drain", drain)
    with RunFolder(tmp_path / "run") as folder:
        names = [{"name": layer.name} for layer in probe.layers]
        folder.json("config.json", {
            "model": "m", "dataset": "digits", "opt": "adamw", "lr": 3e-3, "weight_decay": 0.05,
            "batch_size": 64, "layers": names,
        })  # fmt: skip
        board = Dashboard(folder.path, layers(model, coarse=True))
        journal = Journal(folder, board, probe, None)
        for step in range(1, STEPS + 1):
            now[0] = step
            journal.step(Step(step, 1, 1 + step % 7, 3e-3, step))
            if step == STEPS // 2:
                tracemalloc.start()
            if step == STEPS * 6 // 10:
                before = tracemalloc.get_traced_memory()[0]
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        journal.write_largest()
        board.close()
    assert grown < 150_000, "a list of floats would have grown by 1.3 MB"
    rates = [rest[chosen[k]].rate for k in range(1, STEPS + 1)]
    rates[HIGHEST - 1] = highest.rate
    found = journal.rates()
    assert found["measured_steps"] == STEPS
    assert found["rate"]["max"] == highest.rate
    assert found["rate"]["last"] == rates[-1]
    assert found["rate"]["mean"] == pytest.approx(statistics.fmean(rates), rel=1e-12)

    with (tmp_path / "run/steps.csv").open(newline="") as file:
        assert sum(1 for _ in csv.reader(file)) == STEPS + 1
    kept = 6178 + 1  # stretches, and the beginning of one
    run = read_run(tmp_path / "run")
    steps = np.unique(run.layers["step"])
    assert len(run.layers["step"]) == kept * len(probe.layers)
    assert steps[:2000].tolist() == list(range(1, 2001))
    assert HIGHEST in steps
    pooled = {step: rates[int(step) - 1] for step in steps}
    assert max(pooled.values()) == max(rates)
    assert (tmp_path / "run/layers.csv").stat().st_size < 100 * kept * len(probe.layers)
    (events,) = (tmp_path / "run").glob("events*")
    assert events.stat().st_size < 3_000_000
    shown = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0}).Reload()
    points = shown.Scalars("R_op/rate")
    assert len(points) == kept
    assert max(point.value for point in points) == pytest.approx(highest.rate)
    assert len(shown.Scalars("train/loss")) == kept - 1

    drawn = figures.draw_training(run)
    (image,) = drawn["rop_by_layer"].axes[0].images
    assert image.get_array().shape == (len(probe.layers), 1000)
    assert np.isfinite(image.get_array()).all()
    tallest = max(t.rate for t in highest.layers)
    assert image.get_array().max() >= tallest


def test_maps_of_uneven_steps_keep_the_largest_and_fill_what_is_between():
    steps = np.array([1.0, 2.0, 3.0, 4.0, 8.0])
    grid = np.array([[0.1, 0.2, 0.3, 0.4, 0.8]])
    even, where = figures._evenly(grid, steps)
    assert even.tolist() == [[0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.8]]
    assert where.tolist() == list(range(1, 9))
    steps = np.concatenate([np.arange(1, 2001), np.arange(2010, 100_000, 90)]).astype(float)
    grid = np.sin(steps)[None] ** 2
    even, where = figures._evenly(grid, steps)
    assert even.shape == (1, 1000)
    assert even.max() == grid.max()
    assert (where[0], where[-1]) == (1, steps[-1])
    same, unchanged = figures._evenly(grid[:, :2000], steps[:2000])
    assert same.shape == (1, 2000)
    assert unchanged is not steps


def test_stretches_are_whole_at_first_and_grow_with_the_run():
    stretches = Stretches()
    ends = [step for step in range(1, 50_001) if stretches.ends()]
    lengths = np.diff([0, *ends])
    assert (lengths[:2000] == 1).all()
    assert (np.diff(lengths) >= 0).all()
    assert lengths.max() == 50_000 // 1000 - 1
    again = Stretches()
    for _ in range(12_345):
        again.ends()
    other = Stretches()
    other.load_state_dict(again.state_dict())
    assert [again.ends() for _ in range(500)] == [other.ends() for _ in range(500)]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=30))
def test_running_totals_are_those_of_the_whole_list(values):
    running = Running()
    for value in values:
        running.add(value)
    known = [value for value in values if math.isfinite(value)]
    found = running.statistics()
    if not known:
        assert all(map(math.isnan, found.values()))
        return
    assert found["max"] == max(known)
    assert found["mean"] == pytest.approx(statistics.fmean(known), rel=1e-9, abs=1e-9 * max(
        map(abs, known)))  # fmt: skip
    assert found["last"] == values[-1] or math.isnan(values[-1])


def test_a_board_whose_folder_goes_away_is_told_once(tmp_path, capsys, measured):
    model, *_ = measured
    with RunFolder(tmp_path / "run") as folder:
        journal = Journal(folder, Dashboard(folder.path, layers(model, coarse=True)), None, None)
        shutil.rmtree(tmp_path / "run")

        def go_on():
            for step in range(1, 100):
                journal.step(Step(step, 1, 1.0, 0.1, step))
                journal.show(Dashboard.flush)

        with pytest.warns(WdProbeWarning, match="nothing more is written to") as told:
            go_on()
    assert len(told) == 1
    assert "Traceback" not in capsys.readouterr().err
