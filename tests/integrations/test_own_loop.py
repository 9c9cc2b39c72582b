import copy
import gc
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import wd_probe
from tests.small import LR, RATE, Oracle, Silent, adamw, loss_of, rows, small, train
from wd_probe import InputError, OpposingPenaltyProbe, WdProbeWarning, ranks
from wd_probe.integrations import ending, own_loop, recording
from wd_probe.integrations.attached import Attached
from wd_probe.report.page import report
from wd_probe.runs import folder as folder_room
from wd_probe.runs.summary_tables import summary_told
from wd_probe.tables import PrintableConsole
from wd_probe.training.options import ZeroshotOptions
from wd_probe.training.scan import scan


@pytest.fixture(autouse=True)
def draw(monkeypatch):
    """Figures are drawn where a test asks for them."""
    drawn = recording.Recording.draw
    monkeypatch.setattr(recording.Recording, "draw", lambda self: self.folder.close())
    yield drawn
    own_loop._end_all("finished")


@pytest.fixture
def at_once(monkeypatch):
    """What is measured is on the disk at every step."""
    monkeypatch.setattr(recording, "_SECONDS", -1.0)
    monkeypatch.setattr(folder_room, "_FLUSH_SECONDS", -1.0)


def summary(path):
    return json.loads((path / "summary.json").read_text())


def trained(path, steps=8, **options):
    """A model, its optimizer and its probe after some steps."""
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer, output=path, **options)
    train(model, optimizer, steps)
    return model, optimizer, probe


@pytest.mark.figures
def test_a_run_folder_as_rop_writes_it(tmp_path, monkeypatch, draw):
    monkeypatch.setattr(recording.Recording, "draw", draw)
    model = small()
    optimizer = adamw(model.parameters())
    oracle, losses = Oracle(model.named_parameters()), []
    with OpposingPenaltyProbe(model, optimizer, output=tmp_path / "run") as probe:
        for step in range(12):
            loss = loss_of(model, step)
            loss.backward()
            oracle.before()
            optimizer.step()
            oracle.after()
            optimizer.zero_grad()
            probe.log(loss=loss)
            losses.append(loss.item())
            if step % 6 == 5:
                probe.log(top1=step / 24)
    oracle.agrees_with(probe.records)
    told = rows(tmp_path / "run/steps.csv")
    assert [int(row["opposing"]) for row in told] == [
        sum(t["opposing"] for t in step.values()) for step in oracle.steps
    ]
    assert [float(row["loss"]) for row in told] == losses
    assert {float(row["lr"]) for row in told} == {LR}
    epochs = rows(tmp_path / "run/epochs.csv")
    assert [(row["step"], float(row["top1"])) for row in epochs] == [("6", 5 / 24), ("12", 11 / 24)]
    found = summary(tmp_path / "run")
    for key, value in {
        "model": "Sequential", "method": "wd", "optimizer": "AdamW", "lr": LR, "weight_decay": RATE,
        "steps": 12, "status": "finished", "top1": 11 / 24,
    }.items():  # fmt: skip
        assert found[key] == value, key
    assert {path.stem for path in (tmp_path / "run/figures").iterdir()} >= {"rop_over_steps"}
    assert list((tmp_path / "run").glob("events*"))
    assert len(rows(tmp_path / "run/tensors.csv")) == 4
    assert not optimizer._optimizer_step_post_hooks
    assert report([tmp_path / "run"])["runs"][0]["trouble"] is None
    page = (tmp_path / "run/report.html").read_text()
    assert "Top-1 was 45.8 % when the loop last told it." in page
    assert found["verdict"][0].split(":")[0] in page


def test_weights_are_those_of_a_training_that_is_not_measured(tmp_path, at_once):
    bare = small()
    train(bare, adamw(bare.parameters()), 8)
    states = torch.get_rng_state(), random.getstate()
    model = small()
    with OpposingPenaltyProbe(model, adamw(model.parameters()), output=tmp_path / "run") as probe:
        for step in range(8):
            loss_of(model, step).backward()
            probe.optimizers[0].step()
            probe.optimizers[0].zero_grad()
            probe.log(loss=1.0, top1=0.5)
            assert str(probe.summary())
            assert str(probe.records[-1])
    assert all(map(torch.equal, model.parameters(), bare.parameters()))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_it_is_written_as_it_goes_and_may_be_told_more_of_the_last_step(tmp_path, at_once):
    model, optimizer, probe = trained(tmp_path / "run", 5)
    assert [row["step"] for row in rows(tmp_path / "run/steps.csv")] == ["1", "2", "3", "4"]
    probe.log(loss=torch.tensor(0.5), top1=torch.tensor(0.25))
    train(model, optimizer, 1)
    assert [row["loss"] for row in rows(tmp_path / "run/steps.csv")] == ["", "", "", "", "0.5"]
    assert rows(tmp_path / "run/epochs.csv")[0]["top1"] == "0.25"
    assert len(probe.records) == 6


