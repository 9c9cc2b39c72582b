from types import SimpleNamespace

import pytest
from wd_probe.cli import progress
from wd_probe.cli.progress import SweepProgress

CELL = SimpleNamespace(name="cell")
FINISHED = {"status": "finished"}


@pytest.fixture
def told(monkeypatch, capsys):
    """A sweep's lines as they come, however fast."""
    monkeypatch.setattr(progress, "_LINE_SECONDS", -1.0)

    def lines():
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("cell ")]

    return lines


def test_one_after_another_one_runs_until_the_last_has_ended(told):
    with SweepProgress() as sweep:
        sweep.begun(4, 1)
        for _ in range(3):
            sweep.cell_started(CELL)
            sweep.cell_ended(CELL, FINISHED)
    assert [line.split(" · ")[:2] for line in told()] == [
        ["cell 1/4", "1 running"], ["cell 2/4", "1 running"], ["cell 3/4", "1 running"],
        ["cell 4/4", "0 running"],
    ]  # fmt: skip


def test_of_several_at_once_those_are_counted_that_have_not_ended(told):
    with SweepProgress() as sweep:
        sweep.begun(3, 0)
        sweep.cell_started(CELL)
        sweep.cell_started(CELL)
        sweep.cell_ended(CELL, FINISHED)
        sweep.cell_started(CELL)
        sweep.cell_ended(CELL, {"status": "failed", "error": "no room"})
        sweep.cell_ended(CELL, FINISHED)
    assert [line.rsplit(" · ", 1)[0] for line in told()] == [
        "cell 0/3 · 1 running", "cell 0/3 · 2 running", "cell 1/3 · 2 running",
        "cell 2/3 · 1 running · 1 failed", "cell 3/3 · 0 running · 1 failed",
    ]  # fmt: skip


def test_the_cells_are_counted_in_words(capsys):
    with SweepProgress() as sweep:
        sweep.begun(1, 0)
    assert capsys.readouterr().err.splitlines()[0] == "1 cell"
