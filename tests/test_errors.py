import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import wd_probe
from wd_probe import WdProbeWarning
from wd_probe.errors import counted, first_line

SCRIPT = """
import torch
from wd_probe import OpposingPenaltyProbe

model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW([*model.parameters(), *other.parameters()])
probe = OpposingPenaltyProbe(model, optimizer)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()  # steps parameters that are none of the model's
"""


@pytest.mark.parametrize("folder", ["torch", "torch/utils", "wd_probe", "experiments"])
def test_a_warning_names_the_users_line_whatever_the_folders_name(tmp_path, folder):
    script = tmp_path / folder / "train.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT)
    with pytest.warns(WdProbeWarning, match="2 parameters that are none of the model's") as told:
        runpy.run_path(str(script))
    assert (told[0].filename, told[0].lineno) == (str(script), len(SCRIPT.splitlines()))


@pytest.mark.parametrize("folder", ["wd_probe_experiments", "wd_probe2/deeper", "other"])
def test_a_folder_beside_the_package_whose_name_begins_alike(tmp_path, folder):
    """The package is linked there, so that the two share all of their path but its end."""
    (tmp_path / "wd_probe").symlink_to(Path(wd_probe.__file__).parent)
    script = tmp_path / folder / "train.py"
    script.parent.mkdir(parents=True)
    script.write_text(
        "from wd_probe.errors import Teller\n\ndef train():\n    Teller()('untold')\n\ntrain()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert f"{script}:4: WdProbeWarning: untold" in done.stderr


def test_what_an_error_says_is_printable():
    assert first_line(ValueError("a\0b\x1b[31m\nc")) == r"a\x00b\x1b[31m"
    assert first_line(ValueError("é")) == "é"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 1000))) == 160


def test_counts_in_words():
    assert [counted(number, "epoch") for number in (0, 1, 1200)] == [
        "0 epochs", "1 epoch", "1,200 epochs",
    ]  # fmt: skip
    assert [counted(number, "class", "classes") for number in (1, 10)] == ["1 class", "10 classes"]
    assert [counted(number, "GPU") for number in (0.5, 1.0, 2.0)] == ["0.5 GPUs", "1 GPU", "2 GPUs"]
    assert counted(123_456_789_012, "weight") == "123,456,789,012 weights"
