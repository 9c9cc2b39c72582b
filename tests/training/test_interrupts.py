import json
import shlex
import signal
import sys

import pytest
from wd_probe.cli.progress import TrainingProgress

from wd_probe.training.interrupts import Interrupts

SHORT = ("rop", "--model", "test_efficientnet", "--method", "wd",
         "--batch-size", 256, "--epochs", 2)  # fmt: skip


@pytest.fixture(autouse=True)
def heard():
    """Under nohup and in some CI SIGINT is ignored from the start."""
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, was)


def test_the_first_is_held_back_and_the_second_is_not():
    with Interrupts() as interrupts:
        interrupts.raise_if_asked()
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not interrupts.between_steps
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_if_asked()
        assert interrupts.between_steps
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_between_steps_it_is_raised_at_once():
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt), interrupts.at_once():
        signal.raise_signal(signal.SIGINT)
    assert interrupts.between_steps


def test_handlers_of_ones_own_are_left_alone(monkeypatch):
    got = []
    was = signal.signal(signal.SIGINT, lambda *_: got.append(1))
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
        assert (got, interrupts.asked) == ([1], False)
    finally:
        signal.signal(signal.SIGINT, was)


def test_ctrl_c_ends_at_a_step_and_the_command_that_it_prints_resumes_there(
    wdprobe, monkeypatch, tmp_path
):
    assert wdprobe(*SHORT, "--output", "whole")[0] == 0
    stepped, steps = TrainingProgress.stepped, []

    def interrupting(self, step, record):
        steps.append(step.step)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        stepped(self, step, record)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "stepped", interrupting)
        code, _, err = wdprobe(*SHORT, "--output", "a run")
    assert code == 130
    assert steps == [1, 2, 3]
    assert "interrupted after step 3; what was measured is kept, and this goes on from its last " \
        "save:" in err  # fmt: skip
    (again,) = (line for line in err.splitlines() if line.startswith("wdprobe rop --resume"))
    _, *arguments = shlex.split(again)
    assert arguments == ["rop", "--resume", "a run"]
    code, _, err = wdprobe(*arguments, "--recovery-interval", 0)
    assert code == 0, err
    assert "after step 3 of 10" in err
    for name in ("steps.csv", "layers.csv", "epochs.csv", "tensors.csv"):
        assert (tmp_path / "a run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "a run" / "config.json").read_text())["resumed_at"] == [3]


def test_ctrl_c_while_it_evaluates_is_resumed_before_the_evaluation(wdprobe, monkeypatch, tmp_path):
    from wd_probe.training import train

    evaluate = train.evaluate

    def interrupting(*arguments):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", interrupting)
        assert wdprobe(*SHORT, "--output", "run")[0] == 130
    code, _, _ = wdprobe("rop", "--resume", "run")
    assert code == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["resumed_at"] == [5]


def test_a_sweep_that_is_interrupted_prints_its_command(wdprobe, monkeypatch):
    monkeypatch.setattr(TrainingProgress, "stepped", None)  # cells have a listener of their own
    from wd_probe.sweeps import cells

    def interrupting(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "train", interrupting)
    arguments = ["sweep", "--model", "test_efficientnet", "--lr", "0.1,0.2", "--output", "my sweep"]
    code, _, err = wdprobe(*arguments)
    assert code == 130
    assert shlex.join(["wdprobe", *arguments]) == err.splitlines()[-1]
    assert sys.argv[0] == "wdprobe"
