import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
import time

import pytest

from wd_probe import InputError
from wd_probe.runs import locks
from wd_probe.runs.locks import Busy, Lock

HOLDING = """
import sys, time
from pathlib import Path
from wd_probe.runs.locks import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_who_has_a_folder_is_named_and_a_killed_process_has_none(holder, tmp_path):
    with pytest.raises(Busy) as refused:
        Lock(tmp_path, "sweep")
    assert str(refused.value) == (
        f"another sweep is writing to {tmp_path}; let it end first "
        f"(process {holder.pid} on {platform.node()})"
    )
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with Lock(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_forked_worker_does_not_hold_the_folder(tmp_path):
    held = Lock(tmp_path)
    seen, told = os.pipe()
    child = os.fork()  # as a data loader's worker, which may live longer
    if not child:
        os.write(told, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(seen, 1)
    try:
        with pytest.raises(Busy):
            Lock(tmp_path)
        held.close()
        Lock(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_locks_of_version_0_1_are_understood_and_understand_these(tmp_path):
    """It opens the file to append, locks it whole and leaves it empty."""
    with (tmp_path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(Busy, match=r"let it end first$"):
            Lock(tmp_path)
    with Lock(tmp_path), (tmp_path / ".lock").open("a") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, number):
    def refuse(file, blocking):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "lock_descriptor", refuse)
    Lock(tmp_path).close()


def test_a_lock_that_points_elsewhere_is_not_written_through(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(mine)
    with pytest.raises(InputError, match=r"run cannot be written to \(.*\); choose"):
        Lock(tmp_path / "run")
    (tmp_path / "run/.lock").unlink()
    (tmp_path / "run/.lock").hardlink_to(mine)
    Lock(tmp_path / "run").close()
    assert mine.read_text() == "kept"


def test_a_full_disk_can_be_locked(tmp_path, monkeypatch):
    def fail(file, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(locks.FileIO):
        write = fail

    monkeypatch.setattr(locks, "FileIO", Full)
    with Lock(tmp_path), pytest.raises(Busy, match=r"let it end first$"):
        Lock(tmp_path)


def test_folders_are_written_where_python_has_neither_fcntl_nor_fork(tmp_path):
    script = """
import os, sys, warnings
from pathlib import Path
import torch  # Python's own modules have found fork by now
warnings.simplefilter("ignore")  # filelock says that the system has no lock for it
sys.modules["fcntl"] = None
del os.register_at_fork
for name in [name for name in sys.modules if name.startswith("filelock")]:
    del sys.modules[name]
from wd_probe.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])) as folder:
    folder.json("config.json", {"a": 1})
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "run"], check=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
