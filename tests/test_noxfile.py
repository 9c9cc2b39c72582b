import runpy
from pathlib import Path

import pytest

TESTS_OF = runpy.run_path(str(Path(__file__).parent.parent / "noxfile.py"))["tests_of"]


@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("wd_probe/decay/rules.py", "tests/decay/test_rules.py"),
        ("wd_probe/decay/twin.py", "tests/decay"),  # it has none of its own
        ("wd_probe/decay/kernel/cpu.c", "tests/decay"),
        ("wd_probe/errors.py", "tests"),
        ("wd_probe/__init__.py", "tests"),
        ("cli/rop.py", "tests/cli/test_rop.py"),
        ("tests/decay/test_rules.py", "tests/decay/test_rules.py"),
        ("tests/decay/test_removed.py", "tests/decay"),
        ("tests/conftest.py", "tests"),
        ("docs/guide.md", "tests/test_docs.py"),
        ("pyproject.toml", "tests"),
    ],
)
def test_tests_of_a_file(file, tests, monkeypatch, tmp_path):
    for name in ("decay/test_rules.py", "cli/test_rop.py", "test_docs.py"):
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    assert TESTS_OF(Path(file)) == Path(tests)
