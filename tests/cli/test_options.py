from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner
from wd_probe.cli import main
from wd_probe.cli import options as o

from wd_probe import InputError
from wd_probe.sweeps.options import PaperOptions
from wd_probe.training.option import AT_LEAST_1, Option, options_in
from wd_probe.training.options import TrainOptions, ZeroshotOptions

seen = {}


@o.command(
    given=o.Fields(
        TrainOptions(opt="adam", method="wd"),
        but=("seed",),
        axes={"opt": "Optimizers.", "momentum": "Momenta."},
        help={"every": "How often."},
    )
)
def train(
    given: o.Given[TrainOptions],
    *,
    size: Annotated[int, Option("A size.", must=AT_LEAST_1)] = 3,
    on: Annotated[bool, Option("Of two.")] = True,
) -> None:
    """Train."""
    seen.update(given=given, size=size, on=on)


@o.command(given=o.Fields(PaperOptions(), only=("seeds", "lrs", "datasets")))
def paper(given: o.Given[PaperOptions]) -> None:
    """Again."""
    seen.update(given=given)


def app_of(function):
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return app


def command_of(function):
    return typer.main.get_command(app_of(function))


def run(function, *arguments):
    return CliRunner().invoke(app_of(function), [*map(str, arguments)])


def test_what_is_typed_stands_over_the_commands_own_defaults():
    found = run(
        train, "--steps", 3, "--momentum", 0.5, "--opt", "adam, sgd", "--scale", "mean", "--amp",
        "--opt-kwargs", "fused=True", "--opt-kwargs", "betas=(0.8, 0.9)", "--no-on",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    given = seen["given"]
    assert given.typed == {
        "opt": ("adam", "sgd"), "momentum": ("0.5",), "steps": 3, "scale": "mean", "amp": True,
        "opt_kwargs": "fused=True betas=(0.8,0.9)",
    }  # fmt: skip
    assert given.options(opt="sgd", momentum=0.5, seed=3) == TrainOptions(
        opt="sgd", momentum=0.5, steps=3, scale="mean", amp=True, seed=3, method="wd",
        opt_kwargs="fused=True betas=(0.8,0.9)",
    )  # fmt: skip
    assert given.flag("img_size") == "--img-size"
    assert (seen["size"], seen["on"]) == (3, False)


def test_several_values_of_one_option():
    assert run(paper, "--lr", "1e-3, 2", "--dataset", "a,b,").exit_code == 0
    options = seen["given"].options()
    assert options == PaperOptions(lrs=(1e-3, 2.0), datasets=("a", "b"))
    refused = run(paper, "--lr", "1e-3,fast")
    assert isinstance(refused.exception, InputError)
    assert str(refused.exception) == "--lr takes numbers with commas between, got '1e-3,fast'"


def test_what_a_command_takes_is_told_in_its_own_order():
    known = [parameter.name for parameter in command_of(train).params]
    assert known[:3] == ["opt", "momentum", "model"]
    assert known[-3:] == ["size", "on", "config"]
    shown = run(train, "--help").output
    assert "How often." in shown
    assert "--seed" not in shown
    assert "--no-on" in shown
    known = [parameter.name for parameter in command_of(paper).params]
    assert known == ["seeds", "lrs", "datasets", "config"]


@o.command("models")
def several(models: Annotated[list[str] | None, Option("Names.")] = None) -> None:
    """Of several."""
    seen.update(models=models)


@o.command("model", given=o.Fields(TrainOptions(), only=("model", "lr")))
def one(given: o.Given[TrainOptions]) -> None:
    """Of one."""
    seen.update(given=given)


def test_an_option_typed_without_its_flag():
    assert run(one, "resnet18", "--lr", 1).exit_code == 0
    assert seen["given"].typed == {"model": "resnet18", "lr": 1.0}
    assert run(one).exit_code == 0
    assert seen["given"].typed == {}
    refused = run(one, "resnet18", "--model", "resnet18")
    assert isinstance(refused.exception, InputError)
    assert str(refused.exception) == "give MODEL or --model, not both"
    assert "As --model." in run(one, "--help").output
    for given in (["a", "b"], ["--models", "a", "--models", "b"]):
        assert run(several, *given).exit_code == 0
        assert seen["models"] == ["a", "b"]
    assert run(several).exit_code == 0
    assert not seen["models"]


def test_a_commands_own_option_is_held_to_its_bound():
    refused = run(train, "--size", 0)
    assert isinstance(refused.exception, InputError)
    assert str(refused.exception) == "--size must be at least 1, got 0"


@pytest.mark.parametrize(
    ("command", "kind", "but"),
    [
        ("train", TrainOptions, set()),
        ("rop", TrainOptions, {"val_split", "train_samples", "both_moments"}),
        ("sweep", TrainOptions, {"seed", "recovery_interval"}),
        ("zeroshot", ZeroshotOptions, set()),
        ("reproduce", PaperOptions, set()),
    ],
)
def test_a_new_field_is_an_option_of_its_commands_at_once(command, kind, but):
    """One definition: nothing but the dataclass names the options."""
    known = typer.main.get_command(main.app).commands[command]
    names = {parameter.name: parameter for parameter in known.params}
    assert set(options_in(kind)) - set(names) == but
    for name, (_, option) in options_in(kind).items():
        if name in names:
            assert option.flag_of(name) in names[name].opts
