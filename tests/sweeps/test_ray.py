import json
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from tests.small import rows, start
from tests.sweeps.conftest import TINY, stamps, wait_for

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", [("sweep", *TINY), ("reproduce", "table1")])
def test_without_ray(wdprobe, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = wdprobe(*command, "--ray")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "Ray is not installed; pip install 'wd-probe[ray]', or leave out --ray" in err


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_unreachable_address_is_told_soon(wdprobe, monkeypatch, scheme, answer):
    pytest.importorskip("ray")
    monkeypatch.setattr("wd_probe.sweeps.ray._SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        if answer is None:
            server.close()
            reason = "Connection refused"
        elif answer:

            def reply():
                with server.accept()[0] as peer:
                    peer.sendall(answer)

            threading.Thread(target=reply).start()
            reason = "what answers there is not Ray"
        else:
            reason = "timed out"
        begun = time.monotonic()
        code, out, err = wdprobe("sweep", *TINY, "--ray-address", address)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"no Ray cluster can be reached at {address} ({reason}); start one with" in err
    assert time.monotonic() - begun < 20


@pytest.mark.usefixtures("quick")
def test_nothing_of_ray_is_imported_unless_asked_for(wdprobe, monkeypatch):
    asked = []

    class Watch:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "ray":
                asked.append(name)

    monkeypatch.setattr(sys, "meta_path", [Watch(), *sys.meta_path])
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray")
    assert wdprobe("sweep")[0] == 0
    assert asked == []
    for folder in ("wd_probe", "cli"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^(import|from) ray\b", path.read_text(), re.MULTILINE), path


def workers(mark):
    """Ids of the processes that run a cell for the test with this mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().startswith(b"ray::_run") and (
                f"WD_PROBE_TEST={mark}".encode() in (process / "environ").read_bytes()
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found


RAY = ["sweep", "--model", "test_convnext", "--batch-size", 32, "--ray", "--output", "s"]


@pytest.mark.slow
def test_ray_runs_the_same_cells_and_outlives_a_killed_worker(tmp_path, wdprobe):
    pytest.importorskip("ray")
    mark, grid = uuid.uuid4().hex, ["--steps", 40, "--seeds", 4, "--every", 10]
    process = start(tmp_path, *RAY, *grid, "--json", WD_PROBE_TEST=mark)
    try:
        wait_for(lambda: list(tmp_path.glob("s/cells/*/config.json")) and workers(mark))
        os.kill(workers(mark)[0], signal.SIGKILL)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert json.loads(out)["counts"] == {"finished": 4}
    assert "cell 4/4 · 0 running · 0 s left" in err
    assert len(err.splitlines()) < 12
    configs = [json.loads(p.read_text()) for p in (tmp_path / "s/cells").glob("*/config.json")]
    assert [config["threads"] for config in configs] == [1] * 4
    assert sorted(r["status"] for r in rows(tmp_path / "s/cells.csv")) == ["finished"] * 4
    assert not workers(mark)
    before = stamps(tmp_path / "s/cells")
    code, _, err = wdprobe(*[a for a in RAY if a != "--ray"], *grid)
    assert code == 0
    assert "4 cells, 4 of them finished before" in err
    assert stamps(tmp_path / "s/cells") == before


@pytest.mark.slow
def test_a_table_of_the_paper_runs_there(tmp_path):
    pytest.importorskip("ray")
    grid = ["--method", "wd,lpwd", "--lr", 1e-3, "--weight-decay", 0.5, "--seeds", 1]
    small = ["--no-pretrained", "--train-samples", 64, "--batch-size", 32, "--epochs", 1]
    process = start(
        tmp_path, "reproduce", "table1", "--model", "test_convnext", "--dataset", "digits", "--opt",
        "adam", *grid, *small, "--output", "p", "--json", "--ray",
    )  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert (json.loads(out)["cells"], json.loads(out)["failed"]) == (2, [])
    assert len(rows(tmp_path / "p/table1.csv")) == 2
    configs = [json.loads(p.read_text()) for p in (tmp_path / "p/cells").glob("*/config.json")]
    assert [config["threads"] for config in configs] == [1] * 2


@pytest.mark.slow
def test_ctrl_c_ends_what_runs_on_ray(tmp_path):
    pytest.importorskip("ray")
    mark = uuid.uuid4().hex
    process = start(tmp_path, *RAY, "--epochs", 1000, "--seeds", 3, WD_PROBE_TEST=mark)
    try:
        wait_for(lambda: list(tmp_path.glob("s/cells/*/steps.csv")) and workers(mark))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted: 0 of 3 cells are in s; the same command resumes the rest" in err
    wait_for(lambda: not workers(mark), 20)


@pytest.mark.slow
def test_a_cell_larger_than_any_machine_is_refused(tmp_path, wdprobe):
    pytest.importorskip("ray")
    process = start(tmp_path, *RAY, "--cpus-per-cell", 1000)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "a cell wants 1,000 CPUs and 0 GPUs, and no machine has them: the most are" in err
