import json
import math
import socket
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wd_probe import InputError, layers
from wd_probe.layering import Layer, Layers
from wd_probe.probe.records import StepRecord
from wd_probe.probe.sums import WIDTH
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


def test_a_step_has_its_totals_and_a_chart_a_stage(tmp_path):
    counts = [[10, 5, 4, 0, 1.0, 4.0], [20, 2, 1, 0, 0.0, 4.0], [10, 1, 1, 0, 1.0, 8.0]]
    values = np.pad(np.array(counts), ((0, 0), (0, WIDTH - 6)))
    board = Dashboard(tmp_path, STAGES)
    board.record(7, StepRecord(9, values, NAMES, STAGES))
    board.flush()
    assert points(tmp_path) == {
        "R_op/rate": [(7, 8 / 40)],
        "R_op/mass": [(7, 2 / 16)],
        "R_op/flip_rate": [(7, 6 / 40)],
        "R_op by stage/1 stem": [(7, 0.5)],
        "R_op by stage/2 head": [(7, 0.1)],
    }
    board.close()


def test_stages_are_numbered_so_that_they_sort(tmp_path):
    names = tuple(f"{k}.weight" for k in range(12))
    stages = Layers(tuple(Layer(k + 1, f"s{k}", (n,)) for k, n in enumerate(names)), "given")
    board = Dashboard(tmp_path, stages)
    board.record(1, StepRecord(1, np.ones((12, WIDTH)), names, stages))
    board.close()
    tags = [tag for tag in sorted(points(tmp_path)) if tag.startswith("R_op by stage/")]
    assert tags[0] == "R_op by stage/01 s0"
    assert tags[-1] == "R_op by stage/12 s11"


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
    assert lines[-2:] == ["| 3 l3 | 30 % |", "| 1 l1 | 10 % |"]
    found = shown(tmp_path)
    (image,) = found.Images("figures/one")
    assert (image.step, image.width, image.height) == (8, 1050, 570)
    plugin = found.PluginTagToContent("hparams")
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(plugin)
    assert [event.value for event in found.Scalars("hparams/R_op max")] == [0.25]


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

    board._writer.add_scalar = fail
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
