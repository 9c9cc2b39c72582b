import json
import shutil

import pytest

from wd_probe.training.recipe_options import NAMES as RECIPE


@pytest.fixture
def runs(made, tmp_path):
    """So many runs, each of another λ."""

    def several(count):
        for k in range(count):
            folder = shutil.copytree(made / "run", tmp_path / f"run{k}")
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"weight_decay": 0.1 * k}))
        return [f"run{k}" for k in range(count)]

    return several


def test_few_runs_stand_beside_each_other(wdprobe, runs):
    code, out, err = wdprobe("compare", *runs(2))
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["run0", "run1"]
    assert lines[1] == ["λ", "0", "0.1"]
    assert {line[0] for line in lines[2:]} >= {"steps", "top-1", "mean", "decay", "left", "balance"}
    assert "• run0: Decay " in out


def test_many_runs_stand_below_each_other(wdprobe, runs):
    runs(5)
    code, out, _ = wdprobe("compare", ".")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["λ", "steps", "top-1"]
    assert [line.split()[0] for line in lines[1:6]] == [f"run{k}" for k in range(5)]


def test_as_json(wdprobe, runs):
    code, out, _ = wdprobe("compare", *runs(2), "--json")
    found = json.loads(out)
    assert code == 0
    assert found["options"] == ["weight_decay"]
    assert [one["options"]["weight_decay"] for one in found["runs"]] == [0.0, 0.1]
    assert {"steps", "top1", "rate", "state", "remaining", "balance", "verdict"} <= {
        *found["runs"][0]
    }


def test_what_is_no_run_is_refused(wdprobe, runs):
    runs(1)
    assert wdprobe("compare", "run0", "nowhere")[::2] == (
        2, "wdprobe: error: nowhere is no run folder: it has no config.json\n",
    )  # fmt: skip
    code, _, err = wdprobe("compare", "run0")
    assert code == 2
    assert "run0 is one run; give two or more" in err


def test_a_recipe_and_the_run_of_a_version_without(wdprobe, runs, tmp_path):
    runs(2)
    for name, recipe in (("run0", {"weight_decay": 0.1}), ("run1", {"sched": "cosine"})):
        file = tmp_path / name / "config.json"
        config = {k: v for k, v in json.loads(file.read_text()).items() if k not in RECIPE}
        file.write_text(json.dumps(config | recipe))
    code, out, _ = wdprobe("compare", "run0", "run1")
    assert code == 0
    assert [line.split() for line in out.splitlines()][1] == ["sched", "none", "cosine"]
    assert wdprobe("report", "run1")[0] == 0
    assert "sched cosine" in (tmp_path / "run1/report.html").read_text()
