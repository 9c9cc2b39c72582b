import json
import shutil
from pathlib import Path

import pytest

from tests.pages import Page, written
from wd_probe import WdProbeWarning

OLD = Path(__file__).parents[1] / "data/first_layout/sweep"


def test_a_sweep(folders, tmp_path):
    shown = written([folders / "sweep"], tmp_path)
    assert shown.figures == [
        "Top-1 of wd", "Top-1 of rwd", "Robustness to λ", "Top-1 by how long decay remembers",
        "R_op beside top-1",
    ]  # fmt: skip
    assert "A sweep of 4 cells (4 finished) in 4 settings" in shown.text
    assert "chosen on the validation images" in shown.text
    assert "does best, with " in shown.text or " tie, with " in shown.text
    assert "what ten times the best λ does to top-1" in shown.text or "at λ/10" in shown.text
    rows = shown.data["settings.csv"]
    assert [(r["method"], r["weight_decay"]) for r in rows] == [
        ("wd", "0.1"), ("wd", "1"), ("rwd", "0.1"), ("rwd", "1"),
    ]  # fmt: skip
    for row in rows:
        (cell,) = (folders / "sweep/cells").glob(f"*-{row['method']}-*wd{row['weight_decay']}-*")
        summary = json.loads((cell / "summary.json").read_text())
        assert float(row["top1"]) == pytest.approx(summary["top1"])
        assert float(row["val_top1"]) == pytest.approx(summary["val_top1"])
        assert float(row["rop"]) == pytest.approx(summary["rate"]["mean"])
        did = summary["dynamics"]
        assert row["state"] == did["state"]
        assert float(row["remaining"]) == pytest.approx(did["remaining"])
        assert float(row["balance"]) == pytest.approx(did["balance"]["late"])
        assert float(row["angular_update"]) == pytest.approx(did["angular_update"]["mean"])
        scale = did["timescale_steps"] / summary["steps"]
        assert float(row["timescale_of_run"]) == pytest.approx(scale)
    assert "what decay did at the best λ: " in shown.text
    assert f"is {did['state']}, " in shown.text


