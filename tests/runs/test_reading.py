"""Files from strangers: a good result or one line that names the file, whatever they hold."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.strangers import QUICK, READ, mistyped, outcome, spoiled
from wd_probe import InputError
from wd_probe.runs import figures, reading
from wd_probe.runs.folder import dumps
from wd_probe.runs.reading import read_columns, read_json, read_run
from wd_probe.runs.schema import Contents

OLD = Path(__file__).parents[1] / "data/first_layout"


# --- runs -----------------------------------------------------------------------------------------


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


def test_a_run_cut_short_is_readable(tmp_path):
    run, cut = read_run(OLD / "rop"), tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((run.path / "config.json").read_bytes())
    lines = (run.path / "steps.csv").read_text().splitlines()
    (cut / "steps.csv").write_text("\n".join(lines[:3]) + "\n" + lines[3][:7])
    read = read_run(cut)
    assert read.summary is None
    assert read.steps["step"] == [1, 2]
    assert list(figures.draw_training(read)) == ["rop_over_steps"]


def test_damaged_runs_are_named(tmp_path):
    with pytest.raises(InputError, match=r"is no run folder: it has no config\.json"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        read_run(tmp_path)


def test_layers_without_a_name_and_indices_beyond_them_are_damage(tmp_path):
    (tmp_path / "config.json").write_text('{"layers": [{"name": "a"}, {"index": 2}]}')
    with pytest.raises(InputError, match=r"config\.json is damaged: layers\[1\] has no name"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text('{"layers": [{"name": "a"}]}')
    table = tmp_path / "layers.csv"
    for rows, told in (
        ("step,index,rate\n1,2,0", "index 2 is none of the 1 names in config.json"),
        ("step,index,rate\n1,0,0", "index 0 is none of the 1 names in config.json"),
        ("step,index,rate\n1,,0", "index nan is none of the 1 names in config.json"),
        ("step,index,rate\n1.5,1,0", "the column step must hold whole numbers"),
        ("step,index,rate\n-1,1,0", "the column step must hold whole numbers"),
        ("step,index\n1,1", "it has no column rate"),
    ):
        table.write_text(f"{rows}\n")
        with pytest.raises(InputError) as error:
            read_run(tmp_path)
        assert str(error.value) == f"{table} is damaged: {told}"
    table.write_text("step,index,rate\n1,1,0.5\n")
    assert read_run(tmp_path).layers == {"step": [1], "index": [1], "rate": [0.5]}


@pytest.mark.parametrize("file", READ, ids="/".join)
def test_run_folders_with_spoiled_files(copy, file):
    folder, name = copy(file[0]), file[1]
    good = (folder / name).read_bytes()
    assert read_run(folder) is not None

    @settings(QUICK, max_examples=25)
    @given(spoiled(good))
    @example(good[: len(good) // 2])
    @example(b"\0" * 500)
    @example(b"\xff\xfe" * 50)
    @example(b"[" * 100_000)
    @example(b'"' + b"x," * 100_000)
    @example(b"step," * 400 + b"\n")
    def check(found):
        (folder / name).write_bytes(found)
        outcome(lambda: read_run(folder), name, "no run folder")

    check()


@pytest.mark.parametrize("file", [f for f in READ if "json" in f[1]], ids="/".join)
def test_run_folders_with_values_of_other_kinds(copy, file):
    folder, name = copy(file[0]), file[1]
    good = json.loads((folder / name).read_text())

    @given(mistyped(good))
    @settings(QUICK, max_examples=40)
    def check(found):
        (folder / name).write_text(json.dumps(found))
        run = outcome(lambda: read_run(folder), name)
        if run is not None:
            dumps(run.config).encode()
            assert str(run.config.get("model")).isprintable()

    check()


# --- tables ---------------------------------------------------------------------------------------

cells = st.one_of(
    st.sampled_from(["", "1", "0.5", "nan", "inf", "-inf", "1e308", "1e999", "x", "\0", '"',
                     '"a\nb"', "9" * 400, "1_0", "=1+1", "\x1b[2J", "é"]),
    st.floats().map(repr),
)  # fmt: skip


@QUICK
@given(
    st.lists(st.lists(cells, min_size=2, max_size=4), max_size=6), st.sampled_from(["\n", "\r\n"])
)
def test_tables_of_strange_cells(tmp_path_factory, rows, end):
    path = tmp_path_factory.getbasetemp() / "strange.csv"
    lines = ["step,rate,name", *(",".join(row) for row in rows)]
    path.write_text(end.join(lines) + end, newline="")
    found = outcome(lambda: read_columns(path), "strange.csv")
    if found is not None:
        assert list(found) == ["step", "rate"]
        assert len(found["step"]) == len(found["rate"]) <= 2 * len(rows)


def test_lines_cut_short_or_of_another_length_are_left_out(tmp_path):
    table = tmp_path / "steps.csv"
    table.write_text("step,name,rate\n1,a,\n2,b\n3,c,0.5,1\n4,d,0.25\r\n5,e,0.1")
    found = read_columns(table)
    assert list(found) == ["step", "rate"]
    assert found["step"] == [1, 4]
    assert repr(found["rate"]) == "[nan, 0.25]"
    assert read_columns(tmp_path / "none.csv") == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a\n" + "1" * (1 << 16) + "\n", "a line in it is longer than 65,536 characters"),
        ("a," * 256 + "a\n1\n", "it has more than 256 columns"),
        ("a\n1e301\n", "it holds 1e+301"),
        ("a\nx\n", "could not convert string to float: 'x'"),
    ],
)
def test_tables_out_of_bounds_are_named(tmp_path, text, told):
    (tmp_path / "steps.csv").write_text(text)
    with pytest.raises(InputError) as error:
        read_columns(tmp_path / "steps.csv")
    assert str(error.value) == f"{tmp_path / 'steps.csv'} is damaged: {told}"


def test_more_cells_than_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "TABLE_CELLS", 10)
    (tmp_path / "steps.csv").write_text("step,rate\n" + "1,2\n" * 6)
    with pytest.raises(InputError, match=r"steps\.csv has more than 10 cells; not read"):
        read_columns(tmp_path / "steps.csv")


# --- bounds ---------------------------------------------------------------------------------------


def test_a_pipe_in_the_place_of_a_file(tmp_path):
    os.mkfifo(tmp_path / "summary.json")
    with pytest.raises(InputError, match=r"summary\.json is damaged: it is not a plain file"):
        read_json(tmp_path / "summary.json", Contents)


def test_files_too_large_are_refused_before_they_are_read(tmp_path):
    tracemalloc.start()
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"config\.json is larger than 32,768 KiB"):
        read_run(tmp_path)
    path.write_text("{}")
    for name, size in (("steps.csv", 1 << 40), ("layers.csv", 1 << 29)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
        assert outcome(lambda: read_run(tmp_path), name) is None
        (tmp_path / name).unlink()
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    (tmp_path / "steps.csv").write_text("step,rate\n1,2\n3,4")
    assert read_run(tmp_path).steps == {"step": [1], "rate": [2]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1, 2]", "it must hold an object, not a list of 2"),
        ('{"a": 1', "Expecting ',' delimiter: line 1 column 8 (char 7)"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path, text, told):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(InputError) as error:
        read_json(tmp_path / "sweep.json", Contents)
    assert str(error.value).startswith(f"{tmp_path / 'sweep.json'} is damaged: {told}")


def test_the_last_of_two_equal_keys_counts(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1, "a": 2}')
    assert read_json(tmp_path / "a.json", Contents) == {"a": 2}
