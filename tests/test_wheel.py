"""The wheel as a stranger has it: built, installed in an environment of its own, run elsewhere."""

import os
import shutil
import site
import subprocess
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

import wd_probe

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def run(*command, folder):
    without = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=without, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The sources, their wheel, and the folder of commands that it was installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    for part in ("wd_probe", "cli"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, source / part, ignore=ignored)
    venv.create(folder / "own", with_pip=True)
    python = folder / "own" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "wheel", "--no-deps", "-w", folder, source, folder=folder)
    (wheel,) = folder.glob("*.whl")
    run(python, "-m", "pip", "install", "--no-deps", wheel, folder=folder)
    # What wd_probe needs is lent by this environment, after what the own one has.
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    lent = Path(run(python, "-c", purelib, folder=folder).strip()) / "lent.pth"
    lent.write_text("\n".join(site.getsitepackages()))
    return source, wheel, python.parent


def test_the_wheel_holds_each_file_of_the_package_and_no_other(installed):
    source, wheel, _ = installed
    (source / "cli").rename(source / "wd_probe" / "cli")
    files = {
        path.relative_to(source) for path in (source / "wd_probe").rglob("*") if path.is_file()
    }
    info = f"wd_probe-{wd_probe.__version__}.dist-info"
    held = {Path(name) for name in ZipFile(wheel).namelist()}
    assert {path for path in held if path.parts[0] != info} == files


def test_its_commands_run(installed, tmp_path):
    commands = installed[2]

    def wdprobe(*arguments):
        return run(commands / "wdprobe", *arguments, folder=tmp_path)

    where = "import wd_probe, wd_probe.cli; print(wd_probe.__file__, wd_probe.cli.__file__)"
    assert str(ROOT) not in run(commands / "python", "-c", where, folder=tmp_path)
    assert wdprobe("--version") == f"wdprobe {wd_probe.__version__}\n"
    assert "layer4" in wdprobe("layers", "--model", "test_resnet")
    training = ("--model", "test_resnet", "--steps", 2, "--batch-size", 4, "--device", "cpu")
    assert "R_op" in wdprobe("rop", *training, "--output", "run")
    wdprobe("report", "run")
    assert "</html>" in (tmp_path / "run" / "report.html").read_text()
