"""The summary of a run in the terminal: what decay did, first."""

import copy
import math

import pytest
from wd_probe.cli import console, rop_and_train

from tests.small import FAST
from wd_probe.runs import summary_tables
from wd_probe.runs.summary_tables import what_decay_did
from wd_probe.tables import ByWidth

LAYER = {"index": 1, "name": "conv1", "rate": 0.001, "mass": 1e-5, "flip_rate": 0.001,
         "norm": 12.3456, "balance": 0.97, "angular_update": 0.03, "remaining": 0.05,
         "state": "balanced"}  # fmt: skip
STATISTICS = {"mean": 0.5, "last": 0.97}
SUMMARY = {
    "method": "wd",
    "steps": 88,
    "dynamics": {"state": "balanced", "remaining": 0.05, "timescale_steps": 33.333,
                 "timescale_epochs": 1.51515, "momentum": 0.9, "balance": STATISTICS,
                 "angular_update": STATISTICS, "relative_update": STATISTICS},
    "layers": [LAYER],
}  # fmt: skip


@pytest.fixture
def shown(monkeypatch, capsys):
    """What is printed of a summary, line by line without repeated spaces."""

    def show(summary, width=160):
        monkeypatch.setattr(console.out, "_width", width)
        console.out.print(ByWidth(lambda width: what_decay_did(summary, width)))
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width
        return [" ".join(line.split()) for line in lines]

    return show


def test_what_it_says(shown):
    lines = shown(SUMMARY)
    for line in (
        "taken off 95 % of what stood at the start",
        "timescale 1/c 33.3 steps, 1.52 epochs",
        "the run 88 steps, 4 epochs",
        "balance 0.5 over all steps, 0.97 at the last",
        "angle per step 0.5 over all steps, 0.97 at the last",
        "layers 0 idle · 0 shrinking · 1 balanced · 0 growing",
        "1 conv1 balanced 0.97 95 % 0.03 12.3",
    ):
        assert line in lines
    assert "idle: more than 95 % of the start left" in lines[-1]
    assert lines[-1].endswith("shrinking below 0.8, growing above 1.25")


def test_the_worst_layers_come_first(shown):
    states = [("balanced", 1.2), ("shrinking", 0.5), ("growing", 3.0), ("idle", -0.1),
              ("balanced", 1.0), ("idle", math.nan), ("shrinking", 0.01), ("idle", 1.0),
              ("idle", 1.1), (None, math.nan)]  # fmt: skip
    layers = [
        LAYER | {"index": k, "state": state, "balance": balance}
        for k, (state, balance) in enumerate(states)
    ]
    lines = shown(SUMMARY | {"layers": layers})
    assert "Layers by what decay does to them, the worst 8 of 10" in lines
    order = [line.split()[0] for line in lines if " conv1 " in line]
    assert order == ["3", "5", "6", "2", "1", "8", "7", "0"]


def test_numbers_that_are_not_known(shown):
    summary = copy.deepcopy(SUMMARY)
    nothing = {"mean": math.nan, "last": None}
    summary["dynamics"] |= {"timescale_epochs": None, "balance": nothing}
    lines = shown(summary)
    assert {"timescale 1/c 33.3 steps", "the run 88 steps"} <= set(lines)
    assert "balance – over all steps, – at the last" in lines
    summary["dynamics"]["timescale_steps"] = math.inf
    summary["layers"] = [LAYER | {"state": None}]
    lines = shown(summary)
    assert "timescale 1/c none: nothing is taken off" in lines
    assert not any("conv1" in line for line in lines)


@pytest.mark.parametrize("width", [80, 160])
def test_the_verdict_opens_the_summary(wdprobe, monkeypatch, width):
    monkeypatch.setattr(console.out, "_width", width)
    code, out, err = wdprobe("rop", *FAST, "--steps", 3, "--lr", 1e-3, "--output", "run")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= width
    text = " ".join(out.split())
    places = [
        text.index(part)
        for part in ("3 steps", "Decay did nothing in this run: it took 0.003 % off", "taken off",
                     "Layers by what decay does", "R_op, share of weights", "• ", "Run folder")
    ]  # fmt: skip
    assert places == sorted(places)


def test_old_summaries_have_none(monkeypatch, capsys):
    """As of a resumed run that an older version began."""
    statistics = {"mean": 0.1, "max": 0.1, "last": 0.1}
    summary = {
        "command": "rop", "scale": None, "status": "finished", "model": "m", "dataset": "digits",
        "optimizer": "adamw", "lr": 0.1, "weight_decay": 0.1, "top1": None, "epochs": 0,
        "best10": {}, "other_top1": None, "chosen": None, "rate": statistics, "mass": statistics,
        "flip_rate": statistics, "layer_definition": "timm", "findings": ["found"], "run": "run",
        "verdict": ["What decay did is not told."],
    }  # fmt: skip
    rop_and_train._show(SUMMARY | summary | {"dynamics": SUMMARY["dynamics"]})
    assert "What decay did\n" in capsys.readouterr().out
    old = SUMMARY | summary
    del old["dynamics"]
    rop_and_train._show(old)
    out = capsys.readouterr().out
    assert "What decay did is not told." in out
    assert "What decay did\n" not in out
    assert "• found" in out


@pytest.mark.parametrize(
    ("epochs", "best", "told"),
    [(1, 1, None), (4, 4, "mean of 4 epochs"), (12, 10, "mean of the best 10 epochs")],
)
def test_the_best_epochs_are_called_so_where_there_are_others(capsys, epochs, best, told):
    top1 = {"top1": 0.9441, "best10": {"mean": 0.942, "epochs": best}, "epochs": epochs}
    told_of = summary_tables._scores({**top1, "other_top1": None, "chosen": None})
    console.out.print(*told_of)
    line = capsys.readouterr().out.strip()
    assert line == "top-1 94.4 %" + (f" · {told} 94.2 %" if told else "")