def test_an_evaluation_ahead_of_training_is_of_step_0(tmp_path):
    model = small()
    optimizer = adamw(model.parameters())
    with OpposingPenaltyProbe(model, optimizer, output=tmp_path / "run") as probe:
        probe.log(top1=0.9)
        train(model, optimizer, 2, after=lambda: probe.log(top1=0.25))
        state = probe.state_dict()
    table = rows(tmp_path / "run/epochs.csv")
    assert [(row["epoch"], row["step"]) for row in table] == [("0", "0"), ("1", "1"), ("2", "2")]
    found = summary(tmp_path / "run")
    assert (found["epochs"], found["best10"]["mean"]) == (2, 0.25)
    with OpposingPenaltyProbe(model, optimizer, output=tmp_path / "resumed") as probe:
        probe.load_state_dict(state)
        probe.log(top1=0.5)
    assert rows(tmp_path / "resumed/epochs.csv")[0]["step"] == "2"


def test_what_is_drained_is_written_too(tmp_path, at_once):
    model, optimizer, probe = trained(tmp_path / "run", 3)
    assert [record.step for record in probe.drain()] == [1, 2, 3]
    train(model, optimizer, 3)
    probe.close()
    assert [record.step for record in probe.drain()] == [4, 5, 6]
    assert all(row["rate"] for row in rows(tmp_path / "run/steps.csv"))
    assert len(rows(tmp_path / "run/steps.csv")) == 6


@pytest.mark.parametrize("make", [
    lambda model: OpposingPenaltyProbe(model, adamw(model.parameters()), output=5),
    lambda _: wd_probe.watch(output=5),
])  # fmt: skip
def test_what_is_no_path_is_refused(make):
    with pytest.raises(InputError, match="output: a path is needed, got int"):
        make(small())


@pytest.mark.parametrize(("path", "told"), [
    ("a\0b", r"output must be a path without NUL bytes, got 'a\\x00b'"),
    ("a\ud800", r"output must be a path of whole characters, got 'a\\ud800'"),
    ("x" * 256, "output must be a path that is not too long"),
    ("", "output: a path is needed, got an empty one"),
])  # fmt: skip
def test_what_no_file_system_takes_is_refused(path, told):
    model = small()
    with pytest.raises(InputError, match=told):
        OpposingPenaltyProbe(model, adamw(model.parameters()), output=path)
    with pytest.raises(InputError, match=told):
        wd_probe.watch(path)


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    trained(tmp_path / "run", 2)[2].close()
    model = small()
    optimizer = adamw(model.parameters())
    with pytest.raises(InputError, match="run holds a run already; choose another"):
        OpposingPenaltyProbe(model, optimizer, output=tmp_path / "run")
    assert not optimizer._optimizer_step_post_hooks
    assert summary(tmp_path / "run")["steps"] == 2


def test_what_cannot_be_logged(tmp_path):
    model = small()
    with (
        OpposingPenaltyProbe(model, adamw(model.parameters())) as bare,
        pytest.raises(InputError, match="there is no run folder to log to: give the probe output="),
    ):
        bare.log(loss=1.0)
    probe = trained(tmp_path / "run", 1)[2]
    with pytest.raises(InputError, match="loss must be one number, got Tensor"):
        probe.log(loss=torch.zeros(3))
    with pytest.raises(InputError, match="loss must be one number, got str"):
        probe.log(loss="1")
    with pytest.raises(InputError, match="loss must be one number, got ndarray"):
        probe.log(loss=np.ones(3))
    with pytest.raises(InputError, match="loss must be one number, got Tensor"):
        probe.log(loss=torch.ones((), device="meta"))
    with pytest.raises(InputError, match=r"top1 must be a share of 1, from 0 to 1, got 93\.5"):
        probe.log(top1=93.5)
    probe.close()
    with pytest.raises(InputError, match="log before close"):
        probe.log(loss=1.0)


