import json
import math
import socket
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from wd_probe import InputError, layers
from wd_probe.layering import Layer, Layers
from wd_probe.probe.records import StepRecord
from wd_probe.probe.sums import AT, WIDTH
from wd_probe.runs import figures
from wd_probe.runs.tensorboard import Dashboard, serve

NAMES = ("stem.weight", "head.weight", "head.bias")
STAGES = Layers((Layer(1, "stem", NAMES[:1]), Layer(2, "head", NAMES[1:])), "given")


def shown(path):
    return EventAccumulator(str(path), size_guidance={"tensors": 0}).Reload()


def points(path):
    found = shown(path)
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_numbers_are_points_and_what_is_no_number_is_left_out(tmp_path):
    board = Dashboard(tmp_path, STAGES)
    board.scalars(3, {"train/loss": 0.5, "train/lr": math.nan, "test/loss": math.inf})
    board.scalars(4, {"train/loss": 0.25})
    board.close()
    assert points(tmp_path) == {"train/loss": [(3, 0.5), (4, 0.25)]}


def tally(**sums):
    row = np.zeros(WIDTH)
    for name, value in sums.items():
        row[AT[name]] = value
    return row


STEP = np.array([
    tally(penalized=10, opposing=5, flipped=4, opposing_penalty=1, total_penalty=4, squared=4,
          moved=0.04, updated=0.01, growth=1, taken=4, decayed=10, shares=0.1, held=10, left=9),
    tally(penalized=20, opposing=2, flipped=1, total_penalty=4, squared=4, moved=0.01,
          updated=0.0025, growth=2, taken=1, decayed=20, shares=0.1, held=20, left=15),
    tally(squared=1, moved=1, updated=1, growth=100),  # a bias that does not decay
])  # fmt: skip


def test_a_step_has_its_totals_and_a_chart_a_stage(tmp_path):
    board = Dashboard(tmp_path, STAGES)
    board.record(7, StepRecord(9, STEP, NAMES, STAGES))
    board.flush()
    assert points(tmp_path) == {
        "R_op/rate": [(7, 7 / 30)],
        "R_op/mass": [(7, 1 / 8)],
        "R_op/flip_rate": [(7, 5 / 30)],
        "decay/balance": [(7, 3 / 5)],
        "decay/angular_update": [(7, math.atan(math.sqrt(0.05 / 8)))],
        "decay/relative_update": [(7, math.sqrt(0.0125 / 8))],
        "decay/remaining": [(7, 24 / 30)],
        "R_op by stage/01": [(7, 0.5)],
        "R_op by stage/last": [(7, 0.1)],
        "balance by stage/01": [(7, 1 / 4)],
        "balance by stage/last": [(7, 2)],
        "angular_update by stage/01": [(7, math.atan(0.1))],
        "angular_update by stage/last": [(7, math.atan(0.05))],
        "relative_update by stage/01": [(7, 0.05)],
        "relative_update by stage/last": [(7, 0.025)],
        "remaining by stage/01": [(7, 0.9)],
        "remaining by stage/last": [(7, 0.75)],
    }
    board.close()


def test_what_was_not_measured_has_no_chart(tmp_path):
    """Nothing decays, and of weights kept by their signs no size is known."""
    board = Dashboard(tmp_path, STAGES)
    board.record(7, StepRecord(9, np.zeros((3, WIDTH)), NAMES, STAGES))
    assert points(tmp_path) == {}
    board.close()


def test_models_share_the_charts_of_their_stages_and_a_chart_names_its_layer(tmp_path):
    parts = (("conv1", NAMES[:1]), ("layer1", NAMES[2:]), ("fc", NAMES[1:2]))
    other = Layers((Layer(k, *part) for k, part in enumerate(parts, start=1)), "given")
    for folder, stages in (("a", STAGES), ("b", other)):
        board = Dashboard(tmp_path / folder, stages)
        for step in (1, 2):
            board.record(step, StepRecord(step, STEP, NAMES, stages))
        board.close()
    found = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    a, b = (found.PluginRunToTagToContent("scalars")[folder].keys() for folder in "ab")
    assert {"R_op by stage/01", "balance by stage/last"} <= (a & b)
    told = [
        found.SummaryMetadata(folder, f"R_op by stage/{stage}").summary_description
        for folder, stage in (("a", "01"), ("b", "01"), ("a", "last"), ("b", "last"))
    ]
    assert told == [
        "Stage 1 of 2: stem.", "Stage 1 of 3: conv1.", "Stage 2 of 2: head.", "Stage 3 of 3: fc.",
    ]  # fmt: skip


def test_stages_are_numbered_so_that_they_sort(tmp_path):
    names = tuple(f"{k}.weight" for k in range(12))
    stages = Layers(tuple(Layer(k + 1, f"s{k}", (n,)) for k, n in enumerate(names)), "given")
    board = Dashboard(tmp_path, stages)
    board.record(1, StepRecord(1, np.ones((12, WIDTH)), names, stages))
    board.close()
    tags = [tag for tag in sorted(points(tmp_path)) if tag.startswith("R_op by stage/")]
    assert tags[0] == "R_op by stage/01"
    assert tags[10] == "R_op by stage/11"
    assert tags[-1] == "R_op by stage/last"


