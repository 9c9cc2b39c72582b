"""The states of real runs."""

import json
import math

import pytest
import torch
from torch import nn

from tests.small import Silent, batch
from tests.small import train as steps
from wd_probe import OpposingPenaltyProbe
from wd_probe.runs.folder import RunFolder
from wd_probe.runs.recorder import Recorder
from wd_probe.runs.states import States
from wd_probe.runs.verdict import Setting
from wd_probe.training.options import TrainOptions
from wd_probe.training.train import train


def summary(folder, model, lr, rate, **options):
    known = {"command": "rop", "steps": 20, "batch_size": 16, "every": 1, "output": folder}
    options = known | {"model": model, "lr": lr, "weight_decay": rate} | options
    return train(TrainOptions(**options), Silent())


def test_idle(tmp_path):
    found = summary(tmp_path / "run", "test_resnet", 1e-3, 0.01)
    assert found["dynamics"]["state"] == "idle"
    assert {layer["state"] for layer in found["layers"]} == {"idle"}
    assert found["dynamics"]["remaining"] == pytest.approx((1 - 1e-5) ** 20)
    assert found["dynamics"]["timescale_steps"] == pytest.approx(1e5)
    assert found["dynamics"]["timescale_epochs"] == pytest.approx(1e5 / 89)
    assert "near 50 at this η" in found["verdict"][0]
    written = json.loads((tmp_path / "run/summary.json").read_text())
    assert written["verdict"] == found["verdict"]
    assert written["dynamics"] == found["dynamics"]


def test_shrinking(tmp_path):
    found = summary(tmp_path / "run", "test_resnet", 1e-3, 3)
    assert found["dynamics"]["state"] == "shrinking"
    assert found["verdict"][0].startswith("Decay shrinks the weights in all 6 layers: 94.2 %")


def test_growing(tmp_path):
    found = summary(tmp_path / "run", "test_convnext", 1e-2, 1)
    assert found["dynamics"]["state"] == "growing"
    assert found["verdict"][0].startswith("The weights grow in spite of decay in")


def test_balanced_at_the_angle_of_equilibrium(tmp_path):
    found = summary(tmp_path / "run", "test_resnet", 1e-2, 5, steps=80)
    dynamics = found["dynamics"]
    assert dynamics["state"] == "balanced"
    assert dynamics["momentum"] == 0.9
    assert 0.8 < dynamics["balance"]["last"] < 1.25
    assert 0.8 < dynamics["balance"]["late"] < 1.25
    # of all together, the head among them
    predicted = math.sqrt(2 * 0.05 * (1 - 0.9) / (1 + 0.9))
    assert 0.7 < dynamics["angular_update"]["last"] / predicted < 1.3
    assert "of what equilibrium predicts)" in found["verdict"][0]


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "state"), [(0.01, "idle"), (1, "shrinking"), (10, "balanced")])
def test_the_three_runs_of_fact_24(tmp_path, rate, state):
    found = summary(tmp_path / "run", "test_resnet", 1e-3, rate, steps=600, batch_size=64)
    assert found["dynamics"]["state"] == state


@pytest.mark.parametrize("method", ["wd", "rwd", "pwd", "lpwd", "l2", "cautious", "corrected"])
@pytest.mark.filterwarnings("ignore:l2 goes through the optimizer")
def test_every_method_says_what_is_so(tmp_path, method):
    found = summary(tmp_path / "run", "test_convnext", 0.05, 0.5, method=method, opt="momentum",
                    steps=3)  # fmt: skip
    slowest = 1 / 0.025 * (1 if method != "lpwd" else 11 / 2)  # that of the first layer
    scales = {round(1 / (1 - layer["remaining"] ** (1 / 3)), 1) for layer in found["layers"]}
    if method not in ("l2", "cautious"):
        assert max(scales) == pytest.approx(slowest, rel=0.01)
    assert min(scales) <= found["dynamics"]["timescale_steps"] <= max(scales) + 0.1
    assert found["dynamics"]["state"] != "idle"
    told = " ".join(found["verdict"])
    assert ("own step" in told) == (method == "l2")
    assert ("1/(ηλ)" in told) == (method not in ("lpwd", "cautious"))
    assert (found["dynamics"]["momentum"] == 0.9) == (method not in ("l2", "cautious"))


