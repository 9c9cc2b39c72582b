"""Every command and snippet of the README and the docs runs."""

import copy
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from wd_probe.cli import main as cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Run by the person or by CI, not inside the test suite they would start again.
ELSEWHERE = ("pip ", "uv ", "pytest", "python -m tests.benchmarks", "python docs/", "torchrun ")
#: Commands that serve until Ctrl-C are given a look at a folder that is not there.
SERVES = "wdprobe dashboard"

#: Blocks whose commands take a minute and more even in their quickest form.
LONG = ("results.md:1", "results.md:2")

#: Packages of an extra that only documentation takes; test_loggers.py runs their blocks.
LOGGERS = ("wandb", "mlflow", "trackio")

#: What makes the slow ones short.
QUICKLY = {
    "wdprobe reproduce": ["--method", "wd", "--weight-decay", "0.5", "--seeds", "1"],
    "wdprobe sweep": ["--steps", "1", "--weight-decay", "0.5", "--method", "wd", "--seeds", "1"],
    "wdprobe train": ["--steps", "1", "--batch-size", "4"],
    "wdprobe rop": ["--steps", "1", "--batch-size", "4"],
    "wdprobe zeroshot": ["--steps", "2", "--epochs", "1", "--num-samples", "32"],
}


def blocks(language):
    return [
        (f"{page.name}:{number}", text)
        for page in PAGES
        for number, text in enumerate(
            re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
        )
    ]


def commands():
    """Each once, by where it stands first."""
    parts = {
        part.strip(): where
        for where, text in reversed(blocks("bash"))
        for line in text.replace("\\\n", " ").splitlines()
        for part in line.split("&&")
    }
    return [
        pytest.param(where, part, marks=pytest.mark.slow if where in LONG else ())
        for part, where in reversed(parts.items())
        if part and not part.startswith(ELSEWHERE)
    ]


def run(command, monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), *more])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.*isinstance\\(treespec, LeafSpec\\):FutureWarning",
    "ignore:'pin_memory' argument is set as true but no accelerator",
)
@pytest.mark.parametrize(
    ("where", "text"),
    [block for block in blocks("python") if not any(f"import {x}\n" in block[1] for x in LOGGERS)],
)
def test_snippets(where, text, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(text, where, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


@pytest.mark.parametrize(("where", "command"), commands())
def test_commands_parse_and_start(where, command, monkeypatch, tmp_path, capsys):
    """Each in its quickest form: one step, or a folder that is missing."""
    monkeypatch.chdir(tmp_path)
    if command.startswith(SERVES):
        assert run(command, monkeypatch) == 2
        assert "is no folder" in capsys.readouterr().err
        return
    if command.startswith("wdprobe watch"):
        check_script(command, tmp_path)
        return
    if "--resume" in command:
        assert run(command, monkeypatch) == 2
        assert "runs/killed does not exist" in capsys.readouterr().err
        return
    more = next((options for start, options in QUICKLY.items() if command.startswith(start)), [])
    if "/usr/share/datasets" in command and not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    assert run(command, monkeypatch, *more) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


def check_script(command, folder):
    """A script that only says what it was given, in a process of its own."""
    (folder / "package").mkdir()
    for script in (folder / "train.py", folder / "package/train.py"):
        script.write_text("import sys; print(sys.argv)")
    wdprobe = Path(sys.executable).parent / "wdprobe"
    done = subprocess.run(
        [wdprobe, *shlex.split(command)[1:]], cwd=folder, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout[0]) == (0, "["), done.stderr


def test_the_example_of_equilibrium(tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "docs/examples/equilibrium.py"))
    example["main"](str(tmp_path / "shown.png"), 8)
    assert (tmp_path / "shown.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("16 idle") == 2


def test_the_experiments_numbers_are_those_of_their_rows(tmp_path, capsys, monkeypatch):
    answers = runpy.run_path(str(ROOT / "docs/data/answers.py"))
    monkeypatch.setattr(sys, "argv", ["answers.py", "--figures", str(tmp_path)])
    answers["main"]()
    printed = capsys.readouterr().out
    page = (ROOT / "docs/experiments.md").read_text().partition("## What came out")[2]
    told = re.findall(r"[+−]?\d+\.\d+\s±\s+\d+\.\d+", page)
    assert len(told) > 100
    assert [one for one in told if " ".join(one.split()) not in printed] == []
    for name in re.findall(r"images/(\w+\.png)", page):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.slow
def test_the_notebook_shows_what_it_holds(tmp_path):
    """In a kernel of its own and an empty folder: the kinds of output that are on file."""
    import nbformat
    from nbclient import NotebookClient

    kept = nbformat.read(ROOT / "docs/examples/digits.ipynb", as_version=4)
    notebook = copy.deepcopy(kept)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}})
    client.execute()
    kinds = [[sorted(one["data"]) for one in cell.get("outputs", ())] for cell in notebook.cells]
    assert kinds == [
        [sorted(one["data"]) for one in cell.get("outputs", ())] for cell in kept.cells
    ]
    tables = [one["data"]["text/html"] for cell in notebook.cells for one in cell.get("outputs", ())
              if "text/html" in one["data"]]  # fmt: skip
    for table, words in zip(tables, ("What decay did", "Step 240", "AdamW", "top-1"), strict=True):
        assert words in table
    (run,) = (tmp_path / "runs").iterdir()
    assert {"steps.csv", "summary.json", "figures"} <= {path.name for path in run.iterdir()}


@pytest.mark.slow
def test_the_first_command_as_it_stands(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("wdprobe rop --model convnext_tiny", monkeypatch) == 0
    assert "Opposing-penalty rate" in capsys.readouterr().out


def test_ci_runs_the_readmes_second_command():
    script = (ROOT / ".ci/run").read_text()
    assert "pip install -q -e '.[dev]'" in script
    assert "\npytest\n" in script
    assert "pip install -e '.[dev]' && pytest" in (ROOT / "README.md").read_text()


def test_the_site_builds_strictly(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "OpposingPenaltyProbe" in (tmp_path / "api" / "index.html").read_text()


def test_pictures_and_links_exist():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_files_that_contributing_names_exist():
    names = re.findall(r"`([\w./]+\.(?:py|c|md|toml))`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(names) > 15
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    assert [name for name in names if not re.search(rf"(^|/){name}$", tracked, re.MULTILINE)] == []


def test_no_registry_host_stands_in_the_repository():
    named = subprocess.run(
        ["git", "grep", "-lE", r"pypi\.org|pythonhosted|deb\.debian|registry\.npmjs"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert [name for name in named if name != "tests/test_docs.py"] == []


def test_the_tests_that_compatibility_names_exist():
    there = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in (file.stem, *re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE))
    }
    page = (ROOT / "docs" / "compatibility.md").read_text()
    assert set(re.findall(r"\btest_\w+", page)) <= there
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    untested = [
        row for row in rows if not re.search(r"`(\w+/)?test_", row) and "not tried |" not in row
    ]
    assert [row for row in untested if not row.endswith(("| test |", "`) |"))] == []
