import json
import re
import sys

import pytest
from wd_probe.cli import main as cli

from wd_probe.training.survey import tiny_model


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["wdprobe", "audit", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_json(monkeypatch, capsys):
    arguments = ("--opt", "nadamw", "--lr", "0.5", "--weight-decay", "0.1", "--json")
    assert run(monkeypatch, *arguments, "--opt-kwargs", "betas=(0.8, 0.9)") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["command"], result["optimizer"], result["rule"]) == ("audit", "NAdamW", "wd")
    assert result["factor"] == pytest.approx(0.05, rel=1e-3)
    assert {t["name"] for t in result["tensors"]} == set(dict(tiny_model().named_parameters()))
    assert len(result["warnings"]) == 1


@pytest.mark.parametrize("width", ["80", "160"])
def test_tables(monkeypatch, capsys, width):
    from wd_probe.cli import console as render

    monkeypatch.setattr(render.out, "_width", int(width))
    arguments = ("--opt", "adamw", "--model", "test_vit", "--layer-decay", "0.5")
    assert run(monkeypatch, *arguments, "--img-size", "160") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= int(width)
    assert "layer_decay has no effect yet" in shown
    assert re.search(r"0\.001 +1$", shown, re.MULTILINE)
    names = ("sgd", "bnbadam", "adamp") if sys.platform != "linux" else ("sgd", "fusedsgd", "adamp")
    monkeypatch.setattr("wd_probe.training.survey.known_optimizers", lambda: names)
    assert run(monkeypatch, "--all") == 0
    shown = capsys.readouterr().out
    assert "2 of 3 optimizers audited" in shown
    assert "other (2-d, 4-d), wd (1-d)" in " ".join(shown.split())
    assert "fusedsgd: " in shown


TOLD = {
    ("adamw",): "1/(ηλ) is 1,000,000 steps, the run has 88: decay would take 0.0088 % off",
    ("adamw", "--weight-decay", "1e-5"): "decay would take nothing off in 88 steps: rounding",
    ("adamw", "--layer-decay", "0.5"): "1/(ηλ) is 1,000,000 steps",
    ("adam",): "how much decay takes off in a run goes by its gradients",
}


@pytest.mark.parametrize("given", TOLD)
def test_what_decay_comes_to_in_a_run(monkeypatch, capsys, given):
    assert run(monkeypatch, "--lr", "1e-4", "--steps", "88", "--json", "--opt", *given) == 0
    assert json.loads(capsys.readouterr().out)["warnings"][-1].startswith(TOLD[given])


def test_nothing_is_said_of_a_run_where_nothing_decays(monkeypatch, capsys):
    arguments = ("--opt", "adamw", "--weight-decay", "0", "--steps", "88", "--json")
    assert run(monkeypatch, *arguments) == 0
    assert not any("88" in line for line in json.loads(capsys.readouterr().out)["warnings"])


BAD = {
    "steps of all": (["--all", "--steps", "3"], "--steps needs --opt NAME"),
    "neither": ([], "give either --opt NAME or --all"),
    "both": (["--opt", "sgd", "--all"], "give either --opt NAME or --all"),
    "unknown": (["--opt", "adamv"], "unknown optimizer 'adamv'; did you mean "),
    "unknown class": (["--opt", "torch.optim.Adamm"], "torch.optim has no 'Adamm'; did you mean "),
    "unknown module": (["--opt", "nowhere.Adam"], "unknown optimizer 'nowhere.Adam': No module"),
    "no optimizer": (["--opt", "torch.nn.Linear"], "torch.nn.Linear is no torch.optim.Optimizer"),
    "lbfgs": (["--opt", "torch.optim.LBFGS"], "LBFGS moves the weights several times in one step"),
    "no pair": (["--opt", "sgd", "--opt-kwargs", "x"], "--opt-kwargs wants key=value, got 'x'"),
    "bad option": (
        ["--opt", "torch.optim.SGD", "--opt-kwargs", "x=1"],
        "torch.optim.SGD cannot be built here: TypeError: SGD.__init__() got an unexpected",
    ),
    "bad model": (["--opt", "sgd", "--model", "resnot18"], "unknown model 'resnot18'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, monkeypatch, capsys):
    arguments, message = BAD[name]
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("wdprobe: error: ")
    assert message in said
    assert said.count("\n") == 1
