import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import wd_probe

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_public_names():
    assert sorted(wd_probe.__all__) == [
        "AuditReport",
        "InputError",
        "Layer",
        "LayerDistortion",
        "OpposingPenaltyProbe",
        "RunError",
        "ScanPoint",
        "StepRecord",
        "Tally",
        "TensorAudit",
        "WdProbeError",
        "WdProbeWarning",
        "WeightDecay",
        "audit",
        "feature_distortion",
        "half_life",
        "layers",
        "layerwise_rates",
        "opposing",
        "watch",
        "zero_shot_decay",
    ]
    assert wd_probe.__all__ == sorted(wd_probe._HOME)
    for name in wd_probe.__all__:
        assert callable(getattr(wd_probe, name))
    assert dir(wd_probe) == sorted(wd_probe.__all__)


def test_no_submodule_hides_a_public_name():
    folder = Path(wd_probe.__file__).parent
    assert not {path.stem for path in folder.iterdir()} & set(wd_probe.__all__)


def test_packages_listed_are_the_folders_on_disk():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    inside = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in ROOT.glob("wd_probe/**/__init__.py")
    }
    outside = {
        ".".join(["wd_probe", *path.parent.relative_to(ROOT).parts])
        for path in ROOT.glob("cli/**/__init__.py")
    }
    assert listed == inside | outside


#: What is imported where it alone is of use; the first three are extras, wandb is of the loggers,
#: torch brings the last.
APART = {
    "lightning": "wd_probe/integrations/lightning.py",
    "transformers": "wd_probe/integrations/transformers.py",
    "ray": "wd_probe/sweeps/ray.py",
    "wandb": "wd_probe/training/wandb_log.py",
    "triton": "wd_probe/probe/kernel/triton_passes.py",
}


def imported(path):
    """The first parts of the names that a file imports from elsewhere, indented imports too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_what_is_imported_is_declared_and_nothing_else():
    project = PROJECT["project"]
    declared = {re.split(r"[<>=\[]", line)[0] for line in project["dependencies"]}
    distributions, used = importlib.metadata.packages_distributions(), set()
    for path in [*ROOT.glob("wd_probe/**/*.py"), *ROOT.glob("cli/**/*.py")]:
        for name in set(imported(path)) - sys.stdlib_module_names - {"wd_probe", "_typeshed"}:
            if name in APART:
                assert str(path.relative_to(ROOT)) == APART[name]
                continue
            (distribution,) = set(distributions[name])
            used.add(distribution.lower().replace("_", "-"))
    assert used == declared
    assert set(APART) - {"triton", "wandb"} == set(project["optional-dependencies"]) - {
        "dev",
        "loggers",
    }


def test_files_that_are_no_code_are_listed_too():
    listed = PROJECT["tool"]["setuptools"]["package-data"].items()
    packaged = {
        file
        for package, patterns in listed
        for pattern in patterns
        for file in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    inside = {path for path in ROOT.glob("wd_probe/**/*") if path.is_file()}
    assert packaged == {path for path in inside if path.suffix not in (".py", ".pyc")}


def test_version_stands_in_one_place_more():
    assert PROJECT["project"]["version"] == wd_probe.__version__


def test_the_library_alone_loads_no_front_end():
    code = (
        "import sys, wd_probe\n"
        "[getattr(wd_probe, name) for name in wd_probe.__all__]\n"
        "heavy = ('timm', 'typer', 'rich', 'tensorboard', 'matplotlib', 'sklearn',\n"
        "         'lightning', 'transformers', 'accelerate')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "import wd_probe.runs.figures\n"
        "print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\nTrue\n"


def test_attaching_loads_no_compiler():
    """torch._dynamo takes a second or more, and only who compiles needs it."""
    code = (
        "import sys, wd_probe.decay.methods, wd_probe.probe.probe\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_imports_flow_one_way():
    """The contract in pyproject.toml; indented imports and those for types alone count too."""
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_cli_is_not_a_top_level_package():
    assert importlib.util.find_spec("wd_probe.cli").origin == str(ROOT / "cli" / "__init__.py")


@pytest.mark.slow
@pytest.mark.parametrize("parts", [[], ["training"]])
def test_the_benchmarks_run(parts):
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *parts, "--quick", "--rounds", "1"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout
    assert done.stdout.count("|---") > 5