def test_a_script_that_goes_elsewhere_leaves_its_run_where_it_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, optimizer, probe = trained("run", 2)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir("there")
    train(model, optimizer, 1)
    probe.close()
    assert summary(tmp_path / "run")["steps"] == 3
    assert not any(Path().iterdir())


def test_a_loop_that_never_steps_has_its_learning_rate_all_the_same(tmp_path):
    probe = trained(tmp_path / "run", 0)[2]
    probe.close()
    assert summary(tmp_path / "run")["lr"] == probe.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_decay_that_outruns_batch_norm_is_told(tmp_path, written, momentum):
    def outruns(frozen=False, rate=5.0):
        torch.manual_seed(0)
        blocks = []
        for _ in range(8):
            blocks += [nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=momentum), nn.ReLU()]
        model = nn.Sequential(*blocks, nn.Linear(8, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=rate)
        output = tmp_path / f"{frozen}-{rate}" if written else None
        probe = OpposingPenaltyProbe(model, optimizer, output=output)
        for layer in model:
            layer.train(not (frozen and isinstance(layer, nn.BatchNorm1d)))
        train(model, optimizer, 40)
        told = probe.summary().numbers["verdict"]
        probe.close()
        assert told == probe.summary().numbers["verdict"]
        return [one for one in told if one.startswith("Decay outruns batch norm: in the ")]

    (line,) = outruns()
    assert ("in the 10 steps" if momentum else "in the 40 steps") in line
    assert "each of its 8 layers" in line
    assert not outruns(frozen=True)
    assert not outruns(rate=1e-3)


def test_a_loop_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError):  # noqa: SIM117
        with trained(tmp_path / "run", 3)[2]:
            raise ZeroDivisionError
    assert (summary(tmp_path / "run")["status"], summary(tmp_path / "run")["steps"]) == (
        "failed",
        3,
    )


def test_a_probe_that_is_dropped_leaves_its_run_whole(tmp_path, monkeypatch):
    drawn = []

    def drawing(self):
        drawn.append(self.folder.path)
        self.folder.close()

    monkeypatch.setattr(recording.Recording, "draw", drawing)
    model, optimizer, probe = trained(tmp_path / "run", 3)
    model.probe = probe  # garbage in a circle
    del model, optimizer, probe
    gc.collect()
    assert summary(tmp_path / "run")["steps"] == 3
    assert len(rows(tmp_path / "run/steps.csv")) == 3
    assert not drawn
    own_loop._at_exit()
    assert drawn == [tmp_path / "run"]


@pytest.mark.slow
def test_a_script_that_ends_without_a_word(tmp_path):
    code = (
        "import wd_probe\n"
        "from tests.small import adamw, small, train\n"
        "model = small()\n"
        "optimizer = adamw(model.parameters())\n"
        f"folder = {str(tmp_path / 'run')!r}\n"
        "probe = wd_probe.OpposingPenaltyProbe(model, optimizer, output=folder)\n"
        "train(model, optimizer, 5)\n"
        "raise ValueError('of the script')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: of the script\n")
    assert len(rows(tmp_path / "run/steps.csv")) == 5
    assert summary(tmp_path / "run")["status"] == "failed"
    assert list((tmp_path / "run/figures").iterdir())


def test_what_is_open_when_python_ends(tmp_path, monkeypatch):
    probe = trained(tmp_path / "run", 3)[2]
    monkeypatch.setattr(sys, "last_type", ValueError, raising=False)
    own_loop._at_exit()
    assert (summary(tmp_path / "run")["status"], len(probe.records)) == ("failed", 3)
    assert len(rows(tmp_path / "run/steps.csv")) == 3


