import csv
import json
import signal
from dataclasses import replace
from functools import partial

import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from tests.small import rows, start
from tests.sweeps.conftest import stamps, wait_for
from wd_probe import InputError
from wd_probe.sweeps import paper
from wd_probe.sweeps.options import SETTING
from wd_probe.sweeps.paper import PaperOptions, paper_grid, published, reproduce
from wd_probe.training.options import ZeroshotOptions

SMALL = replace(
    SETTING, pretrained=False, train_samples=128, val_split=0.2, batch_size=64, epochs=2,
    every=1,
)  # fmt: skip


class Silent:
    def __init__(self):
        self.kept, self.ended = 0, []

    def begun(self, total, kept):
        self.kept = kept

    def cell_started(self, cell):
        pass

    def cell_ended(self, cell, summary):
        self.ended.append((cell, summary))

    def note(self, text):
        pass

    def progress(self, *_):
        pass


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Scans of Fig. 3a in few steps."""
    monkeypatch.setattr(paper, "ZeroshotOptions", partial(ZeroshotOptions, steps=10))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("paper")


def small(output, **chosen):
    options = {
        "datasets": ("digits",), "models": ("test_convnext",), "opts": ("adam",),
        "lrs": (0.01,), "weight_decays": (0.5, 5.0), "seeds": 2, "setting": SMALL,
    }  # fmt: skip
    return PaperOptions(**options | chosen, output=output)


def table(output, name):
    with (output / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_papers_own_grids():
    """Table 2 and section 4: how many runs each experiment is, and how they are made."""
    options = PaperOptions(seeds=1)
    sizes = {name: len(paper_grid(e, options)) for name, e in paper.EXPERIMENTS.items()}
    pairs = 5 * 7
    assert sizes == {
        "table1": 8 * (3 * pairs + 5),  # baseline has no λ
        "table3": 4 * pairs,
        "fig1": 2 * 2,
        "fig2": 4 * pairs,
        "fig3a": 2 * 5,
        "fig3b": 2 * 7,
        "fig4": 4 * 2 * pairs,
        "fig5": 4 * 2 * pairs,
    }
    (cell, *_) = paper_grid(paper.EXPERIMENTS["fig1"], options)
    o = cell.options
    assert (o.lr, o.weight_decay, o.epochs, o.batch_size, o.img_size) == (0.001, 0.5, 100, 512, 32)
    assert o.pretrained
    assert o.model == "convnext_tiny.fb_in22k"
    assert o.hflip is None  # 0.5 but for digits


def test_published_figures_stand_beside_the_rows_they_belong_to():
    convnext, swin = paper.CONVNEXT, paper.SWIN
    assert published("torch/cifar10", convnext, "adam", "wd", "table1") == "90.77 (0.05)"
    assert published("torch/cifar100", swin, "momentum", "lpwd", "table1") == "71.95 (0.10)"
    assert published("torch/cifar100", convnext, "momentum", "l2", "table1") == "72.46 (0.17)"
    assert published("torch/cifar100", convnext, "adam", "rwd", "table3") == "74.19 (0.08)"
    assert published("digits", convnext, "adam", "wd", "table1") == "–"
    assert published("torch/cifar100", convnext, "adam", "rwd", "table1") == "–"


@pytest.mark.slow
def test_table3_chooses_on_validation_and_pairs_by_seed(output):
    result = reproduce("table3", small(output), listener := Silent())
    assert result["cells"] == len(listener.ended) == 16
    rows = {row["method"]: row for row in table(output, "table3")}
    assert list(rows) == ["wd", "rwd", "pwd", "lpwd"]
    found = {}
    for cell, summary in listener.ended:
        key = (cell.options.method, cell.options.weight_decay)
        found.setdefault(key, []).append((cell.options.seed, summary))
    for method, row in rows.items():
        means = {
            rate: sum(s["chosen"]["val_top1"] for _, s in found[method, rate]) / 2
            for rate in (0.5, 5.0)
        }
        assert means[float(row["λ"])] == max(means.values())
        own = dict(found[method, float(row["λ"])])
        best10 = 100 * sum(own[seed]["best10"]["mean"] for seed in (0, 1)) / 2
        assert row["best-10 top-1, %"].startswith(f"{best10:.2f} ± ")
        wd = dict(found["wd", float(rows["wd"]["λ"])])
        if method != "wd":
            gap = 50 * sum(own[seed]["top1"] - wd[seed]["top1"] for seed in (0, 1))
            assert row["against wd"] == f"{gap:+.2f}"
    assert rows["wd"]["R_op, %"] != "0"
    assert rows["rwd"]["R_op, %"] == rows["pwd"]["R_op, %"] == "0"
    assert rows["pwd"]["R_op to the letter, %"] not in ("–", "0")
    assert rows["rwd"]["at the other moment, %"] != "–"
    page = (output / "table3.md").read_text()
    assert "never on test images" in page
    assert "2 seeds; 2 epochs of 128 images, batch 64, 32×32, random weights" in page
    assert "R_op at every step." in page
    assert json.loads((output / "table3.json").read_text())["rows"] == [
        list(row) for row in result["rows"]
    ]


@pytest.mark.parametrize(
    ("name", "drawn", "new"),
    [
        ("fig1", ["fig1_1"], 0),
        ("fig2", ["fig2a_1", "fig2b_1"], 0),
        ("fig3a", ["fig3a"], 2),
        ("fig3b", ["fig3b_1"], 0),
        ("fig4", ["fig4_1"], 0),
        ("fig5", ["fig5_1"], 0),
        ("table1", [], 4),
    ],
)
def test_experiments_share_their_cells(output, name, drawn, new):
    """What table3 has run is not run again; every figure is drawn and has something on it."""
    reproduce("table3", small(output), Silent())
    weight_decays = {"fig3a": (0.01,)}.get(name, (0.5, 5.0))
    before = {p.name for p in (output / "cells").iterdir()}
    reproduce(name, small(output, weight_decays=weight_decays), Silent())
    after = {p.name for p in (output / "cells").iterdir()}
    assert len(after - before) <= new
    assert table(output, name)
    for figure in drawn:
        with Image.open(output / "figures" / f"{figure}.png") as picture:
            assert picture.convert("L").getextrema()[0] < 100


def test_the_file_that_weights_come_from_is_named(tmp_path):
    weights = tmp_path / "made.safetensors"
    save_file(timm.create_model("test_convnext", num_classes=10).state_dict(), weights)
    setting = replace(SMALL, checkpoint=weights, epochs=1)
    options = small(tmp_path / "out", weight_decays=(0.5,), seeds=1, setting=setting)
    reproduce("fig1", options, Silent())
    assert ", weights of made.safetensors, " in (tmp_path / "out/fig1.md").read_text()


def test_scans_of_fig3a_are_kept(output):
    options = small(output, weight_decays=(0.01,))
    reproduce("fig3a", options, Silent())
    stamps = {p: p.stat().st_mtime_ns for p in (output / "zeroshot").glob("*/curve.csv")}
    assert len(stamps) == 2
    reproduce("fig3a", options, Silent())
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    cut, kept = stamps
    cut.with_name("summary.json").unlink()  # killed before its end
    reproduce("fig3a", options, Silent())
    assert cut.with_name("summary.json").exists()
    assert cut.stat().st_mtime_ns > stamps[cut]
    assert kept.stat().st_mtime_ns == stamps[kept]


def test_scans_of_fig3a_take_statistics_anew_where_runs_do(tmp_path):
    options = small(
        tmp_path, weight_decays=(0.01,), seeds=1, models=("test_resnet",),
        setting=replace(SMALL, update_bn=True),
    )  # fmt: skip
    reproduce("fig3a", options, Silent())
    (scanned,) = (tmp_path / "zeroshot").glob("*/summary.json")
    assert json.loads(scanned.read_text())["update_bn"] is True


def test_bad_input(output):
    with pytest.raises(InputError, match="unknown experiment 'fig9'; choose from table1, table3"):
        reproduce("fig9", small(output), Silent())
    with pytest.raises(InputError, match="--seeds must be at least 1, got 0"):
        small(output, seeds=0)
    with pytest.raises(InputError, match="Table 2 has no learning rates for lion; give them with"):
        reproduce("fig4", small(output, opts=("lion",), lrs=()), Silent())


@pytest.mark.slow
def test_a_second_command_into_one_folder_changes_nothing(tmp_path, wdprobe):
    arguments = [
        "reproduce", "fig1", "--method", "wd", "--model", "test_efficientnet", "--dataset",
        "digits", "--no-pretrained", "--train-samples", 128, "--batch-size", 32, "--epochs", 8,
        "--lr", 0.01, "--weight-decay", 0.5, "--seeds", 2, "--output", "p",
    ]  # fmt: skip
    first = start(tmp_path, *arguments)
    try:
        wait_for(lambda: list(tmp_path.glob("p/cells/*/config.json")))
        first.send_signal(signal.SIGSTOP)  # in the middle, until the second has ended
        before = stamps(tmp_path / "p")
        for second, who in ((arguments, "process"), (["sweep", "--output", "p"], "sweep")):
            code, out, err = wdprobe(*second)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert (
                f"another {who} is writing to p; let it end first (process {first.pid} on " in err
            )
            assert stamps(tmp_path / "p") == before
        first.send_signal(signal.SIGCONT)
        _, err = first.communicate(timeout=120)
    finally:
        first.kill()
    assert first.returncode == 0, err
    cells = list(tmp_path.glob("p/cells/*"))
    assert len(cells) == 2
    for cell in cells:
        assert json.loads((cell / "summary.json").read_text())["status"] == "finished"
        assert not (cell / "incomplete").exists()
    assert {row["status"] for row in rows(tmp_path / "p/cells.csv")} == {"finished"}
    code, _, err = wdprobe(*arguments)
    assert code == 0, err
    assert "2 cells, 2 of them finished before" in err