def test_what_was_run(copy, tmp_path):
    sweep = copy("sweep")
    changed = {"steps": 3, "scale": "falling", "checkpoint": "made.safetensors", "smoothing": 0.1,
               "command_line": "wdprobe sweep grid.toml"}  # fmt: skip
    for config in (sweep / "cells").glob("*/config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    told = written([sweep], tmp_path).text
    told = told[told.index("What was run") :]
    rows = told.splitlines()
    for row in ("commandwdprobe sweep grid.toml", "weights frommade.safetensors",
                "layer-wise ratesfalling", "timm's recipesmoothing 0.1"):  # fmt: skip
        assert row in rows
    assert ("length3 steps" in rows, "epochs" in told) == (True, False)


def test_rates_of_0_alone_are_not_drawn(copy, tmp_path):
    sweep = copy("sweep")
    for cell in (sweep / "cells").glob("*-wd-*"):
        shutil.rmtree(cell)
    assert written([sweep], tmp_path).figures == [
        "Top-1 of rwd", "Robustness to λ", "Top-1 by how long decay remembers",
    ]  # fmt: skip


def test_a_killed_sweep_of_the_first_layout(tmp_path):
    with pytest.warns(WdProbeWarning, match="1 unfinished"):
        shown = written([OLD], tmp_path)
    assert "A sweep of 2 cells (1 finished, 1 unfinished) in 1 setting" in shown.text
    assert "test_efficientnet on digits · momentum: wd does best, with 11.7 % top-1" in shown.text
    (row,) = shown.data["settings.csv"]
    (summary,) = OLD.glob("cells/*/summary.json")
    assert float(row["rop"]) == pytest.approx(json.loads(summary.read_text())["rate"]["mean"])


def made_up(root, cells):
    """A sweep whose summaries are given: (method, λ, seed, top-1, validation top-1)."""
    for number, (method, decay, seed, top1, validation) in enumerate(cells):
        cell = root / "cells" / f"{number}"
        cell.mkdir(parents=True)
        options = {"method": method, "weight_decay": decay, "seed": seed, "lr": 0.01, "opt": "adam"}
        (cell / "config.json").write_text(json.dumps({"scale": None, **options}))
        summary = {
            "status": "finished" if top1 is not None else "diverged", "top1": top1, "steps": 7,
            "val_top1": validation, "best10": {"mean": top1},
            "chosen": validation and {"val_top1": validation, "top1": top1},
        }  # fmt: skip
        (cell / "summary.json").write_text(json.dumps(summary))
    return root


def test_the_best_setting_is_chosen_on_validation_and_told_on_test(tmp_path):
    cells = [("wd", 0.1, 0, 0.80, 0.9), ("wd", 1.0, 0, 0.85, 0.7), ("lpwd", 0.1, 0, 0.70, 0.8)]
    shown = written([made_up(tmp_path / "sweep", cells)], tmp_path)
    assert (
        "wd does best, with 80.0 % top-1 at η 0.01, λ 0.1, 10.0 points above lpwd, by a"
        in shown.text
    )
    assert "ten times the best λ does to top-1: wd +5.0 points." in shown.text


@pytest.mark.parametrize("update_bn", [False, True])
def test_what_batch_norm_costs_is_told_of_cells_scored_by_running_statistics(tmp_path, update_bn):
    cells = [("wd", rate, 0, 0.80, 0.9) for rate in (0.1, 1.0, 10.0, 50.0)]
    sweep = made_up(tmp_path / "sweep", cells)
    lags = [(0.9, 0.92), (0.5, 0.98), (0.1, 0.7), (None, 0.5)]
    for number, (running, updated) in enumerate(lags):
        for name, more in (
            ("config", {"update_bn": update_bn}),
            ("summary", {"batch_norm": {"running": running, "updated": updated}}),
        ):
            file = sweep / f"cells/{number}/{name}.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | more))
    told = (
        "In 2 of 4 cells batch norm's running statistics lag behind the weights, and cost up to 60 "
        "points on training images: settings may rank otherwise with --update-bn, which evaluates "
        "by statistics taken anew."
    )
    assert (told in written([sweep], tmp_path).text) == (not update_bn)


def test_without_validation_the_page_says_that_the_test_images_chose(tmp_path):
    cells = [
        ("wd", 0.1, 0, 0.80, None), ("wd", 0.1, 1, 0.90, None), ("wd", 1.0, 0, 0.99, None),
        ("wd", 1.0, 1, None, None), ("lpwd", 0.1, 0, 0.7, None), ("lpwd", 0.1, 1, 0.7, None),
    ]  # fmt: skip
    shown = written([made_up(tmp_path / "sweep", cells)], tmp_path)
    assert "chosen on the test images themselves" in shown.text
    assert (
        "wd does best, with 85.0 ± 63.5 % top-1 at η 0.01, λ 0.1, 15.0 points above lpwd, within "
        "the 95 % interval of the difference (± 63.5)." in shown.text
    )
    assert "ten times the best λ does to top-1: wd −85.0 points." in shown.text
    assert "Cells without a usable model (1)" in shown.text
    assert "at step 7" in shown.text


def test_a_lead_is_judged_by_its_difference_seed_by_seed(tmp_path):
    """However far the seeds lie apart: 1 point at each of three, 0.9 to 1.1 or -4 to 6."""
    for gaps, told in (
        ((0.009, 0.010, 0.011), "1.0 points above lpwd."),
        ((-0.04, 0.01, 0.06), "1.0 points above lpwd, within the 95 % interval of the difference ("
                              "± 12.4)."),
    ):  # fmt: skip
        cells = [
            (method, 0.1, seed, 0.5 + 0.1 * seed + gap * (method == "wd"), 0.9)
            for seed, gap in enumerate(gaps)
            for method in ("wd", "lpwd")
        ]
        shown = written([made_up(tmp_path / told / "sweep", cells)], tmp_path)
        assert told in shown.text


def test_a_tie_is_told_as_a_tie(tmp_path):
    cells = [
        ("baseline", 0.0, 0, 0.8, 0.9), ("wd", 0.1, 0, 0.7998, 0.9), ("pwd", 0.1, 0, 0.7996, 0.9),
        ("lpwd", 0.1, 0, 0.78, 0.9),
    ]  # fmt: skip
    shown = written([made_up(tmp_path / "sweep", cells)], tmp_path)
    assert "baseline, wd and pwd tie, with 80.0 % top-1." in shown.text
    assert "does best" not in shown.text
    assert "0.0 points above" not in shown.text


@pytest.mark.filterwarnings("ignore:cells of s. 1 failed")
def test_a_sweep_and_its_page_choose_the_same_setting(wdprobe, tmp_path, monkeypatch):
    """Where the last epoch, the best one on validation and the test images each say another."""
    scores = {  # η: validation and test top-1 at the best epoch, and after the last
        0.02: ((0.90, 0.95), (0.60, 0.70)), 0.005: ((0.85, 0.93), (0.85, 0.93)),
        0.001: ((0.80, 0.99), (0.80, 0.99)),
    }  # fmt: skip

    def train(options, listener, lock):
        best, last = scores[options.lr]
        config = {name: getattr(options, name) for name in ("model", "opt", "lr", "weight_decay")}
        config |= {"method": options.method, "seed": options.seed, "scale": None}
        (options.output / "config.json").write_text(json.dumps(config))
        if options.seed == 1 and options.lr == 0.02 and failing:
            raise ValueError("it breaks")
        summary = {
            "status": "finished", "steps": 7, "top1": last[1], "val_top1": last[0],
            "best10": {"mean": best[1]}, "chosen": {"val_top1": best[0], "top1": best[1]},
        }  # fmt: skip
        (options.output / "summary.json").write_text(json.dumps(summary))
        return summary

    monkeypatch.setattr("wd_probe.sweeps.cells.train", train)
    monkeypatch.setattr("wd_probe.sweeps.cells.prepare", lambda options: None)
    arguments = ["--lr", "1e-3,5e-3,2e-2", "--method", "wd", "--seeds", 2, "--output", "s"]
    for failing, lr, top1 in ((True, 0.005, "93.0"), (False, 0.02, "95.0")):
        code, out, _ = wdprobe("sweep", *arguments, "--json")
        assert code == failing
        (best,) = json.loads(out)["best"]
        assert (best["lr"], f"{100 * best['top1']['mean']:.1f}") == (lr, top1)
        _, out, _ = wdprobe("report", "s", "--json")
        shown = Page(Path(json.loads(out)["page"]))
        assert f"wd does best, with {top1} ± 0.0 % top-1 at η {lr:g}, λ 0.01" in shown.text


def test_options_that_are_no_axis_of_the_maps_make_groups(tmp_path):
    root = made_up(tmp_path / "sweep", [("wd", 0.1, 0, 0.8, 0.9), ("wd", 0.1, 0, 0.5, 0.6)])
    config = json.loads((root / "cells/1/config.json").read_text())
    (root / "cells/1/config.json").write_text(json.dumps(config | {"batch_size": 7}))
    shown = written([root], tmp_path)
    assert "adam · batch_size 7: wd does best, with 50.0 %" in shown.text
    assert "adam · batch_size 64: wd does best, with 80.0 %" in shown.text


def test_lost_cells_are_listed_and_told_once(copy, tmp_path):
    sweep = copy("sweep")
    cells = sorted((sweep / "cells").iterdir())
    (cells[0] / "summary.json").write_text("{")
    (cells[1] / "summary.json").unlink()
    (cells[2] / "summary.json").write_text('{"status": "failed", "error": "out of memory"}')
    with pytest.warns(WdProbeWarning, match="1 unfinished, 1 failed, 1 damaged") as told:
        shown = written([sweep], tmp_path)
    assert [warning.category for warning in told].count(WdProbeWarning) == 1
    assert "Cells without a usable model (3)" in shown.text
    assert "out of memory" in shown.text
    assert all(cell.name in shown.text for cell in cells[:3])
