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

from tests.small import adamw, loss_of, rows, small
from wd_probe import OpposingPenaltyProbe, WdProbeWarning, layers
from wd_probe.probe.records import ProfileRecord
from wd_probe.runs import figures, reading
from wd_probe.runs.folder import RunFolder
from wd_probe.runs.reading import read_json, read_run
from wd_probe.runs.recorder import Epoch, Recorder, Running, Stretches
from wd_probe.runs.schema import RunSummary
from wd_probe.runs.verdict import Setting

#: What the figures' titles, and the dashboard, name a run by.
NAMED = {"model": "m", "dataset": "digits", "lr": 3e-3, "weight_decay": 0.05, "method": "wd",
         "optimizer": "adamw", "status": "finished"}  # fmt: skip
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


def config(probe):
    names = [{"name": layer.name} for layer in probe.layers]
    return NAMED | {"opt": "adamw", "batch_size": 64, "layers": names}


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
        folder.json("config.json", config(probe))
        recorder = Recorder(folder, probe)
        recorder.open_dashboard(layers(model, coarse=True))
        for step in range(1, STEPS + 1):
            now[0] = step
            recorder.step(step, epoch=1, loss=1 + step % 7, lr=3e-3, update=step)
            if step == STEPS // 2:
                tracemalloc.start()
            if step == STEPS * 6 // 10:
                before = tracemalloc.get_traced_memory()[0]
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        found = recorder.summary(0.05)
        recorder.close(NAMED | found, {})
    assert grown < 150_000, "a list of floats would have grown by 1.3 MB"
    rates = [rest[chosen[k]].rate for k in range(1, STEPS + 1)]
    rates[HIGHEST - 1] = highest.rate
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
    assert (tmp_path / "run/layers.csv").stat().st_size < 250 * kept * len(probe.layers)
    assert sum(file.stat().st_size for file in (tmp_path / "run").glob("events*")) < 6_000_000
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
        recorder = Recorder(folder)
        recorder.open_dashboard(layers(model, coarse=True))
        shutil.rmtree(tmp_path / "run")

        def go_on():
            for step in range(1, 100):
                recorder.step(step, loss=1.0)
                recorder.flush()

        with pytest.warns(WdProbeWarning, match="nothing more is written to") as told:
            go_on()
    assert len(told) == 1
    assert "Traceback" not in capsys.readouterr().err


# --- any loop -------------------------------------------------------------------------------------


def batches():
    pixels, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    for k in range(12):
        batch = slice(64 * k, 64 * k + 64)
        yield pixels[batch].float() / 16, labels[batch]


