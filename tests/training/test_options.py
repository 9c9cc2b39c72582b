import json
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from wd_probe import InputError
from wd_probe.training.option import Option, options_in
from wd_probe.training.options import TrainOptions, ZeroshotOptions, keywords, parse_options, typed

ROOT = Path(__file__).parents[2]
LONG = "x" * 5000


def test_options_and_the_ways_from_files_to_them_load_no_torch():
    code = (
        "import sys, wd_probe.training.options, wd_probe.sweeps.options\n"
        "import wd_probe.training.resume, wd_probe.runs.folder\n"
        "print('torch' in sys.modules)\n"
        "import wd_probe.layering\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\nTrue\n"


@pytest.mark.parametrize(
    ("kind", "silent"), [(TrainOptions, {"command"}), (ZeroshotOptions, {"model", "run"})]
)
def test_every_option_says_what_it_is(kind, silent):
    assert set(options_in(kind)) == {field.name for field in fields(kind)} - silent
    for _, option in options_in(kind).values():
        assert option.help.endswith((".", "..."))
        assert option.panel


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainOptions, {"steps": 0}, "--steps must be at least 1, got 0"),
        (TrainOptions, {"every": -1}, "--every must be at least 0, got -1"),
        (TrainOptions, {"command": "rop", "every": 0}, "--every must be at least 1, got 0"),
        (TrainOptions, {"lr": float("nan")}, "--lr must be a finite number > 0, got nan"),
        (TrainOptions, {"momentum": -0.5}, "--momentum must be a finite number ≥ 0, got -0.5"),
        (TrainOptions, {"hflip": 1.5}, "--hflip must be a probability, got 1.5"),
        (TrainOptions, {"val_split": 1.0}, "--val-split must be a share below 1, got 1.0"),
        (TrainOptions, {"method": "lwpd"}, "unknown method 'lwpd'; choose from own, baseline, l1"),
        (TrainOptions, {"amp_dtype": "int"}, "--amp-dtype must be bfloat16 or float16, got 'int'"),
        (ZeroshotOptions, {"by": "head"}, "--by must be one of none, layer, kind, got 'head'"),
        (ZeroshotOptions, {"steps": 0}, "--steps must be at least 1, got 0"),
        (ZeroshotOptions, {"amp_dtype": ""}, "--amp-dtype must be bfloat16 or float16, got ''"),
        (ZeroshotOptions, {"pretrained": True, "run": Path("r")}, "exclude each other"),
    ],
)  # fmt: skip
def test_what_an_option_cannot_be(kind, values, message):
    with pytest.raises(InputError) as told:
        kind(**values)
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", "1e-3", 1e-3), ("lr", 1, 1.0), ("lr", None, None), ("steps", 2.0, 2),
        ("steps", " 12 ", 12), ("amp", True, True), ("data_dir", "a", Path("a")),
        ("model", "x", "x"), ("scale", "eq9", "eq9"), ("scale", None, None),
        ("seed", range(3), range(3)), ("lr", ["1e-3", 2], (1e-3, 2.0)), ("lr", [], ()),
    ],
)  # fmt: skip
def test_values_of_files_are_what_options_hold(name, value, expected):
    found = typed(name, value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", "fast", "lr must be a number, got 'fast'"),
        ("lr", True, "lr must be a number, got True"),
        ("lr", b"1", "lr must be a number, got b'1'"),
        ("lr", [[1]], "lr must be a number, got a list of 1"),
        ("steps", 2.5, "steps must be a whole number, got 2.5"),
        ("steps", 2**63, "steps must be a whole number, got 9223372036854775808"),
        ("seed", None, "seed must be a whole number, got None"),
        ("amp", 1, "amp must be true or false, got 1"),
        ("model", 3, "model must be a text, got 3"),
        ("data_dir", 3, "data_dir must be a path, got 3"),
        ("scale", "max3", "scale must be one of eq9, max2, mean, falling, got 'max3'"),
        ("convention", None, "convention must be one of lr*rate, rate, got None"),
        ("weight_decya", 1, "unknown key 'weight_decya'; did you mean weight_decay?"),
        ("command", "rop", "unknown key 'command'"),
    ],
)  # fmt: skip
def test_values_of_files_that_no_option_holds(name, value, message):
    with pytest.raises(InputError) as told:
        typed(name, value)
    assert str(told.value) == message


PATHS = {"checkpoint", "data_dir", "images", "output"}
#: What is looked for where it is used; the command line's tests go on from here.
LATER = {"model", "dataset", "opt", "device", "convention", "aa"}


def said(make):
    """The message of an error, if there is one."""
    try:
        make()
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in (TrainOptions, ZeroshotOptions)
        for name, (hint, _) in options_in(kind).items()
        if hint not in (bool, int, float, int | None, float | None)
    ],
)
def test_a_long_value_is_cut_in_what_is_said_of_it(kind, name):
    told = said(lambda: kind(**{name: Path(LONG) if name in PATHS else LONG}))
    assert len(told) < 400
    assert bool(told) == (name not in LATER)
    assert len(said(lambda: typed(name, [LONG, 3]))) < 400


def test_more_of_an_optimizers_own():
    text = keywords(["fused=True", "betas=(0.8, 0.9)", "kind=a"])
    assert text == "fused=True betas=(0.8,0.9) kind='a'"
    assert parse_options(text.split()) == {"fused": True, "betas": (0.8, 0.9), "kind": "a"}
    with pytest.raises(InputError, match="--opt-kwargs wants key=value, got 'fused'"):
        keywords(["fused"])


def test_config_json_has_every_option_in_the_order_of_the_dataclass():
    config = json.loads((ROOT / "tests/data/first_layout/rop/config.json").read_text())
    names = [name for name in asdict(TrainOptions()) if name in config]
    assert list(config)[: len(names)] == names


def test_flags():
    assert Option("").flag_of("img_size") == "--img-size"
    assert Option("", flag="--lr").flag_of("lrs") == "--lr"
