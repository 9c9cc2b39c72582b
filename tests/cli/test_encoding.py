import io
import json
import os
import subprocess
import sys

import pytest
from wd_probe.cli import main as cli
from wd_probe.cli.encoding import json_for

ENCODINGS = ("ascii", "cp1252", "cp437", "latin-1", "utf-8", "utf-16")


@pytest.fixture
def said(monkeypatch, tmp_path):
    """Run a command on a terminal of an encoding: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(encoding, *arguments):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["wdprobe", *map(str, arguments)])
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            code = 0
            try:
                cli.main()
            except SystemExit as end:
                code = end.code or 0
        return code, *(s.buffer.getvalue().decode(encoding) for s in streams)

    return run


SHORT = ("--model", "test_efficientnet", "--steps", 2, "--batch-size", 16)
COMMANDS = {
    "help": ["--help"],
    "rop": ["rop", *SHORT, "--output", "λ-runs/Ω"],
    "rop --help": ["rop", "--help"],
    "audit": ["audit", "--opt", "laprop"],
    "layers": ["layers", "--model", "test_resnet", "--weight-decay", "0.05"],
    "an error": ["rop", "--model", "λ-net"],
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_well_in_every_encoding(said, command, encoding):
    code, out, err = said(encoding, *COMMANDS[command])
    assert code == (2 if command == "an error" else 0), err
    shown = out + err
    if command == "rop":
        assert ("η" in shown) == encoding.startswith("utf")
        assert ("eta 0.0001" in shown) == (not encoding.startswith("utf"))
    if command == "an error":
        assert ("λ-net" if encoding.startswith("utf") else "lambda-net") in shown


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_says_the_same_in_every_encoding(said, encoding):
    code, out, _ = said(encoding, "rop", *SHORT, "--json", "--output", "λ-\N{SNOWMAN}-é-\U0001f600")
    assert code == 0
    assert json.loads(out)["run"] == "λ-\N{SNOWMAN}-é-\U0001f600"
    assert json_for(encoding, '{"a": "é"}') == (
        '{"a": "\\u00e9"}' if encoding == "ascii" else '{"a": "é"}'
    )


@pytest.mark.slow
def test_files_are_utf_8_whatever_the_locale(tmp_path):
    environment = {**os.environ, "PYTHONWARNDEFAULTENCODING": "1", "PYTHONIOENCODING": "cp1252"}
    code = (
        "import warnings; from wd_probe.cli import main\n"
        "warnings.filterwarnings('error', category=EncodingWarning, module='wd_probe')\n"
        "main.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "rop", *map(str, SHORT), "--output", "run-é"],
        cwd=tmp_path, env=environment, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run-é" / "config.json").read_text("utf-8"))
    assert config["model"] == "test_efficientnet"