def looped(folder, profile=()):
    """Twelve steps of a loop of somebody's own, in three epochs."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.GELU(), torch.nn.Linear(16, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.5)
    probe = OpposingPenaltyProbe(model, optimizer, profile=profile, profile_every=6)
    recorder = Recorder(folder, probe)
    for number, (pixels, labels) in enumerate(batches(), start=1):
        loss = torch.nn.functional.cross_entropy(model(pixels), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield recorder, number, loss.item(), probe


@pytest.mark.figures
def test_a_loop_of_ones_own_makes_a_whole_run_folder(tmp_path):
    path = tmp_path / "run"
    with RunFolder(path) as folder:
        losses, rates = [], []
        for recorder, number, loss, probe in looped(folder, [0.05, 0.5, 5.0]):
            if number == 1:
                folder.json("config.json", config(probe))
                recorder.open_dashboard(probe.layers)
            record = recorder.step(number, epoch=1, loss=loss, lr=0.03, update=number)
            losses.append(loss)
            rates.append(record.rate)
            if number % 4 == 0:
                recorder.epoch(number // 4, top1=number / 20, loss=2 / number)
        summary = recorder.summary(0.5)
        recorder.close(NAMED | summary, {"lr": 0.03})
    run = read_run(path)
    assert run.steps["loss"] == losses
    assert run.steps["rate"] == rates
    assert run.steps["penalized"] == [64 * 16 + 16 + 160 + 10] * 12
    assert set(run.layers["step"]) == set(range(1, 13))
    assert run.profile["step"] == [1, 1, 1, 7, 7, 7]
    assert run.epochs["train_loss"] == pytest.approx(
        [statistics.fmean(losses[k : k + 4]) for k in (0, 4, 8)]
    )
    assert run.epochs["top1"] == [0.2, 0.4, 0.6]
    assert all(math.isnan(x) for x in run.epochs["val_top1"])
    assert run.summary["rate"]["max"] == max(rates)
    assert run.summary["rate"]["mean"] == pytest.approx(statistics.fmean(rates))
    assert run.summary["top1"] == 0.6
    assert run.summary["best10"] == {"mean": pytest.approx(0.4), "std": pytest.approx(0.2),
                                     "epochs": 3}  # fmt: skip
    assert run.summary["chosen"] is None
    assert (summary["steps"], summary["measured_steps"]) == (12, 12)
    assert {r["name"] for r in rows(path / "tensors.csv")} == set(probe.names)
    assert {p.stem for p in (path / "figures").iterdir()} == {
        "rop_over_steps", "rop_by_layer", "rop_by_decay_rate", "balance_by_layer",
        "angle_by_layer", "remaining", "norm_by_layer", "training",
    }  # fmt: skip
    shown = EventAccumulator(str(path)).Reload()
    assert len(shown.Tags()["images"]) == 8
    assert [e.value for e in shown.Scalars("test/top1")] == pytest.approx([0.2, 0.4, 0.6])
    assert "_hparams_/session_start_info" in shown.PluginTagToContent("hparams")


def test_rates_are_written_without_what_binary_arithmetic_leaves(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        for recorder, number, _, _ in looped(folder, [0.1 * 0.3, 3 * 0.1]):
            recorder.step(number, lr=3 * 0.1, update=number)
    assert {row["rate"] for row in rows(tmp_path / "run/profile.csv")} == {"0.03", "0.3"}
    assert {row["lr"] for row in rows(tmp_path / "run/steps.csv")} == {"0.3"}


def test_of_a_stretch_the_largest_rate_and_the_mean_loss_are_kept(tmp_path):
    rates = {}
    with RunFolder(tmp_path / "run") as folder:
        for recorder, number, _, probe in looped(folder):
            if number == 1:
                folder.json("config.json", config(probe))
                recorder.open_dashboard(probe.layers)
                for stretches in (recorder._kept, recorder._shown):
                    stretches.load_state_dict({"count": 5000, "end": 5000})  # of five steps each
            rates[number] = recorder.step(number, loss=number, update=number).rate
        recorder.close(NAMED | recorder.summary(0.5), {})
    kept = {int(row["step"]) for row in rows(tmp_path / "run/layers.csv")}
    stretches = ({1, 2, 3, 4, 5}, {6, 7, 8, 9, 10}, {11, 12})
    assert kept == {max(stretch, key=rates.get) for stretch in stretches}
    assert kept != {5, 10, 12}
    shown = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in shown] == [(5, 3.0), (10, 8.0)]


def test_what_a_loop_does_not_tell_stays_empty(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        for recorder, number, _, probe in looped(folder):
            if number == 1:
                folder.json("config.json", config(probe))
            update = None if number == 3 else number  # as GradScaler leaves one out
            assert (recorder.step(number, update=update) is None) == (number == 3)
        summary = recorder.summary(0.5)
    run = read_run(tmp_path / "run")
    assert run.steps["step"] == list(range(1, 13))
    assert all(math.isnan(x) for name in ("epoch", "loss", "lr") for x in run.steps[name])
    first, _, third, *_ = rows(tmp_path / "run/steps.csv")
    assert (first["epoch"], first["loss"], first["lr"]) == ("", "", "")
    assert float(first["rate"]) >= 0
    assert [third[name] for name in ("rate", "penalized", "opposing")] == ["", "", ""]
    assert (summary["steps"], summary["measured_steps"]) == (12, 11)
    assert summary["epochs"] == 0
    assert math.isnan(summary["train_loss"])


LEDGER = ("norm", "relative_update", "angular_update", "growth", "taken", "balance", "remaining",
          "timescale")  # fmt: skip


def test_the_ledger_is_in_every_table(tmp_path):
    model = small()
    optimizer = adamw(model.parameters())
    records = []
    with RunFolder(tmp_path / "run") as folder:
        probe = OpposingPenaltyProbe(model, optimizer)
        recorder = Recorder(folder, probe)
        folder.json("config.json", config(probe))
        for step in range(1, 7):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            records.append(recorder.step(step, update=step))
        found = recorder.summary(0.3)
        recorder.close(NAMED | found, {})
    tables = [
        (rows(tmp_path / "run/steps.csv"), [record.total for record in records]),
        (rows(tmp_path / "run/layers.csv"), [t for record in records for t in record.layers]),
        (rows(tmp_path / "run/tensors.csv"), list(probe.total.tensors.values())),
    ]
    for lines, tallies in tables:
        for line, tally in zip(lines, tallies, strict=True):
            assert {name: float(line[name]) for name in LEDGER} == {
                name: getattr(tally, name) for name in LEDGER
            }
    total, last = probe.total.total, records[-1].total
    for name in ("balance", "angular_update", "relative_update"):
        expected = {"mean": getattr(total, name), "last": getattr(last, name)}
        late = {"late": probe.late.total.balance} if name == "balance" else {}
        assert found["dynamics"][name] == expected | late
    assert found["dynamics"]["remaining"] == total.remaining
    assert [layer["norm"] for layer in found["layers"]] == [t.norm for t in probe.total.layers]
    read = read_json(tmp_path / "run/summary.json", RunSummary)
    assert read["dynamics"]["timescale_epochs"] is None, "nobody said how long an epoch is"
    assert read["verdict"] == found["verdict"]


def test_the_ledger_is_of_weights_that_decay(tmp_path):
    """As the summary's: what grows without decay says nothing of balance."""
    model = small()
    weights, biases = (
        [p for p in model.parameters() if (p.ndim > 1) is one] for one in (True, False)
    )
    optimizer = torch.optim.AdamW(
        [{"params": weights}, {"params": biases, "weight_decay": 0.0}], lr=0.01, weight_decay=5.0
    )
    with RunFolder(tmp_path / "run") as folder:
        probe = OpposingPenaltyProbe(model, optimizer)
        recorder = Recorder(folder, probe)
        folder.json("config.json", config(probe))
        for step in range(1, 5):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            record = recorder.step(step, update=step)
        found = recorder.summary(5.0)
        recorder.close(NAMED | found, {})
    last = float(rows(tmp_path / "run/steps.csv")[-1]["balance"])
    assert last == found["dynamics"]["balance"]["last"] != record.total.balance
    layer = rows(tmp_path / "run/layers.csv")[-1]
    name = next(name for name, p in model.named_parameters() if p is weights[-1])
    assert {column: float(layer[column]) for column in LEDGER} == {
        column: getattr(record.tensors[name], column) for column in LEDGER
    }


