import json
import math
import tracemalloc

import pytest

from wd_probe import InputError
from wd_probe.runs.reading import read_json
from wd_probe.runs.schema import RunConfig, RunSummary

SUMMARY_FAULTS = [
    ({"model": 3}, "model must be a text, got 3"),
    ({"steps": 2.0}, "steps must be a whole number, got 2.0"),
    ({"steps": True}, "steps must be a whole number, got True"),
    ({"steps": 2**63}, "steps must be a whole number, got 9223372036854775808"),
    ({"steps": -(2**63)}, "steps must be a whole number, got -9223372036854775808"),
    ({"lr": "0.1"}, "lr must be a number, got '0.1'"),
    ({"lr": False}, "lr must be a number, got False"),
    ({"lr": 1e301}, "lr must be a number, got 1e+301"),
    ({"lr": math.inf}, "lr must be a number, got inf"),
    ({"lr": 10**30}, f"lr must be a number, got {10**30}"),
    ({"rate": [1, 2]}, "rate must be an object, got a list of 2"),
    ({"rate": {"mean": "x"}}, "rate.mean must be a number, got 'x'"),
    ({"layers": {"a": 1}}, "layers must be a list, got an object of 1"),
    ({"layers": [{"index": 1}, None]}, "layers[1] is null"),
    ({"layers": [{}, {"name": 7}]}, "layers[1].name must be a text, got 7"),
    ({"curve": [{"top1": []}]}, "curve[0].top1 must be a number, got a list of 0"),
    ({"findings": ["a", None]}, "findings[1] is null"),
    ({"findings": ["a", 1]}, "findings[1] must be a text, got 1"),
    ({"model": ["x" * 500]}, "model must be a text, got a list of 1"),
    ({"steps": "x" * 500}, f"steps must be a whole number, got '{'x' * 76}..."),
]


@pytest.mark.parametrize(("value", "told"), SUMMARY_FAULTS)
def test_a_fault_is_told_in_one_line(value, told):
    assert RunSummary.fault(value) == told


def test_objects_of_any_kind():
    assert RunConfig.fault({"versions": 1}) == "versions must be an object, got 1"
    assert RunConfig.fault({"versions": {"torch": [None]}}) is None


@pytest.mark.parametrize("contents", [RunConfig, RunSummary])
def test_every_key_may_be_absent_or_null_and_others_may_be_there(contents):
    assert contents.fault({}) is None
    assert contents.fault(dict.fromkeys(contents.model_fields)) is None
    assert contents.fault({"a later version's": [1, {"x": None}]}) is None


def test_numbers_are_kept_as_they_are_up_to_what_figures_and_arrays_hold():
    largest = {"steps": 2**63 - 1, "lr": -1e300, "seconds": 1 - 2**63, "top1": 1}
    assert RunSummary.fault(largest) is None


def test_long_lists_are_not_kept_a_second_time():
    items = [{} for _ in range(50_000)]
    tracemalloc.start()
    assert RunSummary.fault({"layers": items, "curve": items}) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20, "as models they take 40 MB"


def test_what_is_read_is_what_was_written_but_for_nan_and_what_a_terminal_acts_on(tmp_path):
    path = tmp_path / "summary.json"
    written = {"unknown": [1, {"a\x1b": "b\n"}], "lr": 1, "top1": math.nan, "model": "a\ud800"}
    path.write_text(json.dumps(written))
    found = read_json(path, RunSummary)
    assert found == {
        "unknown": [1, {"a\\x1b": "b\\n"}], "lr": 1, "top1": None, "model": "a\\ud800",
    }  # fmt: skip
    assert list(found) == list(written)
    assert type(found["lr"]) is int
    path.write_text('{"lr": "x"}')
    with pytest.raises(InputError, match=r"summary\.json is damaged: lr must be a number, got 'x'"):
        read_json(path, RunSummary)
