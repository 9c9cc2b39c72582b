from tests.pages import written


def test_several_runs(folders, tmp_path):
    shown = written([folders / name for name in ("one", "two", "scan")], tmp_path)
    assert shown.figures[:3] == [
        "R_op over the steps", "Training loss", "Top-1 on the test images",
    ]  # fmt: skip
    assert len(shown.figures) == 3 + 4 + 1 + 3
    assert {row["run"] for row in shown.data["rate_by_run.csv"]} == {"one", "two"}
    assert "Top-1 after the last epoch is highest in" in shown.text
    assert "Mean R_op goes from 0 % (two)" in shown.text


def test_scans_are_laid_over_each_other(folders, copy, tmp_path):
    shown = written([folders / "scan", copy("scan", "other")], tmp_path)
    assert shown.figures[0] == "Zero-shot decay"
    assert {row["run"] for row in shown.data["zeroshot_by_run.csv"]} == {"scan", "other"}
    assert "most robust to shrinking" in shown.text


def test_many_runs_are_only_compared(folders, copy, tmp_path):
    runs = [copy("two", f"run{k}") for k in range(9)]
    shown = written(runs, tmp_path)
    assert shown.figures == ["R_op over the steps", "Training loss", "Top-1 on the test images"]
    assert "none has a section of its own" in shown.text
