import contextlib
import json
import re
import resource
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.small import FAST, rows, start


def test_hub_not_reachable(wdprobe, monkeypatch):
    import huggingface_hub
    import timm

    def refused(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection to the hub")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", refused)
    code, _, err = wdprobe("rop", "--model", "convnext_tiny", "--pretrained", "--steps", 1)
    assert code == 1
    assert "convnext_tiny could not be fetched from the hub (no connection to the hub)" in err
    assert "use --checkpoint with a local file" in err


def test_no_pretrained_weights(wdprobe):
    code, _, err = wdprobe("rop", "--model", "convnext_tiny.nonsense", "--pretrained")
    assert code == 2
    assert "nonsense" in err


def test_own_checkpoint_is_read_back(wdprobe, tmp_path):
    assert wdprobe("rop", *FAST, "--steps", 2, "--output", "a")[0] == 0
    weights = tmp_path / "a/model.safetensors"
    code, _, err = wdprobe(
        "rop", *FAST, "--steps", 1, "--lr", 1e-12, "--checkpoint", weights, "--output", "b"
    )
    assert code == 0, err
    a, b = load_file(weights), load_file(tmp_path / "b/model.safetensors")
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)
    code, _, err = wdprobe("rop", *FAST, "--steps", 1, "--output", "a")
    assert code == 2
    assert "a holds a run already; choose another --output" in err
    (tmp_path / "a/config.json").unlink()
    table = (tmp_path / "a/steps.csv").read_bytes()
    code, _, err = wdprobe("rop", *FAST, "--steps", 1, "--output", "a")
    assert code == 2
    assert "a holds a run's steps.csv already; choose another --output" in err
    assert (tmp_path / "a/steps.csv").read_bytes() == table
    code, _, err = wdprobe("zeroshot", "--model", "test_convnext", "--output", "a")
    assert code == 2
    assert "a holds a run's steps.csv already; choose another --output" in err
    assert "training" not in err


def test_a_loss_that_is_no_number_ends_the_run(wdprobe, tmp_path):
    code, out, err = wdprobe(
        "rop",
        *FAST,
        "--opt",
        "sgd",
        "--method",
        "wd",
        "--lr",
        "1e25",
        "--weight-decay",
        "1e-28",
        "--output",
        "run",
        "--json",
    )
    assert code == 1
    result = json.loads(out)
    assert result["status"] == "diverged"
    assert f"the loss is no longer finite at step {result['steps']}" in err
    assert result["steps"] == len(rows(tmp_path / "run/steps.csv"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_and_summarizes_what_was_measured(tmp_path, number):
    process = start(tmp_path, "rop", *FAST, "--epochs", "1000", "--output", "run", "--json")
    table = tmp_path / "run/steps.csv"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (table.exists() and table.stat().st_size > 500):
        time.sleep(0.2)
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    result = json.loads(out)
    assert result["status"] == "interrupted"
    assert err.splitlines()[-2:] == [
        f"interrupted after step {result['steps']}; what was measured is kept, and this goes on "
        "from its last save:",
        "wdprobe rop --resume run",
    ]
    assert len(rows(table)) == result["steps"] > 0
    assert result["rate"]["mean"] is not None


@contextlib.contextmanager
def room(most):
    """No file may grow beyond so many bytes."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.filterwarnings("default::wd_probe.WdProbeWarning")
@pytest.mark.parametrize(
    ("most", "more"),
    [(20_000, []), (500_000, []), (500_000, ["--recovery-interval", "1"])],
    ids=["tables", "weights", "recovery"],
)
def test_a_full_disk_is_told_once_and_measuring_goes_on(wdprobe, tmp_path, most, more):
    """torch and safetensors have errors of their own for it."""
    steps = 30 if most == 20_000 else 3
    with room(most):
        code, out, err = wdprobe(
            "rop", *FAST, "--steps", steps, "--output", "run", "--json", *more
        )  # fmt: skip
    assert code == 1
    assert err.count("nothing more is written to run (") == 1
    assert "File too large" in err
    result = json.loads(out)
    assert result["status"] == "finished"
    assert result["measured_steps"] == result["steps"] == steps
    assert not list((tmp_path / "run").glob("*.partial"))


def test_one_step_is_no_steps_and_rates_are_written_as_people_do(wdprobe):
    code, out, err = wdprobe("rop", *FAST, "--steps", 1, "--lr", 1e-3)
    assert code == 0, err
    assert "test_convnext on digits · 1 step\n" in out
    assert "10 classes" in err
    assert not re.search(r"\de[-+]?\d", out)
