import json

import pytest
import torch
from safetensors.torch import load_file

from tests.small import FAST, rows


@pytest.mark.figures
def test_rop_end_to_end(wdprobe, tmp_path):
    code, out, err = wdprobe("rop", *FAST, "--steps", 14, "--lr", 1e-3, "--output", "run", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert set(result) >= {
        "command", "model", "method", "optimizer", "steps", "penalized", "rate", "mass",
        "flip_rate", "layers", "top1", "run",
    }  # fmt: skip
    assert (result["command"], result["method"], result["optimizer"]) == ("rop", "wd", "adamw")
    assert result["steps"] == 14
    assert set(result["rate"]) == set(result["mass"]) == {"mean", "max", "last"}
    assert 0 < result["rate"]["mean"] <= result["rate"]["max"] < 1
    assert all(set(x) >= {"index", "name", "rate", "mass"} for x in result["layers"])
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith("events")) == [
        "config.json", "epochs.csv", "figures", "layers.csv", "model.safetensors", "profile.csv",
        "steps.csv", "summary.json", "tensors.csv",
    ]  # fmt: skip
    assert len(list((run / "figures").glob("*.png"))) == 5
    assert json.loads((run / "summary.json").read_text()) == result
    config = json.loads((run / "config.json").read_text())
    assert config["c"].startswith("lr*rate")
    assert config["command_line"].startswith("wdprobe rop --model test_convnext --batch-size 32")
    assert {"torch", "timm", "wd-probe"} <= set(config["versions"])
    steps = rows(run / "steps.csv")
    assert [int(r["step"]) for r in steps] == list(range(1, 15))
    mean = sum(float(r["rate"]) for r in steps) / 14
    assert result["rate"]["mean"] == pytest.approx(mean)
    assert len(rows(run / "layers.csv")) == 14 * len(result["layers"])
    assert set(load_file(run / "model.safetensors"))


@pytest.mark.figures
def test_tensorboard_gets_few_tags_and_all_kinds(wdprobe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert wdprobe("rop", *FAST, "--steps", 4, "--output", "run")[0] == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = events.Tags()
    scalars = set(tags["scalars"])
    assert {"R_op/rate", "R_op/mass", "R_op/flip_rate", "train/loss", "test/top1"} <= scalars
    stages = {tag.rpartition("/")[2] for tag in scalars if " by stage/" in tag}
    assert stages == {"01", "02", "03", "04", "05", "last"}
    assert len({tag for tag in scalars if " by stage/" not in tag}) < 20
    charts = {"R_op", "balance", "angular_update", "relative_update", "remaining"}
    assert scalars >= {f"{chart} by stage/{stage}" for chart in charts for stage in stages}
    assert len(tags["images"]) == 5
    assert tags["tensors"] == ["summary/text_summary"]
    assert [e.step for e in events.Scalars("R_op/rate")] == [1, 2, 3, 4]
    assert (tmp_path / "run").glob("events.out.tfevents.*")


def test_a_seeded_cpu_run_repeats_exactly(wdprobe, tmp_path):
    for name in ("a", "b"):
        assert wdprobe("rop", *FAST, "--steps", 6, "--seed", 3, "--output", name)[0] == 0
    for file in ("steps.csv", "layers.csv", "tensors.csv", "profile.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "options",
    [
        ["--opt", "momentum", "--method", "wd", "--lr", "0.05"],
        ["--opt", "adam", "--method", "wd", "--convention", "rate", "--filter-bias-and-bn"],
        ["--filter-bias-and-bn", "--every", "2"],
        ["--amp", "--channels-last"],
        ["--amp", "--amp-dtype", "float16"],
        ["--model", "test_vit", "--opt", "lookahead_adamw"],
        ["--opt-kwargs", "fused=True", "--opt-kwargs", "betas=(0.8, 0.9)"],
    ],
)
def test_ways_to_run(wdprobe, options):
    code, out, err = wdprobe("rop", *FAST, "--steps", 5, "--json", *options)
    assert code == 0, err
    result = json.loads(out)
    assert result["rate"]["mean"] is not None
    assert result["measured_steps"] == (3 if "--every" in options else 5)


@pytest.mark.parametrize("method", ["l1", "l2", "rwd", "pwd", "lpwd"])
@pytest.mark.filterwarnings("ignore:.*measured against a copy:wd_probe.WdProbeWarning")
def test_every_method_can_be_measured(wdprobe, tmp_path, method):
    code, out, err = wdprobe(
        "rop", *FAST, "--opt", "adam", "--method", method, "--steps", 4, "--lr", 0.01, "--json",
        "--output", "run",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["method"] == method
    assert (result["rate"]["mean"] > 0) == (method in ("l1", "l2"))
    assert ("literal_rate" in result) == ("literal_rate" in rows(tmp_path / "run/steps.csv")[0])
    if method in ("pwd", "lpwd"):
        assert result["literal_rate"]["mean"] > 0
    assert result["scale"] == ("max2" if method == "lpwd" else None)


@pytest.mark.filterwarnings("ignore:.*measured against a copy:wd_probe.WdProbeWarning")
def test_the_optimizers_own_l2_is_measured_and_named(wdprobe):
    code, out, _ = wdprobe("rop", *FAST, "--opt", "momentum", "--steps", 3, "--json")
    assert code == 0
    assert json.loads(out)["method"] == "l2"


def test_spared_tensors_are_not_penalized(wdprobe, tmp_path):
    full = json.loads(wdprobe("rop", *FAST, "--steps", 1, "--json")[1])
    code, out, _ = wdprobe(
        "rop", *FAST, "--steps", 1, "--json", "--filter-bias-and-bn", "--output", "run"
    )
    assert code == 0
    assert json.loads(out)["penalized"] < full["penalized"]
    spared = {r["name"] for r in rows(tmp_path / "run/tensors.csv") if r["penalized"] == "0"}
    assert "head.fc.bias" in spared
    assert "head.fc.weight" not in spared


def test_swin_at_32(wdprobe):
    code, out, err = wdprobe(
        "rop", "--model", "swin_tiny_patch4_window7_224", "--steps", 1, "--batch-size", 8, "--json"
    )
    assert code == 0, err
    assert len(json.loads(out)["layers"]) > 10
