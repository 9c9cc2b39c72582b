import csv
import json

import pytest

from tests.pages import written


def test_a_run(folders, tmp_path):
    shown = written([folders / "one"], tmp_path)
    assert shown.figures == [
        "Opposing penalties over the steps", "R_op by layer", "R_op had λ been another", "Training",
    ]  # fmt: skip
    summary = json.loads((folders / "one" / "summary.json").read_text())
    mean = 100 * summary["rate"]["mean"]
    assert f"pushes {mean:.3g} % of the weights away from zero" in shown.text
    assert f"Top-1 on the test images is {100 * summary['top1']:.1f} % after 2" in shown.text
    assert all(finding in shown.text for finding in summary["findings"])
    worst = max(summary["layers"], key=lambda layer: layer["rate"])
    assert f"{100 * worst['rate']:.3g} %" in shown.text
    assert "torch 2." in shown.text
    assert "test_convnext" in shown.text
    with (folders / "one" / "steps.csv").open(newline="") as file:
        steps = list(csv.DictReader(file))
    data = shown.data["rop_over_steps.csv"]
    assert [float(r["rate"]) for r in data] == pytest.approx([float(r["rate"]) for r in steps])
    assert {r["name"] for r in shown.data["rop_by_layer.csv"]} >= {"stem", "head"}
    # findings stand before the first figure, what was run behind the last
    first, last = shown.source.index("<svg"), shown.source.rindex("</svg")
    assert shown.source.index("pushes") < first < last < shown.source.index("What was run")


def test_a_run_that_never_opposes_shows_its_flips(folders, tmp_path):
    shown = written([folders / "two"], tmp_path)
    assert shown.figures == ["Sign flips over the steps", "Sign flips by layer", "Training"]
    assert max(float(row["flip_rate"]) for row in shown.data["flips_over_steps.csv"]) > 0
    assert "No penalty opposes: lpwd" in shown.text
    assert "to the letter" in shown.text