def test_a_signal_that_ends_the_process_is_ahead_of_no_writing(tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr(ending.os, "kill", lambda _, number: killed.append(number))
    model, optimizer, probe = trained(tmp_path / "run", 3)
    second = OpposingPenaltyProbe(model, optimizer, output=tmp_path / "second")
    train(model, optimizer, 2)
    signal.raise_signal(signal.SIGTERM)
    assert killed == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert len(rows(tmp_path / "run/steps.csv")) == 5
    assert len(rows(tmp_path / "second/steps.csv")) == 2
    assert summary(tmp_path / "run")["status"] == summary(tmp_path / "second")["status"]
    assert summary(tmp_path / "run")["status"] == "interrupted"
    assert len(probe.records) == 5
    assert len(second.records) == 2


def test_a_signal_waits_for_what_is_being_written(tmp_path, at_once, monkeypatch):
    killed, write = [], recording.Recording.write

    def wait(self, last):
        signal.raise_signal(signal.SIGTERM)
        assert not killed
        write(self, last)

    monkeypatch.setattr(ending.os, "kill", lambda *_: killed.append(tmp_path / "run/summary.json"))
    model, optimizer, _ = trained(tmp_path / "run", 1)
    with monkeypatch.context() as patch:
        patch.setattr(recording.Recording, "write", wait)
        train(model, optimizer, 1)
    assert killed
    assert killed[0].exists()


def test_a_scripts_own_way_with_signals_stays(tmp_path):
    def own(number, frame):
        came.append(number)
        if callable(found):  # as Lightning calls the handler that stood before its own
            found(number, frame)

    came, model = [], small()
    optimizer = adamw(model.parameters())
    with OpposingPenaltyProbe(model, optimizer, output=tmp_path / "run"):
        found = signal.signal(signal.SIGTERM, own)
        train(model, optimizer, 2)
        signal.raise_signal(signal.SIGTERM)
        train(model, optimizer, 2)
    assert (came, signal.getsignal(signal.SIGTERM)) == ([signal.SIGTERM], own)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with OpposingPenaltyProbe(model, optimizer, output=tmp_path / "other"):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert summary(tmp_path / "run")["steps"] == 4


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "_known_rank", 0)
    monkeypatch.setenv("RANK", "1")
    probe = trained(tmp_path / "run")[2]
    probe.log(loss=1.0, top1=0.5)
    probe.close()
    assert len(probe.records) == 8
    assert not (tmp_path / "run").exists()