SUMMARY = {
    "model": "m", "dataset": "digits", "optimizer": "adamw", "method": "wd", "lr": 0.001,
    "weight_decay": 0.05, "steps": 8, "top1": 0.5, "status": "finished",
}  # fmt: skip
RATES = {
    **{name: {"mean": 0.1, "max": 0.25, "last": 0.05} for name in ("rate", "mass", "flip_rate")},
    "findings": ["A finding."],
    "layers": [{"index": k, "name": f"l{k}", "rate": rate}
               for k, rate in enumerate((0.1, math.nan, 0.3), start=1)],
}  # fmt: skip


def text(path):
    (event,) = shown(path).Tensors("summary/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_the_end_of_a_run_is_its_figures_a_text_and_a_row_to_compare(tmp_path):
    board = Dashboard(tmp_path, STAGES)
    figure = figures.new_figure("a figure")
    board.summary(SUMMARY | RATES, {"lr": 0.001, "model": "m"}, {"one": figure})
    board.close()
    lines = text(tmp_path).splitlines()
    assert lines[0] == (
        "**m** on digits, adamw, method wd, η 0.001, λ 0.05, 8 steps, top-1 50.0 % (finished)"
    )
    assert "| R_op (share of weights) | 10 % | 25 % | 5 % |" in lines
    assert "- A finding." in lines
    assert not any("state" in line for line in lines), "as a run of an older version"
    assert lines[-2:] == ["| 3 l3 | 30 % |", "| 1 l1 | 10 % |"]
    found = shown(tmp_path)
    (image,) = found.Images("figures/one")
    assert (image.step, image.width, image.height) == (8, 1050, 570)
    plugin = found.PluginTagToContent("hparams")
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(plugin)
    assert [event.value for event in found.Scalars("hparams/R_op max")] == [0.25]


DYNAMICS = {
    "verdict": ["Decay did it."],
    "dynamics": {
        "state": "shrinking", "remaining": 0.75, "timescale_steps": 100.0, "timescale_epochs": 2.0,
        **{name: {"mean": 0.5, "last": 0.25}
           for name in ("balance", "angular_update", "relative_update")},
    },
    "layers": [
        {"index": 1, "name": "stem", "rate": 0.1, "state": "balanced", "balance": 1.0,
         "remaining": 0.75, "angular_update": 0.25, "norm": 2.0},
        {"index": 2, "name": "head", "rate": 0.2, "state": "shrinking", "balance": 0.5,
         "remaining": 0.5, "angular_update": 0.125, "norm": 3.0},
    ],
}  # fmt: skip


def test_the_end_of_a_run_opens_with_what_decay_did(tmp_path):
    board = Dashboard(tmp_path, STAGES)
    board.summary(SUMMARY | RATES | DYNAMICS, {"lr": 0.001}, {})
    board.close()
    lines = [line for line in text(tmp_path).splitlines() if line]
    assert lines[1] == "- Decay did it."
    assert "| taken off | 25 % of what stood at the start |" in lines
    assert "| timescale 1/c | 100 steps, 2 epochs |" in lines
    assert "| layers | 0 idle · 1 shrinking · 1 balanced · 0 growing |" in lines
    worst = lines.index("| 2 | head | shrinking | 0.5 | 50 % | 0.125 | 3 |")
    assert lines[worst + 1] == "| 1 | stem | balanced | 1 | 25 % | 0.25 | 2 |"
    found = shown(tmp_path)
    assert [event.value for event in found.Scalars("hparams/remaining")] == [0.75]
    assert [event.value for event in found.Scalars("hparams/balance")] == [0.5]


def test_a_run_without_a_probe_has_a_line_alone(tmp_path):
    board = Dashboard(tmp_path, STAGES)
    board.summary(SUMMARY, {}, {})
    board.close()
    assert text(tmp_path).count("\n") == 0
    assert "hparams/R_op mean" not in shown(tmp_path).Tags()["scalars"]


def test_whatever_the_file_system_says_is_an_oserror(tmp_path):
    board = Dashboard(tmp_path / "run", layers(torch.nn.Linear(2, 2), coarse=True))

    class Full(Exception):
        pass

    def fail(*_):
        raise Full("disk")

    board._writer._get_file_writer = fail
    with pytest.raises(OSError, match="TensorBoard's file: disk"):
        board.scalars(1, {"a": 1.0})
    board.close()


# --- serving --------------------------------------------------------------------------------------


def test_the_dashboard_reads_event_files_only(tmp_path):
    """TensorBoard's projector would read any file that a folder's projector_config.pbtxt names."""
    (tmp_path / "projector_config.pbtxt").write_text(
        'embeddings { tensor_name: "a" metadata_path: "/etc/hostname" }'
    )
    with urlopen(f"{serve(tmp_path, 0)}data/plugins_listing") as answer:
        assert {"scalars", "images", "hparams"} <= (listed := json.load(answer)).keys()
    assert "projector" not in listed


def test_a_folder_or_a_port_that_is_not_to_be_had_is_named(tmp_path):
    with pytest.raises(InputError, match="none is no folder; run `wdprobe rop` first"):
        serve(tmp_path / "none", 0)
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"TensorBoard cannot start: .*; try --port 0"):
            serve(tmp_path, taken.getsockname()[1])
