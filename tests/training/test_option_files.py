"""Files of options; timm's is what its train.py writes where nothing is asked of it."""

import json
from pathlib import Path

import pytest
import yaml

from wd_probe import InputError
from wd_probe.training.option_files import parsed, read_options
from wd_probe.training.options import TrainOptions, fitted, options_in

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def written(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture
def timms(written):
    """What a file of timm's asks for, some of it changed."""

    def read(**changed):
        args = yaml.safe_load((DATA / "timm_args.yaml").read_text())
        return read_options(written("args.yaml", yaml.safe_dump(args | changed)))

    return read


def test_ones_own(written):
    found = read_options(written("a.yaml", "batch-size: 16\nopt: sgd\n"))
    assert found.values == {"batch_size": 16, "opt": "sgd"}
    assert found.strict
    assert found.missed([]) == []
    assert read_options(written("a.toml", "lr = 1e-3")).values == {"lr": 1e-3}


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


def test_timms_own_defaults(timms):
    found = timms()
    held = {
        name: fitted(name, value, options_in(TrainOptions)[name][0])
        for name, value in found.values.items()
        if name in options_in(TrainOptions) and name != "opt_kwargs" and value is not None
    }
    options = TrainOptions(**held)
    assert (options.model, options.opt, options.batch_size) == ("resnet50", "sgd", 128)
    assert (options.sched, options.warmup_epochs, options.warmup_lr) == ("cosine", 5, 1e-5)
    assert (options.lr, options.weight_decay, options.seed) == (0.05, 2e-5, 42)
    assert (options.smoothing, options.epochs, options.hflip) == (0.1, 300, 0.5)
    assert options.filter_bias_and_bn, "as timm's train.py has it"
    assert options.scale is None
    assert options.val_split == 0
    assert (options.device, options.recovery_interval) == ("auto", None)
    assert found.missed(options_in(TrainOptions)) == ["color_jitter", "scale", "ratio"]
    assert not found.strict


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"lr": 0.3}, {"lr": 0.3}),
        ({"opt": "adamw", "batch_size": 64}, {"lr": 0.05}),
        ({"grad_accum_steps": 4}, {"lr": 0.2}),
        ({"lr_base_scale": "sqrt", "batch_size": 1024}, {"lr": 0.2}),
        ({"sched": "none"}, {"warmup_epochs": None, "min_lr": None, "decay_rate": None}),
        ({"sched": "multistep"}, {"decay_milestones": [90, 180, 270], "decay_epochs": None}),
        ({"sched": "step"}, {"decay_epochs": 90, "decay_milestones": None}),
        ({"model_ema": True}, {"model_ema_decay": 0.9998}),
        ({"model_ema": False}, {"model_ema_decay": None}),
        ({"dataset": "torch/cifar10"}, {"dataset": "torch/cifar10", "data_dir": None}),
        ({"data_dir": "/photos"}, {"dataset": "folder", "data_dir": "/photos"}),
        ({"data": "/photos"}, {"dataset": "folder", "data_dir": "/photos"}),
        ({"input_size": [3, 64, 64]}, {"img_size": 64}),
        ({"initial_checkpoint": "a.pth"}, {"checkpoint": "a.pth"}),
        ({"torchcompile": "inductor"}, {"torchcompile": True}),
        ({"opt_betas": [0.9, 0.95], "opt_kwargs": {"fused": True}},
         {"opt_kwargs": {"betas": [0.9, 0.95], "fused": True}}),
    ],
)  # fmt: skip
def test_what_timm_was_asked_for(timms, changed, wanted):
    values = timms(**changed).values
    assert {name: values.get(name) for name in wanted} == wanted


def test_what_of_timm_has_no_counterpart_is_named_where_it_is_at_work(timms):
    rest = timms(drop_path=0.1, reprob=0.25, color_jitter=0.0).rest
    assert set(rest) == {"drop_path", "reprob", "scale", "ratio"}
    rest = timms(mixup=0.2, mixup_prob=0.5, mixup_mode="elem", lr_cycle_limit=3).rest
    assert {"mixup_prob", "mixup_mode", "lr_cycle_limit"} < set(rest)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "a.txt must end in .toml, .yaml, .yml or .json"),
        ("a.yaml", "- 1", "a.yaml must hold keys and values, such as: method: lpwd"),
        ("a.yaml", "1: 2", "a.yaml must hold keys and values, such as: method: lpwd"),
        ("a.yaml", "a: [", "a.yaml is damaged: while parsing"),
        ("a.yaml", "a: &b 1\nc: *b", "a.yaml is damaged: it uses an alias"),
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
