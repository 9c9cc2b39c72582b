"""`nox` formats, lints, types and tests what changed; `nox --list` names the other sessions.

Sessions run in the environment that nox is in, with the `dev` extra, unless they make their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import nox

nox.options.sessions = ["changed"]
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
# What is installed beside nox is found even where that environment is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@nox.session(venv_backend="none")
def changed(session: nox.Session) -> None:
    """Format, lint, type and test what differs from main, committed or not."""
    session.run("ruff", "format")
    session.run("ruff", "check", "--fix")
    lint(session)
    files = changed_files()
    wanted = {tests_of(file) for file in files}
    if Path("tests") in wanted:
        tests(session)
    elif wanted:
        doctests = {file for file in files if file.parts[0] == "wd_probe" and file.suffix == ".py"}
        paths = sorted(map(str, wanted | {file for file in doctests if file.exists()}))
        session.run("pytest", *paths, *session.posargs, success_codes=[0, 5])  # 5: only slow ones


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """ruff, mypy and import-linter, as .pre-commit-config.yaml has them."""
    session.run("pre-commit", "run", "--all-files", "--show-diff-on-failure")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The whole suite."""
    session.run("pytest", *session.posargs)


@nox.session(venv_backend="none")
def slow(session: nox.Session) -> None:
    """The tests that take minutes."""
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """The documentation, built into site/."""
    session.run("mkdocs", "build", "--strict")


@nox.session(venv_backend="none")
def wheel(session: nox.Session) -> None:
    """The wheel built, installed and run in an environment of its own."""
    session.run("pytest", "-m", "slow", "tests/test_wheel.py", *session.posargs)


@nox.session(python=["3.11", "3.12", "3.13"])
def python(session: nox.Session) -> None:
    """The whole suite on each Python."""
    session.install("-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """The whole suite on the lowest versions that pyproject.toml allows."""
    session.install("uv")
    session.run(
        *("uv", "pip", "install", "--python", session.virtualenv.location),
        *("--resolution", "lowest-direct", "-e", ".[dev]"),
    )
    session.run("pytest", *session.posargs)


def changed_files() -> set[Path]:
    """What differs from main, new and deleted files too."""

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(["git", *arguments], stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.split("\0")

    main = git("merge-base", "HEAD", "main")[0].strip()
    names = git("diff", "-z", "--name-only", "--no-renames", main)
    names += git("ls-files", "-z", "--others", "--exclude-standard")
    return {Path(name) for name in names if name}


def tests_of(file: Path) -> Path:
    """The test file of its name, or the nearest folder of tests; `tests` is the whole suite."""
    if file.suffix == ".md":
        return Path("tests/test_docs.py")
    if file.parts[0] not in ("wd_probe", "cli", "tests"):
        return Path("tests")
    if not file.name.startswith("test_"):
        file = file.with_name(f"test_{file.stem}.py")
    if file.parts[0] != "tests":
        file = Path("tests", *file.parts[file.parts[0] == "wd_probe" :])
    return next(path for path in (file, *file.parents) if path.exists())
