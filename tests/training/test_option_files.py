"""Files of options."""

import json
from pathlib import Path

import pytest

from wd_probe import InputError
from wd_probe.training.option_files import parsed, read_options
from wd_probe.training.options import TrainOptions, options_in

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def written(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_ones_own(written):
    found = read_options(written("a.yaml", "batch-size: 16\nopt: sgd\n"))
    assert found.values == {"batch_size": 16, "opt": "sgd"}
    assert found.strict
    assert found.missed([]) == []
    assert read_options(written("a.toml", "lr = 1e-3")).values == {"lr": 1e-3}
    with pytest.raises(InputError, match=r"b.yaml gives batch_size twice"):
        read_options(written("b.yaml", "batch-size: 16\nbatch_size: 8"))


def test_a_run_goes_elsewhere():
    config = DATA / "first_layout/rop/config.json"
    found = read_options(config)
    asked = json.loads(config.read_text())
    assert asked["output"]
    assert found.values == {k: v for k, v in asked.items() if k not in ("output", "device")}
    assert not found.strict
    known = set(options_in(TrainOptions)) - {"opt", "hflip", "model", "momentum"}
    changed = read_options(config).missed(known)
    usual = TrainOptions()
    assert set(changed) == {k for k in ("opt", "hflip", "model", "momentum")
                            if asked[k] != getattr(usual, k)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "a.txt must end in .toml, .yaml, .yml or .json"),
        ("a.yaml", "- 1", "a.yaml must hold keys and values, such as: method: lpwd"),
        ("a.yaml", "1: 2", "a.yaml must hold keys and values, such as: method: lpwd"),
        ("a.yaml", "a: [", "a.yaml is damaged: while parsing"),
        ("a.yaml", "a: &b 1\nc: *b", "a.yaml is damaged: it uses an alias"),
        ("a.yaml", "a: 1\na: 2", "a.yaml gives a twice"),
        ("a.yaml", "a: {b: 1, b: 2}", "a.yaml gives b twice"),
        ("a.json", '{"a": 1, "a": 2}', "a.json gives a twice"),
        ("a.toml", "a = 1\na = 2", "a.toml is damaged: Cannot overwrite"),
        ("a.toml", "a = ", "a.toml is damaged: "),
        ("a.json", "{", "a.json is damaged: "),
        ("a.yaml", "a: 1\n" * 9999, "a.yaml is larger than 16 KiB and is not read"),
    ],
)
def test_what_is_no_such_file(written, name, text, message):
    with pytest.raises(InputError) as told:
        parsed(written(name, text))
    assert message in str(told.value)
    with pytest.raises(InputError, match=r"no.yaml cannot be read \(No such file"):
        parsed(Path("no.yaml"))
