import json
import re

import pytest

from tests.pages import written
from wd_probe import InputError
from wd_probe.report.comparison import compare


def test_several_runs(folders, tmp_path):
    shown = written([folders / name for name in ("one", "two", "scan")], tmp_path)
    assert shown.figures[:3] == [
        "R_op over the steps", "Training loss", "Top-1 on the test images",
    ]  # fmt: skip
    assert len(shown.figures) == 3 + 6 + 7 + 3
    assert {row["run"] for row in shown.data["rate_by_run.csv"]} == {"one", "two"}
    assert "Top-1 after the last epoch is highest in" in shown.text
    assert "Mean R_op goes from 0 % (two)" in shown.text


def headings(shown):
    return re.findall(r"<th scope=\"col\"[^>]*>([^<]*)</th>", shown.source.partition("<svg")[0])


def test_the_table_has_what_decay_did_and_no_column_that_no_run_fills(folders, copy, tmp_path):
    shown = written([folders / name for name in ("one", "two")], tmp_path)
    assert headings(shown)[-7:] == [
        "steps", "top-1", "mean R_op", "decay", "left", "balance", "status",
    ]  # fmt: skip
    row = shown.source[shown.source.index("two</td>") :].partition("</tr>")[0]
    assert re.search(r">(shrinking|balanced|growing)</td>", row)
    scans = written([folders / "scan", copy("scan", "other")], tmp_path)
    assert headings(scans) == ["run", "top-1", "half-life", "taken off", "status"]


def test_scans_are_laid_over_each_other(folders, copy, tmp_path):
    shown = written([folders / "scan", copy("scan", "other")], tmp_path)
    assert shown.figures[0] == "Zero-shot decay"
    assert {row["run"] for row in shown.data["zeroshot_by_run.csv"]} == {"scan", "other"}
    assert "most robust to shrinking" in shown.text


def test_what_is_alike_is_told_as_alike(folders, copy, tmp_path):
    again = copy("two", "again")
    shown = written([folders / "two", again], tmp_path)
    assert re.search(r"highest in none: it is [\d.]+ % in all\.", shown.text)
    assert "Mean R_op is 0 % in all." in shown.text
    rows = (again / "epochs.csv").read_text().splitlines()
    names, values = rows[0].split(","), rows[-1].split(",")
    values[names.index("top1")] = "0.99"
    (again / "epochs.csv").write_text("\n".join([*rows[:-1], ",".join(values)]) + "\n")
    shown = written([folders / "two", again, copy("two", "third")], tmp_path)
    assert "highest in again (99.0 %) and lowest in two, third (" in shown.text


def test_long_names_keep_their_two_ends_in_legends(copy, tmp_path):
    names = [f"rop-{'x' * 60}-{k}" for k in range(2)]
    shown = written([copy("two", name) for name in names], tmp_path)
    for k in range(2):
        assert f"rop-{'x' * 15}…{'x' * 18}-{k}" in shown.text
    assert {row["run"] for row in shown.data["train_loss_by_run.csv"]} == set(names)


def test_many_runs_are_only_compared(folders, copy, tmp_path):
    runs = [copy("two", f"run{k}") for k in range(9)]
    shown = written(runs, tmp_path)
    assert shown.figures == ["Training loss", "Top-1 on the test images"], "R_op is 0 in all"
    assert "none has a section of its own" in shown.text


def test_what_differs_without_a_page(folders):
    found = compare([folders / "one", folders / "two", folders / "scan"])
    assert {"opt", "method", "weight_decay"} <= set(found["options"])
    one, two, scan = found["runs"]
    assert (one["label"], one["options"]["method"], two["options"]["method"]) == (
        "one",
        "wd",
        "lpwd",
    )
    summary = json.loads((folders / "one" / "summary.json").read_text())
    assert one["top1"] == pytest.approx(summary["top1"])
    assert one["rate"] == pytest.approx(summary["rate"]["mean"])
    assert one["state"] == summary["dynamics"]["state"]
    assert one["verdict"] == summary["verdict"]
    assert (scan["steps"], scan["state"]) == (None, None)
    assert (
        scan["half_life"]
        == json.loads((folders / "scan" / "summary.json").read_text())["half_life"]
    )
    assert [row[0] for row in found["rows"]] == ["one", "two", "scan"]


def test_any_option_that_differs_is_told(folders, copy, tmp_path):
    other = copy("one", "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"momentum": 0.5, "device": "cuda"}))
    old = copy("one", "old")
    (old / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "momentum"})
    )
    assert compare([folders / "one", other, old])["options"] == ["momentum"]
    assert compare([folders / "one", old])["options"] == []
    assert "momentum" in headings(written([folders / "one", other], tmp_path))


def test_what_cannot_be_compared_is_refused_in_one_line(folders, copy):
    with pytest.raises(InputError, match="one is one run; give two or more"):
        compare([folders / "one", folders / "one"])
    with pytest.raises(InputError, match=r"is a sweep: give its cells \(.*cells\)"):
        compare([folders / "one", folders / "sweep"])
    assert len(compare([folders / "sweep" / "cells"])["runs"]) == 4
    broken = copy("one")
    (broken / "steps.csv").write_text("step,rate\n1,x\n")
    with pytest.raises(InputError, match="is damaged"):
        compare([folders / "one", broken])