def test_without_decay_nothing_is_said(tmp_path):
    found = summary(tmp_path / "run", "test_convnext", 1e-3, 0.5, method="baseline", steps=1,
                    command="train")  # fmt: skip
    assert "dynamics" not in found
    assert "verdict" not in found


def test_weights_that_do_not_decay_are_left_out(tmp_path):
    """Neither their growth nor their angle tells what decay does to the others."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    groups = [
        {"params": [net[0].weight, net[2].weight]},
        {"params": [net[0].bias, net[2].bias, *net[1].parameters()], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    with OpposingPenaltyProbe(net, optimizer) as probe:
        steps(net, optimizer, 20)
    found = States.of(probe.total, probe.late, probe.records[-1], dict(net.named_parameters()))
    total = probe.total
    assert found.run.whole.taken == total.total.taken
    assert found.run.whole.growth == sum(
        total.tensors[name].growth for name in ("0.weight", "2.weight")
    )
    assert found.run.whole.growth != total.total.growth
    assert [one.state is None for one in found.layers] == [False, True, False]
    assert [one.kind for one in found.tensors][:2] == ["matrices and kernels", "biases"]


def loop(folder, net, optimizer, setting=None, **options):
    """What a recorder says of some steps of any loop."""
    with RunFolder(folder) as to, OpposingPenaltyProbe(net, optimizer, **options) as probe:
        recorder = Recorder(to, probe)
        for step in range(1, 31):
            images, labels = batch(step, net.weight.dtype)
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(step, update=step)
        return recorder.summary(optimizer.param_groups[0]["weight_decay"], setting)


def linear():
    torch.manual_seed(0)
    return nn.Linear(8, 4)


def test_signs_alone_tell_no_state(tmp_path):
    net = linear()
    found = loop(tmp_path / "run", net, torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1.9),
                 keep="signs")  # fmt: skip
    assert found["dynamics"]["state"] is None
    assert found["dynamics"]["remaining"] == pytest.approx((1 - 1.9e-3) ** 30)
    assert math.isnan(found["dynamics"]["balance"]["mean"])
    assert "keep='whole' measures it" in found["verdict"][0]


def test_a_schedule_that_ends_at_zero(tmp_path):
    net = linear()
    optimizer = torch.optim.AdamW(net.parameters(), 0.02, weight_decay=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 29)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    found = loop(tmp_path / "run", net, optimizer)
    assert found["dynamics"]["state"] != "idle"
    left = math.prod(1 - 0.02 * (29 - k) / 29 for k in range(30))
    assert found["dynamics"]["remaining"] == pytest.approx(left)
    assert found["dynamics"]["timescale_steps"] == pytest.approx(100)
    assert math.isnan(found["dynamics"]["balance"]["last"])


def test_weights_that_are_no_numbers(tmp_path):
    net = linear()
    nn.init.constant_(net.weight, math.nan)
    nn.init.constant_(net.bias, math.nan)
    found = loop(tmp_path / "run", net, torch.optim.AdamW(net.parameters(), 0.1, weight_decay=1.0))
    assert found["dynamics"]["state"] is None
    assert found["verdict"] == [
        "The weights are not finite, so what decay did to them cannot be told."
    ]


@pytest.mark.filterwarnings("ignore:bfloat16 rounds decay")
def test_half_precision_that_loses_its_decay(tmp_path):
    net = linear().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.1)
    setting = Setting(lr=1e-3, rule="wd", optimizer="adamw")
    found = loop(tmp_path / "run", net, optimizer, setting)
    assert found["dynamics"]["remaining"] == 1
    assert found["verdict"][0].startswith("Nothing was taken off in this run, although λ is 0.1")
    assert found["verdict"][1].startswith("In bfloat16 (1 − c)θ rounds back to θ: 100 %")
