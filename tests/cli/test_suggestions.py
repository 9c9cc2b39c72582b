import re

import pytest
from wd_probe.cli.suggestions import _MEANT


def plain(err):
    """What is said in the box, without the quotes and stops of one version of click or another."""
    return " ".join(re.sub(r"[╭─╮│╰╯':.]", "", err).split())


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("rop", "--wd", "--weight-decay"),
        ("train", "-b", "--batch-size"),
        ("train", "--batch", "--batch-size"),
        ("sweep", "--bs", "--batch-size"),
        ("rop", "--optimizer", "--opt"),
        ("zeroshot", "--epoch", "--epochs"),
        ("layers", "--wd", "--weight-decay"),
        ("rop", "--filter-bias", "--filter-bias-and-bn"),
    ],
)
def test_an_option_of_another_name_gets_the_right_suggestion(wdprobe, command, typed, meant):
    code, _, err = wdprobe(command, typed, 1)
    assert code == 2
    assert plain(err).endswith(
        (
            f"No such option {typed} (Possible options {meant})",
            f"No such option {typed} Did you mean {meant}?",
        )
    )


@pytest.mark.parametrize("command", ["layers", "audit"])
def test_only_options_that_the_command_has_are_suggested(wdprobe, command):
    _, _, err = wdprobe(command, "-e", 1)
    assert "No such option -e" in plain(err)
    assert "--epochs" not in err


def test_what_is_suggested_exists_in_some_command():
    from wd_probe.training.option import options_in
    from wd_probe.training.options import TrainOptions

    known = {option.flag_of(name) for name, (_, option) in options_in(TrainOptions).items()}
    assert set(_MEANT.values()) <= known | {"--json"}
