from pathlib import Path

from wd_probe.runs.reading import read_run

OLD = Path(__file__).parents[1] / "data/first_layout"


def test_a_run_of_the_first_layout_is_read_and_reported(wdprobe, tmp_path):
    run = read_run(OLD / "rop")
    assert run.config["opt"] == "momentum"
    assert run.summary["rate"]["max"] == max(run.steps["rate"])
    assert len(run.layers["rate"]) == len(run.steps["step"]) * len(run.layer_names) == 11 * 7
    assert run.epochs["top1"] == [run.summary["top1"]]
    assert len(run.profile["rate"]) == 11 * 23
    code, _, err = wdprobe("report", OLD / "rop", "--output", "page.html")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    assert "test_efficientnet" in page
    assert "blocks.3" in page