@pytest.mark.figures
def test_the_figures_at_the_end_know_what_the_summary_says(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "draw_training", lambda run: drawn.append(run) or {})
    with RunFolder(tmp_path / "run") as folder:
        for recorder, number, loss, probe in looped(folder, []):
            folder.json("config.json", config(probe))
            recorder.step(number, loss=loss, update=number)
        summary = recorder.summary(0.5, Setting(rule="wd"))
        recorder.close(NAMED | summary, {})
    assert drawn[0].summary["dynamics"]["momentum"] == 0.9


@pytest.mark.filterwarnings("ignore:Adam has weight_decay=0")
def test_what_is_no_number_stays_empty(tmp_path):
    """Where nothing decays there is no balance, and no timescale."""
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    with RunFolder(tmp_path / "run") as folder:
        recorder = Recorder(folder, OpposingPenaltyProbe(model, optimizer))
        loss_of(model, 1).backward()
        optimizer.step()
        recorder.step(1, update=1)
        recorder.step(2)
        found = recorder.summary(0.0)
    measured, voided = rows(tmp_path / "run/steps.csv")
    assert measured["balance"] == measured["timescale"] == ""
    assert (float(measured["remaining"]), float(measured["taken"])) == (1, 0)
    assert float(measured["angular_update"]) > 0
    assert {voided[name] for name in LEDGER} == {""}
    assert found["verdict"] == ["Nothing was taken off in this run."]
    assert found["dynamics"]["state"] == "idle"
    assert found["dynamics"]["timescale_steps"] == math.inf
    assert {layer["state"] for layer in found["layers"]} == {None}


def test_a_probe_that_measured_nothing_says_nothing(tmp_path):
    model = small()
    with RunFolder(tmp_path / "run") as folder:
        found = Recorder(folder, OpposingPenaltyProbe(model, adamw(model.parameters()))).summary(
            0.3
        )
    assert found["verdict"] == []
    assert "dynamics" not in found


