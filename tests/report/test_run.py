import csv
import json
import re

import pytest

from tests.pages import written
from wd_probe import WdProbeWarning
from wd_probe.runs.verdict import THRESHOLDS

LEDGER = {"norm", "relative_update", "angular_update", "growth", "taken", "balance", "remaining",
          "timescale"}  # fmt: skip


def test_a_run(folders, tmp_path):
    shown = written([folders / "one"], tmp_path)
    assert shown.figures == [
        "Angle by layer", "Norm by layer", "Opposing penalties over the steps", "R_op by layer",
        "R_op had λ been another", "Training",
    ]  # fmt: skip
    summary = json.loads((folders / "one" / "summary.json").read_text())
    mean = 100 * summary["rate"]["mean"]
    assert f"pushes {mean:.3g} % of the weights away from zero" in shown.text
    assert f"Top-1 on the test images is {100 * summary['top1']:.1f} % after 2" in shown.text
    assert all(finding.replace("`", "") in shown.text for finding in summary["findings"])
    worst = max(summary["layers"], key=lambda layer: layer["rate"])
    assert f"{100 * worst['rate']:.3g} %" in shown.text
    assert "torch 2." in shown.text
    assert "test_convnext" in shown.text
    with (folders / "one" / "steps.csv").open(newline="") as file:
        steps = list(csv.DictReader(file))
    data = shown.data["rop_over_steps.csv"]
    assert [float(r["rate"]) for r in data] == pytest.approx([float(r["rate"]) for r in steps])
    assert {r["name"] for r in shown.data["rop_by_layer.csv"]} >= {"stem", "head"}
    assert not {"norm", "taken"} & shown.data["rop_by_layer.csv"][0].keys()
    # what decay did stands before what R_op says, each before its figures; what was run is last
    where = [shown.source.index(text) for text in (
        summary["verdict"][0][:20], "What decay did", "Angle by layer:", "pushes",
        "Opposing penalties over the steps:", "What was run",
    )]  # fmt: skip
    assert where == sorted(where)


def test_all_tensors_of_a_run_unfold(folders, tmp_path):
    shown = written([folders / "one"], tmp_path)
    with (folders / "one" / "tensors.csv").open(newline="") as file:
        tensors = list(csv.DictReader(file))
    folded = shown.source[shown.source.index("<details>") : shown.source.index("</details>")]
    assert f"<summary>All {len(tensors)} tensors</summary>" in folded
    for row in tensors:
        line = folded[folded.index(f">{row['name']}</td>") :].split("</tr>")[0]
        assert f">{100 * float(row['rate']):.3g} %<" in line
        assert f">{float(row['norm']):.4g}<" in line
    assert [row["name"] for row in shown.data["tensors.csv"]] == [row["name"] for row in tensors]
    (folders / "one" / "tensors.csv").rename(tmp_path / "kept")
    try:
        assert "<details>" not in written([folders / "one"], tmp_path).source
    finally:
        (tmp_path / "kept").rename(folders / "one" / "tensors.csv")


def test_a_run_opens_with_what_decay_did(folders, tmp_path):
    shown = written([folders / "two"], tmp_path)
    summary = json.loads((folders / "two" / "summary.json").read_text())
    assert shown.figures[:4] == [
        "Balance by layer", "Angle by layer", "What decay has left", "Norm by layer",
    ]  # fmt: skip
    assert all(sentence.replace("`", "") in shown.text for sentence in summary["verdict"])
    dynamics = summary["dynamics"]
    assert f"{100 * (1 - dynamics['remaining']):.3g} % of what stood at the start" in shown.text
    assert f"{dynamics['timescale_steps']:.3g} steps" in shown.text
    assert THRESHOLDS in shown.text
    rows = shown.source[shown.source.index("taken off</th>\n") :]
    assert len(re.findall(r"<td>(?:idle|shrinking|balanced|growing)</td>", rows)) == len(
        summary["layers"]
    )
    left = {row["name"]: float(row["remaining"]) for row in shown.data["remaining.csv"]}
    assert left["head"] == pytest.approx(summary["layers"][-1]["remaining"])


def test_a_run_of_an_older_version_is_shown_without_it(copy, tmp_path):
    older = copy("two")
    for name in ("steps", "layers"):
        with (older / f"{name}.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        kept = [k for k, column in enumerate(header) if column not in LEDGER]
        with (older / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([row[k] for k in kept] for row in (header, *rows))
    summary = json.loads((older / "summary.json").read_text())
    for name in ("verdict", "dynamics"):
        del summary[name]
    summary["layers"] = [
        {k: v for k, v in layer.items() if k in ("index", "name", "rate", "mass", "flip_rate")}
        for layer in summary["layers"]
    ]
    (older / "summary.json").write_text(json.dumps(summary))
    shown = written([older], tmp_path)
    assert shown.figures == ["Sign flips over the steps", "Sign flips by layer", "Training"]
    assert "What decay did" not in shown.text
    assert "No penalty opposes" in shown.text


def test_a_run_not_yet_at_its_end_says_so_first(copy, tmp_path):
    unfinished = copy("two")
    (unfinished / "summary.json").unlink()
    with pytest.warns(WdProbeWarning, match="is unfinished"):
        shown = written([unfinished], tmp_path)
    assert "Angle by layer" in shown.figures
    assert shown.source.index("has not come to its end") < shown.source.index("<svg")


def test_a_run_that_never_opposes_shows_its_flips(folders, tmp_path):
    shown = written([folders / "two"], tmp_path)
    assert shown.figures[4:] == ["Sign flips over the steps", "Sign flips by layer", "Training"]
    assert max(float(row["flip_rate"]) for row in shown.data["flips_over_steps.csv"]) > 0
    assert "No penalty opposes: lpwd" in shown.text
    assert "to the letter" in shown.text
