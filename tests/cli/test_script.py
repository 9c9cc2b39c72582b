"""`wdprobe watch` beside python itself: the same script, run as a process by either."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import rows

ROOT = Path(__file__).parents[2]
WDPROBE = Path(sys.executable).parent / "wdprobe"
WATCH, MODULE = [WDPROBE, "watch"], [sys.executable, "-m", "wd_probe", "watch"]
NOTHING = r"wdprobe: .* did not load torch, so nothing was measured.*\n"


def start(command, folder, **env):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env
    return subprocess.Popen(
        list(map(str, command)), cwd=folder, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def ended(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def alike(folder, *arguments, watch=WATCH, **env):
    """What a script leaves, run by python and watched; nothing of wdprobe's in it."""
    bare = ended(start([sys.executable, *arguments], folder, **env))
    code, out, err = ended(start([*watch, *arguments], folder, **env))
    told = re.sub(NOTHING, "", err)
    assert told != err
    assert (code, out, told) == bare
    return bare


SHOWS = """
import os, sys, warnings
print(sys.argv, __name__, __file__, sys.path[0], os.getcwd(), __package__, __doc__)
print(__spec__ and __spec__.name, sorted(globals()), sys.modules["__main__"].__dict__ is globals())
print(type(sys.excepthook), sys.stdout.errors, sys.stderr.errors)
import signal
print(signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
warnings.warn("as python shows it")
"""


@pytest.mark.parametrize("watch", [WATCH, MODULE])
def test_arguments_names_folders_and_warnings(tmp_path, watch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/beside.py").write_text("FOUND = 1")
    (tmp_path / "sub/train.py").write_text(f'"""Doc."""{SHOWS}from beside import FOUND')
    alike(tmp_path, "./sub/train.py", "--every", "3", "-h", "--", "x y", watch=watch)


def test_modules_packages_and_folders(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "other.py").write_text("FOUND = 1")
    for name in ("train", "__main__"):
        (package / f"{name}.py").write_text(f"{SHOWS}from .other import FOUND")
    alike(tmp_path, "-m", "package.train", "--lr", "1")
    alike(tmp_path, "-m", "package")
    alike(tmp_path, "-m", "package.absent")
    (package / "__main__.py").write_text(SHOWS)
    alike(tmp_path, "package", "x")


@pytest.mark.parametrize("ending", [
    "sys.exit(3)", "sys.exit('why')", "raise SystemExit", "fails()", "raise KeyboardInterrupt",
    "import absent", "1 +", "os._exit(4)", "sys.excepthook = lambda *e: print(e); fails()",
])  # fmt: skip
def test_ends_and_tracebacks(tmp_path, ending):
    (tmp_path / "train.py").write_text(
        "import os, sys, atexit\natexit.register(print, 'last')\n"
        f"def fails():\n    try:\n        1 / 0\n    except Exception as e:\n"
        f"        raise ValueError('no') from e\n{ending}\n"
    )
    code, out, err = ended(start([sys.executable, "train.py"], tmp_path))
    found = ended(start([*WATCH, "train.py"], tmp_path))
    told = re.sub(NOTHING, "", found[2])
    assert (found[0], re.sub(r" at 0x\w+", "", found[1])) == (code, re.sub(r" at 0x\w+", "", out))
    assert told == err


def test_what_is_wrong_with_the_command_line(tmp_path):
    for arguments, message in (
        (["absent.py"], "absent.py does not exist"),
        ([], "which script"),
        (["--every", "0", "x.py"], "--every"),
        (["--evry", "1", "x.py"], "No such option"),
    ):
        code, out, err = ended(start([*WATCH, *arguments], tmp_path))
        assert (code, out) == (2, "")
        assert message in err


TRAINS = """
import json, os, signal, sys
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
oracle = {"steps": 0, "opposing": 0}
for step in range(40):
    model(torch.randn(32, 8)).square().mean().backward()
    before = [p.detach().double() for p in model.parameters()]
    optimizer.step()
    after = [p.detach().double() for p in model.parameters()]
    for x, y in zip(before, after):
        penalty = 0.05 * 0.3 * x
        oracle["opposing"] += int((y.abs() > (y + penalty).abs()).sum())
    oracle["steps"] += 1
    json.dump(oracle, open("oracle", "w"))
    optimizer.zero_grad()
    if step == 20 and len(sys.argv) > 1:
        exec(sys.argv[1])
sys.exit(5)
"""


@pytest.mark.parametrize(("what", "code", "status"), [
    pytest.param("sys.argv", 5, "failed", marks=pytest.mark.slow),
    ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, "interrupted"),
    pytest.param("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "interrupted",
                 marks=pytest.mark.slow),
    pytest.param("raise ValueError('no')", 1, "failed", marks=pytest.mark.slow),
])  # fmt: skip
def test_what_was_measured_is_kept_however_a_script_ends(tmp_path, what, code, status):
    (tmp_path / "train.py").write_text(TRAINS)
    command = [*WATCH, "--output", "mine", "train.py", what]
    found, out, err = ended(start(command, tmp_path))
    assert (found, out) == (code, ""), err
    summary = json.loads((tmp_path / "mine/summary.json").read_text())
    told = rows(tmp_path / "mine/steps.csv")
    assert (summary["status"], summary["steps"]) == (status, len(told))
    assert len(told) == (40 if code == 5 else 21)
    assert json.loads((tmp_path / "oracle").read_text()) == {
        "steps": len(told),
        "opposing": sum(int(row["opposing"]) for row in told),
    }
    assert sum(int(row["opposing"]) for row in told) > 0
    assert "wdprobe report mine" in err
    assert (tmp_path / "mine/figures/rop_over_steps.png").is_file()
    traced = err.startswith('Traceback (most recent call last):\n  File "/')
    assert traced == (code not in (5, -signal.SIGTERM))
    assert "wd_probe" not in err


MANY = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
how = sys.argv[1]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 17), torch.nn.GELU(), torch.nn.Linear(17, 4))
if how != "alone":
    dist.init_process_group("gloo")
if how == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(model)
if how == "fsdp":
    fully_shard(model[0])
    fully_shard(model)
options = {"lr": 0.05, "weight_decay": 0.3}
if how == "zero":
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **options)
else:
    optimizer = torch.optim.AdamW(model.parameters(), **options)
for step in range(8):
    model(torch.randn(32, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
sys.stdout.write("done\\n")  # at once, as another process writes too
if how != "alone":
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp", "zero"])
def test_under_torchrun_the_first_process_alone_writes(tmp_path, how):
    (tmp_path / "train.py").write_text(MANY)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    watch = [*WATCH, "--output", "mine", "train.py", how]
    code, out, err = ended(start([*torchrun, "2", "--no-python", "--", *watch], tmp_path))
    assert code == 0, err
    assert out.split() == ["done", "done"]
    assert err.count("8 steps of ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "train.py"]
    config = json.loads((tmp_path / "mine/config.json").read_text())
    assert [one["name"] for one in config["layers"]] == ["0", "2"]
    code, _, err = ended(start([*WATCH, "--output", "alone", "train.py", "alone"], tmp_path))
    assert code == 0, err
    columns = ("step", "penalized", "opposing", "flipped")
    found, expected = (
        [[row[name] for name in columns] for row in rows(tmp_path / run / "steps.csv")]
        for run in ("mine", "alone")
    )
    assert found == expected
    assert sum(int(row[2]) for row in found) > 0