def test_without_a_probe_there_are_losses_alone(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        recorder = Recorder(folder)
        for number, loss in enumerate((3.0, math.nan, 1.0), start=1):
            assert recorder.step(number, loss=loss) is None
        recorder.epoch(1, val_top1=0.5)
        summary = recorder.summary(0.5)
    assert list(rows(tmp_path / "run/steps.csv")[0]) == ["step", "epoch", "loss", "lr"]
    assert not (tmp_path / "run/layers.csv").exists()
    assert "rate" not in summary
    assert summary["findings"] == []
    assert summary["train_loss"] == 2.0
    assert summary["chosen"]["val_top1"] == 0.5
    assert math.isnan(summary["top1"])


def test_scores_are_of_the_weights_that_stand(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        recorder = Recorder(folder)
        recorder.step(1, loss=1.0)
        recorder.epoch(1, top1=0.9)
        assert recorder.evaluated == 1
        recorder.step(2, loss=1.0)
        assert math.isnan(recorder.summary(0)["top1"])
        assert recorder.summary(0)["best10"]["mean"] == 0.9
        with pytest.raises(TypeError, match="top5"):
            recorder.epoch(2, top5=1.0)


@pytest.mark.figures
def test_a_run_too_long_to_be_drawn_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "TABLE_CELLS", 5)
    with RunFolder(tmp_path / "run") as folder:
        folder.json("config.json", {})
        recorder = Recorder(folder)
        for number in (1, 2):
            recorder.step(number, loss=1.0)
        with pytest.warns(
            WdProbeWarning, match=r"no figures are drawn: .*steps\.csv has more than"
        ):
            recorder.close(recorder.summary(0), {})
    assert read_json(tmp_path / "run/summary.json", RunSummary)["steps"] == 2


def test_the_best_epoch_is_chosen_by_validation_and_the_best_ten_by_test(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        recorder = Recorder(folder)
        for number in range(1, 13):
            recorder.step(number, loss=1.0)
            validation = {"val_top1": 0.5 - abs(number - 4) / 10} if number < 6 else {}
            recorder.epoch(number, top1=number / 20, **validation)
    summary = recorder.summary(0)
    assert summary["chosen"] == {"epoch": 4, "val_top1": 0.5, "top1": 0.2}
    best = [number / 20 for number in range(3, 13)]
    assert summary["best10"] == {
        "mean": pytest.approx(statistics.fmean(best)),
        "std": pytest.approx(statistics.stdev(best)),
        "epochs": 10,
    }


# --- the state of a run that was killed -----------------------------------------------------------


def test_a_recorder_continues_from_its_state(tmp_path):
    def record(path, stop):
        with RunFolder(path) as folder:
            recorder = None
            for begun, number, loss, probe in looped(folder):
                recorder = recorder or begun
                recorder.step(number, epoch=1, loss=loss, lr=0.03, update=number)
                if number in (4, 8):
                    recorder.epoch(number // 4, top1=number / 10, val_top1=0.5)
                if number == stop:
                    state = recorder.state_dict()
                    recorder = Recorder(folder, probe)
                    recorder.load_state_dict(state)
            recorder._write_largest()
            return recorder.summary(0.5), recorder.epochs

    whole = record(tmp_path / "whole", None)
    for stop in (1, 6, 8):
        assert repr(record(tmp_path / f"{stop}", stop)) == repr(whole)
        for name in ("steps.csv", "layers.csv", "epochs.csv"):
            written = (tmp_path / f"{stop}" / name).read_bytes()
            assert written == (tmp_path / "whole" / name).read_bytes()


def test_the_state_is_laid_out_as_in_every_recovery_file(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        recorder = Recorder(folder)
        recorder.step(1, loss=3.0)
        recorder.profiles.append(ProfileRecord(1, (0.1, 0.2), (3, 4), 5))
        recorder.epoch(1, top1=0.1, loss=2.0, other_top1=0.3, other_loss=4.0, val_top1=0.5,
                       val_loss=6.0)  # fmt: skip
    state = recorder.state_dict()
    assert state["epochs"] == [(1, 1, 3.0, (0.1, 2.0), (0.3, 4.0), (0.5, 6.0))]
    assert state["profiles"] == [(1, (0.1, 0.2), (3, 4), 5)]
    assert set(state) == {
        "steps", "measured", "penalized", "epochs", "profiles", "largest", "last", "rate", "mass",
        "flip_rate", "literal_rate", "epoch_loss", "shown_loss", "shown", "kept",
    }  # fmt: skip
    again = Recorder(folder)
    again.load_state_dict(state)
    assert again.epochs == [Epoch(1, 1, 3.0, 0.1, 2.0, 0.3, 4.0, 0.5, 6.0)]
    assert again.profiles == recorder.profiles
    assert again.steps == 1