def test_a_forked_process_writes_nothing(tmp_path, monkeypatch):
    model, optimizer, probe = trained(tmp_path / "run", 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        train(model, optimizer, 2)
        copy.copy(probe).close()
        own_loop._at_exit()
    assert not (tmp_path / "run/summary.json").exists()
    probe.close()
    assert summary(tmp_path / "run")["steps"] == 4


def test_a_round_is_written_when_nothing_more_comes_to_it(tmp_path, at_once):
    model = small()
    optimizers = [adamw(model[0].parameters()), adamw(model[2].parameters())]
    with OpposingPenaltyProbe(model, optimizers, output=tmp_path / "run") as probe:
        for step in range(3):
            loss_of(model, step).backward()
            for optimizer in optimizers:
                optimizer.step()
    told = rows(tmp_path / "run/steps.csv")
    assert [int(row["penalized"]) for row in told] == [record.penalized for record in probe.records]


def test_a_resumed_training_goes_on_in_a_new_folder(tmp_path):
    model, optimizer, probe = trained(tmp_path / "one", 3)
    state = pickle.loads(pickle.dumps(probe.state_dict()))
    probe.close()
    again = OpposingPenaltyProbe(model, optimizer, output=tmp_path / "two")
    again.load_state_dict(state)
    train(model, optimizer, 2)
    again.close()
    assert [row["step"] for row in rows(tmp_path / "two/steps.csv")] == ["4", "5"]
    assert summary(tmp_path / "two")["steps"] == 5


def test_a_copy_holds_what_was_measured_and_writes_nothing(tmp_path):
    probe = trained(tmp_path / "run", 3)[2]
    twin = pickle.loads(pickle.dumps(probe))
    twin.close()
    assert twin.records == probe.records
    with pytest.raises(InputError, match="no run folder"):
        twin.log(loss=1.0)
    assert not (tmp_path / "run/summary.json").exists()
    probe.close()


def test_a_callback_writes_one_too(tmp_path):
    model = small()
    optimizer = adamw(model.parameters())
    callback = Attached(output=tmp_path / "run")
    callback.attach(model, [optimizer])
    train(model, optimizer, 3)
    callback.detach()
    assert isinstance(callback.probe, wd_probe.OpposingPenaltyProbe)
    assert summary(tmp_path / "run")["steps"] == 3


def test_what_fails_in_writing_ends_no_training(tmp_path, at_once, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no more ink")

    with monkeypatch.context() as patch:
        patch.setattr(recording.Recorder, "step", fails)
        with pytest.warns(wd_probe.WdProbeWarning, match="not everything is written: no more ink"):
            model, optimizer, probe = trained(tmp_path / "run", 3)
    train(model, optimizer, 1)
    probe.close()
    assert len(probe.records) == 4


def test_what_fails_at_the_end_is_told_and_no_more(tmp_path, monkeypatch, draw):
    monkeypatch.setattr(recording.Recorder, "summary", lambda *_: 1 / 0)
    probe = trained(tmp_path / "run", 2)[2]
    with pytest.warns(WdProbeWarning, match="not everything is written: .*division"):
        probe.close()
    monkeypatch.setattr(recording.Recording, "draw", draw)
    own_loop._at_exit()
    assert not own_loop._undrawn


def test_a_scan_of_its_folder_is_told_what_to_do(tmp_path):
    trained(tmp_path / "run", 2)[2].close()
    assert summary(tmp_path / "run")["command"] == "loop"
    with pytest.raises(InputError, match=r"is of a script, .* save its weights, .*--model"):
        scan(ZeroshotOptions(run=tmp_path / "run"), Silent())


def test_groups_name_what_the_dashboard_shows(tmp_path):
    model = nn.Sequential(small(), small())
    groups = wd_probe.layers(model, coarse=True)
    optimizer = adamw(model.parameters())
    with OpposingPenaltyProbe(model, optimizer, groups=groups, output=tmp_path / "run"):
        (model[0](torch.ones(2, 8)).sum() + model[1](torch.ones(2, 8)).sum()).backward()
        optimizer.step()
    assert [layer["name"] for layer in summary(tmp_path / "run")["layers"]] == ["0", "1"]


def test_a_summary_is_that_of_the_command_line_and_of_the_folder(tmp_path):
    probe = trained(tmp_path / "run", 12)[2]
    live = probe.summary()
    probe.log(top1=0.5)
    probe.close()
    ended, found = probe.summary(), summary(tmp_path / "run")
    assert json.loads(folder_room.dumps(ended.numbers)) == found
    for key in ("verdict", "findings", "dynamics", "method", "optimizer", "weight_decay", "steps"):
        assert folder_room.dumps(live.numbers[key]) == folder_room.dumps(ended.numbers[key]), key
    for name in ("rate", "flip_rate"):
        assert live.numbers[name] == pytest.approx(ended.numbers[name])
    console = PrintableConsole(file=io.StringIO(), width=80)
    console.print(summary_told(found))
    for shown in (str(live), str(ended), console.file.getvalue()):
        words = " ".join(shown.split())
        assert " ".join(found["verdict"][0].split()) in words
        for part in ("12 steps", "What decay did", "R_op, share of weights", "Layers that oppose"):
            assert part in words, part
    assert "top-1 50.0 %" in str(ended)
    assert repr(ended) == "Summary(12 steps of Sequential)"


def test_a_summary_without_a_folder(recwarn):
    model = small()
    probe = OpposingPenaltyProbe(model, adamw(model.parameters()), history=2)
    assert "0 steps" in str(probe.summary())
    train(model, probe.optimizers[0], 30)
    found = probe.summary().numbers
    assert found["rate"]["mean"] == probe.total.rate  # though two records are kept
    assert found["steps"] == 30
    assert "What decay did" in probe._repr_html_()
    twin = copy.copy(probe)
    with pytest.raises(InputError, match="a copy of a probe has no model"):
        twin.summary()
    assert twin._repr_html_().startswith("OpposingPenaltyProbe(")
    before = [p.detach().clone() for p in model.parameters()]
    probe.summary()
    assert all(map(torch.equal, model.parameters(), before))


def test_a_summary_escapes_names():
    model = nn.ModuleDict({"<script>": nn.Linear(64, 64)})
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    for _ in range(3):
        model["<script>"](torch.randn(4, 64)).square().sum().backward()
        optimizer.step()
    for shown in (probe._repr_html_(), probe.records[-1]._repr_html_()):
        assert "&lt;script&gt;" in shown
        assert "<script>" not in shown
