import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from wd_probe.training.survey import audit_by_name, survey

ROOT = Path(__file__).parents[2]


def test_surveys_name_what_cannot_be_built():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {
            row.name: row for row in survey(["adamw", "torch.optim.LBFGS", "torch.optim.Rprop"])
        }
    assert (found["adamw"].rule, found["adamw"].multiple) == ("wd", "1")
    assert "no single û" in found["torch.optim.LBFGS"].error
    assert found["torch.optim.Rprop"].remarks == ("it has no weight_decay",)


@pytest.mark.slow
def test_a_dotted_name_needs_no_timm():
    code = (
        "import sys\n"
        "from wd_probe.training.survey import audit_by_name\n"
        "print(audit_by_name('torch.optim.AdamW')['rule'], 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "wd False\n"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["timm", "torch", "pytorch_optimizer"])
def test_the_tables_of_the_docs(package):
    pytest.importorskip(package)
    page = (ROOT / "docs" / "optimizers.md").read_text()
    command = [sys.executable, "docs/examples/optimizers.py", package]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    title = done.stdout.partition(":")[0]
    if title not in page:
        pytest.skip(f"the page is about another version than {title}")
    for row in done.stdout.strip().splitlines():
        assert row in page


def test_the_decay_expected_has_no_binary_tail():
    found = audit_by_name("sgd", lr=0.1, weight_decay=3)
    assert {tensor["expected"] for tensor in found["tensors"]} == {0.3}
