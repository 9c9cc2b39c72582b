import json
import math
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wd_probe import InputError, WdProbeWarning, ranks
from wd_probe.runs import folder as runs
from wd_probe.runs.folder import RunFolder, occupied, run_folder, write_whole


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path / "run") as found:
        yield found


# --- a folder of one's own ------------------------------------------------------------------------


def test_a_folder_is_made_locked_and_let_go(tmp_path):
    with RunFolder(tmp_path / "deep/run") as folder:
        with pytest.raises(InputError, match=r"another process is writing to .*run; let it end"):
            RunFolder(folder.path)
        assert (folder.path / ".lock").exists()
    assert list(folder.path.iterdir()) == []
    RunFolder(folder.path).close()


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ("config.json", "holds a run already"),
        ("steps.csv", "holds a run's steps.csv already"),
        ("distortion.csv", "holds a run's distortion.csv already"),
        ("events.out.tfevents.1.host", "holds a run's events.out.tfevents.1.host already"),
    ],
)
def test_a_folder_that_holds_a_run_is_left_alone(tmp_path, left, told):
    assert occupied(tmp_path) == ""
    (tmp_path / left).symlink_to("nowhere")
    assert occupied(tmp_path) == f"{tmp_path} {told}; choose another --output"
    with pytest.raises(InputError, match=told):
        RunFolder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [left]
    RunFolder(tmp_path, again=True).close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run cannot be written to \(Not a directory\)"):
        RunFolder(tmp_path / "file/run")
    assert "file cannot be written to (File exists)" in occupied(tmp_path / "file")
    assert "x/y cannot be written to (Not a directory)" in occupied(tmp_path / "file/x/y")
    assert not occupied(tmp_path / "x/y")
    with pytest.raises(InputError, match="a run is resumed in its own folder"):
        RunFolder(tmp_path / "file/run", again=True)


def test_of_several_processes_the_first_alone_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    with run_folder(tmp_path / "run") as folder:
        folder.json("config.json", {})
        folder.rows("steps.csv", ("step",), [(1,)])
        folder.check({"steps.csv": 99})
        folder.rewind({"steps.csv": 99})
    assert not (tmp_path / "run").exists()


# --- writing --------------------------------------------------------------------------------------


def test_rows_are_appended_under_one_header(folder):
    folder.rows("steps.csv", ("step", "name"), [(1, "a"), (2, 'b,"')])
    folder.rows("steps.csv", ("step", "name"), [(3, None)])
    folder.close_tables()
    folder.rows("steps.csv", ("step", "name"), [(4, "")])
    folder.close_tables()
    assert (folder.path / "steps.csv").read_text().split() == [
        "step,name", "1,a", '2,"b,"""', "3,", "4,",
    ]  # fmt: skip


