"""`--config FILE` of every command that has options."""

import json
from pathlib import Path

import pytest

from tests.small import FAST, rows

ARGS = Path(__file__).parents[1] / "data/timm_args.yaml"
SHORT = ["--model", "test_convnext", "--steps", "1", "--batch-size", "8"]


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_what_is_typed_goes_before_the_file(wdprobe, tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model: test_resnet\nbatch-size: 8\nsteps: 1\nmethod: wd\namp: true\n"
        "opt_kwargs: {eps: 1.0e-7}\nsched: cosine\nsched_on_updates: true\n"
    )
    code, _, err = wdprobe("train", "test_convnext", "--config", "a.yaml", "--lr", 1e-3,
                           "--method", "rwd", "--output", "one")  # fmt: skip
    assert code == 0, err
    one = config(tmp_path / "one")
    assert (one["model"], one["method"], one["lr"]) == ("test_convnext", "rwd", 1e-3)
    assert (one["batch_size"], one["amp"], one["opt_kwargs"]) == (8, True, "eps=1e-07")
    assert one["sched"] == "cosine"
    code, _, err = wdprobe("train", "--config", "one/config.json", "--output", "two")
    assert code == 0, err
    two = config(tmp_path / "two")
    assert [k for k in two if two[k] != one[k]] == ["output", "command_line"]
    for name in ("steps.csv", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    code, _, err = wdprobe("rop", "--config", "one/config.json", "--output", "three")
    assert "asks for more" not in err
    change = tmp_path / "one/config.json"
    change.write_text(json.dumps(one | {"val_split": 0.5}))
    code, _, err = wdprobe("rop", "--config", change, "--steps", 1, "--output", "four")
    assert code == 0
    assert "asks for more than this command has, which is left out: val_split" in err


def test_timms_own(wdprobe, tmp_path):
    code, _, err = wdprobe("rop", *SHORT, "--config", ARGS, "--opt", "adamw", "--output", "run",
                           "--sched-on-updates")  # fmt: skip
    assert code == 0, err
    assert "which is left out: color_jitter, scale, ratio" in err
    run = config(tmp_path / "run")
    assert (run["sched"], run["smoothing"], run["opt"]) == ("cosine", 0.1, "adamw")
    assert float(rows(tmp_path / "run/steps.csv")[0]["lr"]) == 1e-5


def test_several_values_and_other_commands(wdprobe, tmp_path):
    (tmp_path / "a.toml").write_text(
        'lr = [1e-3, 1e-2]\nmethod = "wd"\nmodel = "test_convnext"\nsteps = 1\nbatch_size = 8'
    )
    code, out, err = wdprobe("sweep", "--config", "a.toml", "--json")
    assert code == 0, err
    assert [cell["lr"] for cell in json.loads(out)["cells"]] == [1e-3, 1e-2]
    (tmp_path / "b.yaml").write_text("opt: laprop\nopt_kwargs: [eps=1e-7]\nlr: 0.2\njson: true\n")
    code, out, err = wdprobe("audit", "--config", "b.yaml", "--weight-decay", 0.5)
    found = json.loads(out)
    (tmp_path / "c.yaml").write_text("opt: adamw\nopt_kwargs: {eps: 1e-7, betas: [0.9, 0.9]}\n")
    code, _, err = wdprobe("audit", "--config", "c.yaml", "--json")
    assert code == 0, f"YAML takes 1e-7 for a text: {err}"
    assert (code, found["name"], found["lr"], found["weight_decay"]) == (0, "laprop", 0.2, 0.5)


def test_a_file_is_shared_by_commands(wdprobe, tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model: test_convnext\ntrain-samples: 16\nbatch_size: 8\nsteps: 1\nseeds: 2\nby: layer\n"
    )
    code, _, err = wdprobe("train", "--config", "a.yaml", "--output", "one")
    assert code == 0, err
    assert "asks for more than this command has, which is left out: seeds, by\n" in err
    code, _, err = wdprobe("rop", "--config", "a.yaml", "--output", "two")
    assert code == 0, err
    assert err.count("which is left out: train_samples, seeds, by\n") == 1
    assert config(tmp_path / "two")["batch_size"] == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "config a.yaml: unknown key 'lrr'; did you mean lr"),
        ("every: fast", "config a.yaml: every must be a whole number, got 'fast'"),
        ("amp: 1", "config a.yaml: amp must be true or false, got 1"),
        ("method: [wd]", "config a.yaml: method must be one of own, baseline, l1"),
        ("sched: cosin", "--sched must be one of none, constant, cosine"),
        ("model: {a: 1}", "config a.yaml: model must be a text, got"),
    ],
)
def test_what_is_not_understood(wdprobe, tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    code, _, err = wdprobe("rop", *FAST, "--config", "a.yaml")
    assert code == 2
    assert f"wdprobe: error: {message}" in err
    assert err.count("\n") == 1


def test_beside_resume_it_is_refused(wdprobe, tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1")
    code, _, err = wdprobe("rop", "--resume", "run", "--config", "a.yaml")
    assert code == 2
    assert "--resume takes every option from run/config.json; leave out --lr" in err
