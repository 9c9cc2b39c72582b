import json
import re
import shutil

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from tests.small import Silent, rows
from tests.strangers import ESCAPE
from tests.training.datasets import idx_files
from wd_probe import RunError
from wd_probe.runs import figures
from wd_probe.runs.reading import read_run
from wd_probe.training import models
from wd_probe.training.data import HeldBatches
from wd_probe.training.options import ZeroshotOptions
from wd_probe.training.scan import Judge, Subject, metrics, prepare, scan

SMALL = ["--num-samples", "64", "--steps", "10"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of `wdprobe rop`, made once."""
    from wd_probe.training.options import TrainOptions
    from wd_probe.training.train import train

    path = tmp_path_factory.mktemp("trained") / "run"
    train(
        TrainOptions(
            command="rop",
            every=1,
            model="test_convnext",
            batch_size=32,
            lr=1e-3,
            steps=60,
            output=path,
        ),
        Silent(),
    )
    return path


class Watcher:
    """Interrupts a scan after so many points; never if 0."""

    def __init__(self, points=0):
        self.points = points

    def note(self, _): ...

    def progress(self, what, done, *_):
        if what == "scan" and done == self.points:
            raise KeyboardInterrupt


def test_a_run_is_scanned(wdprobe, trained, tmp_path):
    code, out, err = wdprobe(
        "zeroshot", "--run", trained, *SMALL, "--by", "layer", "--by-steps", 4, "--output", "z",
        "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert set(result) >= {"command", "model", "curve", "half_life", "run"}
    assert [p["step"] for p in result["curve"]] == list(range(11))
    assert set(result["curve"][0]) == {"step", "scale", "top1", "loss", "agreement", "kl"}
    scales = ["1.0", "0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3", "0.2", "0.1", "0.0"]
    assert [str(p["scale"]) for p in result["curve"]] == scales, "1 - 9/10 is 0.09999999999999998"
    first, last = result["curve"][0], result["curve"][-1]
    assert (first["agreement"], first["kl"]) == (1, pytest.approx(0, abs=1e-6))
    assert first["top1"] > 0.5
    assert last["loss"] == pytest.approx(2.302585, abs=1e-4)  # all logits equal: ln 10
    assert 0 < result["half_life"] < 1
    lives = [part["half_life"] or 0 for part in result["parts"]]
    assert lives == sorted(lives, reverse=True)
    run = tmp_path / "z"
    assert {p.name for p in (run / "figures").iterdir()} == {
        "zeroshot.png", "zeroshot_by_part.png", "distortion.png",
    }  # fmt: skip
    assert [row["scale"] for row in rows(run / "curve.csv")] == scales
    assert len(rows(run / "parts.csv")) == 5 * len(result["parts"])
    assert len(rows(run / "distortion.csv")) == 11 * len(result["parts"])
    assert not (run / "model.safetensors").exists()


def test_a_checkpoint_in_a_run_folder_is_seen_at_the_runs_size(wdprobe, trained, tmp_path):
    """The model's own is 160."""
    given = ["zeroshot", "--model", "test_convnext", *SMALL, "--no-distortion", "--steps", 1]
    code, out, err = wdprobe(*given, "--checkpoint", trained / "model.safetensors")
    assert code == 0, err
    assert "64 images of 32×32, 10 classes" in out
    assert "no better than chance" not in err
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("zeroshot-test_convnext-")
    assert json.loads((run / "config.json").read_text())["img_size"] == 32
    alone = tmp_path / "weights.safetensors"
    alone.write_bytes((trained / "model.safetensors").read_bytes())
    code, out, err = wdprobe(*given, "--checkpoint", alone, "--output", "z")
    assert code == 0, err
    assert "64 images of 160×160, 10 classes" in out
    assert " before any decay, no better than chance on 64 images of 160×160; was it " in err
    assert json.loads((tmp_path / "z/config.json").read_text())["img_size"] == 160


def test_nothing_given_trains_the_baseline_first_and_says_so(wdprobe, tmp_path):
    models_ = ["--model", "test_convnext", "--model", "test_resnet"]
    code, out, err = wdprobe(
        "zeroshot", *models_, *SMALL, "--epochs", 1, "--no-distortion", "--output", "z"
    )
    assert code == 0, err
    assert err.count("training test_convnext without decay (the paper's Baseline)") == 1
    assert "for 1 epoch of digits first" in err
    assert "Baseline, 1 epoch of digits" in out
    assert re.search(r"at\s+scale\s+0\.\d{4},\s+\d+\.\d\d\s+%\s+taken\s+off", out)
    assert "Zero-shot decay" in out
    assert "test_resnet" in out
    assert (tmp_path / "z/figures/zeroshot.png").exists()
    assert (tmp_path / "z/1/model.safetensors").exists()


def pictures(folder, count=6):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for k in range(count):
        pixels = torch.randint(0, 256, (50 + k, 60, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{k}.png")
    return folder


def test_unlabelled_pictures_and_unreadable_ones_among_them(wdprobe, tmp_path):
    folder = pictures(tmp_path / "photos")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no picture")
    model = timm.create_model("test_convnext", num_classes=5)
    save_file(model.state_dict(), str(tmp_path / "five.safetensors"))
    code, out, err = wdprobe(
        "zeroshot", "--model", "test_convnext", "--checkpoint", "five.safetensors", "--images",
        folder, "--img-size", 32, "--steps", 4, "--by", "kind", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "2 unreadable pictures left out: broken.jpg, cut.png" in err
    result = json.loads(out)
    assert (result["images"], result["classes"], result["metric"]) == (6, 5, "agreement")
    assert {p["top1"] for p in result["curve"]} == {None}
    assert {p["loss"] for p in result["curve"]} == {None}
    assert result["curve"][0]["agreement"] == 1
    kinds = {part["name"] for part in result["parts"]}
    assert {"head", "biases", "matrices and kernels", "norm weights"} <= kinds


@pytest.mark.parametrize(
    "asked",
    [
        {"amp": True},
        {"amp": True, "amp_dtype": "float16", "channels_last": True},
        {"torchcompile": True},
        pytest.param(
            {"amp": True, "torchcompile": True, "channels_last": True}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda asked: "-".join(map(str, asked)),
)
def test_faster_passes_give_nearly_the_same(trained, tmp_path, monkeypatch, asked):
    compiled, seen = [], set()

    def compile(model):
        compiled.append(model)
        return torch_compile(model, backend="eager")

    def count(judge, logits, number):
        last = (judge.subject.model.stem[0].weight, next(judge.images()))
        is_last = {t.is_contiguous(memory_format=torch.channels_last) for t in last}
        seen.add((logits.dtype, *is_last))
        return judge_count(judge, logits, number)

    def scanned(name, **options):
        options |= {"run": trained, "num_samples": 32, "steps": 4, "by": "kind", "by_steps": 2}
        return scan(ZeroshotOptions(**options, output=tmp_path / name), Watcher())

    torch_compile, judge_count = torch.compile, Judge.count
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(Judge, "count", count)
    plain = scanned("plain")
    assert (compiled, seen) == ([], {(torch.float32, False)})
    seen.clear()
    fast = scanned("fast", **asked)
    assert len(compiled) == bool(asked.get("torchcompile"))
    dtype = getattr(torch, asked.get("amp_dtype", "bfloat16")) if "amp" in asked else torch.float32
    assert seen == {(dtype, "channels_last" in asked)}
    for one, other in zip(plain["curve"], fast["curve"], strict=True):
        assert other["top1"] == pytest.approx(one["top1"], abs=0.04)
        assert other["loss"] == pytest.approx(one["loss"], abs=5e-3)
        assert other["kl"] == pytest.approx(one["kl"], abs=5e-3)
    lives = [{p["name"]: p["half_life"] for p in result["parts"]} for result in (plain, fast)]
    assert lives[1] == pytest.approx(lives[0], abs=0.06, nan_ok=True)
    config = json.loads((tmp_path / "fast/config.json").read_text())
    assert {key: config[key] for key in asked} == asked


def judge_of(logits, labels, labelled=True):
    data = HeldBatches(
        torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8), labels, 4, device=torch.device("cpu")
    )
    return Judge(Subject("m", torch.nn.Identity(), data, labelled, "", len(labels), 32))


def test_metrics_agree_with_plain_definitions():
    labels = torch.tensor([0, 1, 2, 2])
    whole, decayed = torch.randn(4, 3), torch.randn(4, 3)
    judge = judge_of(whole, labels)
    judge.count(whole, 0)
    found = metrics(judge.count(decayed, 0).double())
    p, q = F.softmax(whole.double(), 1), F.softmax(decayed.double(), 1)
    assert found["top1"] == (decayed.argmax(1) == labels).float().mean()
    assert found["loss"] == pytest.approx(F.cross_entropy(decayed, labels).item(), rel=1e-5)
    assert found["agreement"] == (decayed.argmax(1) == whole.argmax(1)).float().mean()
    assert found["kl"] == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-4)


def test_outputs_that_are_no_numbers_are_kept_as_such():
    judge = judge_of(None, torch.tensor([0, 1]))
    judge.count(torch.randn(2, 3), 0)
    found = metrics(judge.count(torch.tensor([[1.0, 2, 3], [1, float("nan"), 3]]), 0).double())
    assert all(value != value for value in found.values())


def test_a_gap_is_drawn_where_a_metric_is_no_number(trained, tmp_path):
    path = tmp_path / "z"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model": "m", "source": "s", "layers": []}))
    (path / "curve.csv").write_text(
        "step,scale,top1,loss,agreement,kl\n0,1.0,0.9,1,1,0\n1,0.5,nan,nan,nan,nan\n2,0,0.1,2,0,1\n"
    )
    line = figures.zero_shot([read_run(path)]).axes[0].lines[0]
    assert [value == value for value in line.get_ydata()] == [True, False, True]


def test_ctrl_c_leaves_what_was_measured(trained, tmp_path):
    options = ZeroshotOptions(run=trained, steps=10, num_samples=32, output=tmp_path / "z")
    with pytest.raises(RunError, match="interrupted; what was measured is in"):
        scan(options, Watcher(4))
    assert [row["step"] for row in rows(tmp_path / "z/curve.csv")] == ["0", "1", "2", "3"]


@pytest.mark.filterwarnings("always::wd_probe.WdProbeWarning")
def test_the_head_is_replaced_only_when_asked(wdprobe, trained, tmp_path):
    seven = timm.create_model("test_convnext", num_classes=7).state_dict()
    save_file(seven, str(tmp_path / "seven.safetensors"))
    given = ["zeroshot", "--model", "test_convnext", "--checkpoint", "seven.safetensors",
             "--img-size", 32, "--no-distortion", *SMALL]  # fmt: skip
    code, _, err = wdprobe(*given)
    assert code == 2
    assert "label 9 does not fit the head of test_convnext, which has 7 classes" in err
    code, out, err = wdprobe(*given, "--reset-head", "--json")
    assert code == 0, err
    assert json.loads(out)["classes"] == 10
    assert "warning: the head head.fc starts anew" in err


BAD = {
    "steps": (["--steps", "0"], "steps must be at least 1, got 0"),
    "no folder": (["--images", "nowhere", "--checkpoint", "ten.safetensors"], "image folder nowhere does not exist"),  # noqa: E501
    "empty folder": (["--images", "empty", "--checkpoint", "ten.safetensors"], "image folder empty holds no readable picture"),  # noqa: E501
    "untrained": (["--images", "photos"], "--images needs a trained model"),
    "two sources": (["--run", "a", "--pretrained"], "exclude each other"),
    "no run": (["--run", "nowhere"], "nowhere is no run folder"),
    "other version": (["--run", "old"], "old was made by another version of wd_probe (0.0.1)"),
    "image size": (["--model", "inception_v3"], "inception_v3 cannot take 32×32 images"),
    "epochs": (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    "lr": (["--lr", "inf"], "--lr must be a finite number > 0, got inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line(wdprobe, tmp_path, case):
    state = timm.create_model("test_convnext", num_classes=10).state_dict()
    save_file(state, str(tmp_path / "ten.safetensors"))
    (tmp_path / "empty").mkdir()
    pictures(tmp_path / "photos", 1)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text(
        '{"command": "rop", "model": "test_convnext", "versions": {"wd-probe": "0.0.1"}}'
    )
    arguments, message = BAD[case]
    own = [] if "--run" in arguments or "--model" in arguments else ["--model", "test_convnext"]
    code, out, err = wdprobe("zeroshot", *own, *arguments)
    assert message in err
    assert (code, out) == (2, "")
    assert err.count("\n") == 1


# --- what a run's own config may ask for ----------------------------------------------------------

ASKED = {
    "hub": ({"model": "hf-hub:timm/a"}, "names hf-hub:timm/a, which timm would fetch"),
    "folder": ({"model": "local-dir:/etc"}, "names local-dir:/etc, which timm would fetch"),
    "no model": ({"model": ESCAPE}, "unknown model"),
    "data set": ({"dataset": "hfds/a/b"}, "names hfds/a/b, which timm would fetch"),
    "data folder": ({"data_dir": "/etc"}, "trained on images in /etc"),
    "size": ({"img_size": 10**9}, "classes of 1000000000×1000000000 images"),
    "classes": ({"num_classes": 10**12}, "is of another model: tensors 2 of another shape"),
    "no classes": ({"num_classes": 0}, "asks for 0 classes"),
    "larger model": ({"model": "vit_giant_patch14_224"}, "is of another model"),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKED)
def test_a_runs_config_is_not_followed_out_of_its_folder(made, copy, wdprobe, case, monkeypatch):
    folder, (change, told) = copy("run"), ASKED[case]
    shutil.copy(made / "run/model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    real = models.timm.create_model

    def on_meta(name, **options):
        assert ":" not in name
        assert torch.empty(0).device.type == "meta"
        return real(name, **options)

    monkeypatch.setattr(models.timm, "create_model", on_meta)
    code, out, err = wdprobe("zeroshot", "--run", folder)
    assert (code, out) == (2, "")
    assert told in err
    assert err[:-1].isprintable()


def test_a_runs_data_folder_is_read_when_it_is_given(made, copy, tmp_path):
    folder = copy("run")
    shutil.copy(made / "run/model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    changed = config | {"data_dir": "/somewhere", "dataset": "torch/fashion_mnist"}
    (folder / "config.json").write_text(json.dumps(changed))
    (tmp_path / "idx").mkdir()
    idx_files(tmp_path / "idx")
    options = ZeroshotOptions(run=folder, data_dir=tmp_path / "idx", steps=2)
    assert prepare(options, Silent()).images == 20