def test_rows_reach_the_disk_within_seconds(folder, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    folder._flushed = now[0]
    folder.rows("steps.csv", ("step",), [(1,)])
    folder.rows("layers.csv", ("step",), [(1,)])
    assert (folder.path / "steps.csv").read_text() == ""
    now[0] += 2.1
    folder.rows("layers.csv", ("step",), [(2,)])
    assert (folder.path / "steps.csv").read_text().split() == ["step", "1"]
    assert (folder.path / "layers.csv").read_text().split() == ["step", "1", "2"]


def test_json_has_no_nan(folder):
    assert runs.dumps({"a": math.nan, "b": [math.inf, 1.0]}) == '{"a": null, "b": [null, 1.0]}'
    folder.json("summary.json", {"a": (math.nan,), "path": Path("x"), "name": "é\ud800"})
    text = (folder.path / "summary.json").read_text()
    assert json.loads(text) == {"a": [None], "path": "x", "name": "é\ud800"}


def test_a_file_is_replaced_whole_or_left(folder):
    folder.json("config.json", {"a": 1})

    def fail(partial):
        partial.write_text("{")
        raise OSError(28, "No space left on device")

    with pytest.warns(WdProbeWarning, match=r"nothing more is written .*\(No space left"):
        folder.replace("config.json", fail)
    assert folder.failure == "No space left on device"
    assert (folder.path / "config.json").read_text() == '{\n  "a": 1\n}\n'
    assert sorted(p.name for p in folder.path.iterdir()) == [".lock", "config.json"]
    folder.json("config.json", {"a": 2})
    folder.rows("steps.csv", ("step",), [(1,)])
    assert folder.guard(lambda: 1) is None
    assert sorted(p.name for p in folder.path.iterdir()) == [".lock", "config.json"]


@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_what_libraries_say_of_a_full_disk_is_told_as_that(folder, library):
    weights = {"a": torch.zeros(4)}

    def write(partial):
        partial.mkdir()  # nothing can be written in its place
        if library == "torch":
            torch.save(weights, partial)
        else:
            save_file(weights, partial)

    with pytest.warns(WdProbeWarning, match="nothing more is written"):
        folder.replace("model", write)
    assert folder.failure


def test_files_are_readable_by_whom_the_folder_lets(folder):
    mask = os.umask(0o022)
    os.umask(mask)
    folder.replace("model.safetensors", lambda path: save_file({"a": torch.zeros(1)}, path))
    mode = stat.S_IMODE((folder.path / "model.safetensors").stat().st_mode)
    assert mode == 0o666 & ~mask


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("kept")
    for name in ("page.html", f"page.html.{os.getpid()}.partial"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    write_whole(tmp_path / "page.html", "é\ud800")
    assert (tmp_path / "mine").read_text() == "kept"
    assert (tmp_path / "page.html").read_text("utf-8") == "é\\ud800"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "page.html"]


# --- resuming -------------------------------------------------------------------------------------


def test_files_are_cut_to_what_they_were_and_results_removed(folder):
    folder.rows("steps.csv", ("step",), [(1,), (2,)])
    (folder.path / "events.out.tfevents.1").write_bytes(b"12345")
    sizes = folder.sizes()
    assert sizes == {"steps.csv": 12, "events.out.tfevents.1": 5}
    folder.rows("steps.csv", ("step",), [(3,)])
    folder.rows("layers.csv", ("step",), [(1,)])
    folder.json("summary.json", {})
    folder.json("config.json", {})
    (folder.path / "x.partial").write_text("")
    folder.close_tables()
    folder.rewind(sizes)
    assert (folder.path / "steps.csv").read_text().split() == ["step", "1", "2"]
    left = sorted(p.name for p in folder.path.iterdir())
    assert left == [".lock", "config.json", "events.out.tfevents.1", "steps.csv"]
    folder.rewind({})
    assert sorted(p.name for p in folder.path.iterdir()) == [".lock", "config.json"]


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"layers.csv": 4, "steps.csv": 9}, "steps.csv is damaged: it is shorter than it was"),
        ({"epochs.csv": 1}, "epochs.csv is damaged: it is shorter than it was"),
        ({"../mine": 0}, r"run is damaged: \.\./mine is missing"),
        ({"config.json": 0}, r"run is damaged: config\.json is missing"),
        ({"steps.csv": -1}, r"run is damaged: steps\.csv is missing"),
        ({"steps.csv": "0"}, r"run is damaged: steps\.csv is missing"),
    ],
)
def test_sizes_that_do_not_fit_change_nothing(folder, sizes, told):
    (folder.path / "steps.csv").write_text("step\n1\n")
    (folder.path / "layers.csv").write_text("step\n1\n")
    before = {p.name: p.read_bytes() for p in folder.path.iterdir()}
    with pytest.raises(InputError, match=told):
        folder.rewind(sizes)
    assert {p.name: p.read_bytes() for p in folder.path.iterdir()} == before


def test_a_link_in_the_place_of_a_table_is_left_alone(folder, tmp_path):
    (tmp_path / "mine").write_text("kept")
    (folder.path / "steps.csv").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=r"steps\.csv is not a plain file; it is left alone"):
        folder.rewind({"steps.csv": 2})
    assert (tmp_path / "mine").read_text() == "kept"


# --- names and machines ---------------------------------------------------------------------------


def test_default_folders_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.time, "strftime", lambda _: "20200101-000000")
    first = runs.default_folder("rop", "hf-hub:a/b")
    assert first == Path("runs/rop-hf-hub_a_b-20200101-000000")
    first.mkdir(parents=True)
    assert runs.default_folder("rop", "hf-hub:a/b") == Path(f"{first}-2")


def test_versions_and_machine_are_known():
    found = runs.environment(torch.device("cpu"))
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert set(found["versions"]) == {"wd-probe", "torch", "timm", "numpy"}
    assert found["device"] == "cpu"
    assert found["device_name"]
