"""What timm's train.py writes where nothing is asked of it, and where something is."""

from pathlib import Path

import pytest
import yaml

from wd_probe.training.option_files import read_options
from wd_probe.training.options import TrainOptions, fitted, options_in

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def timms(tmp_path):
    """What a file of timm's asks for, some of it changed."""

    def read(**changed):
        args = yaml.safe_load((DATA / "timm_args.yaml").read_text())
        (tmp_path / "args.yaml").write_text(yaml.safe_dump(args | changed))
        return read_options(tmp_path / "args.yaml")

    return read


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
        ({"batch_size": "64"}, {"lr": None}),
        ({"sched": "none"}, {"warmup_epochs": None, "min_lr": None, "decay_rate": None}),
        ({"sched": "multistep"}, {"decay_milestones": [90, 180, 270], "decay_epochs": None}),
        ({"sched": "step"}, {"decay_epochs": 90, "decay_milestones": None}),
        ({"model_ema": True}, {"model_ema_decay": 0.9998}),
        ({"model_ema": False}, {"model_ema_decay": None}),
        ({"sched": "plateau", "patience_epochs": 3}, {"patience_epochs": 3, "decay_epochs": None}),
        ({"sched": "cosine", "patience_epochs": 3}, {"patience_epochs": None}),
        ({"mixup": 0.2, "mixup_off_epoch": 9}, {"mixup_off_epoch": 9}),
        ({"mixup_off_epoch": 9}, {"mixup_off_epoch": None}),
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
    "changed",
    [
        {"head_init_scale": 0.001}, {"head_init_bias": -10.0}, {"epoch_repeats": 2.0},
        {"train_num_samples": 100}, {"train_batches_per_epoch": 9}, {"start_epoch": 3},
        {"drop_connect": 0.1}, {"gp": "avg"}, {"model_dtype": "bfloat16"}, {"split_bn": True},
        {"lr_cycle_mul": 2.0}, {"layer_decay_no_opt_scale": 0.1}, {"grayscale_prob": 0.1},
        {"train_crop_mode": "rrc"}, {"pretrained_path": "a.pth"}, {"train_img_sizes": [32, 64]},
        {"interpolation": "bicubic"}, {"train_interpolation": "bicubic"}, {"remode": "const"},
        {"naflex_loader": True}, {"sched": "plateau", "eval_metric": "loss"},
        {"a_key_of_newer_timm": "on"},
    ],
)  # fmt: skip
def test_nothing_that_changes_what_is_trained_is_left_out_in_silence(timms, changed):
    always = ["color_jitter", "scale", "ratio"]
    left = timms(**changed).missed(options_in(TrainOptions))
    assert sorted(left) == sorted([*always, *(name for name in changed if name != "sched")])


def test_what_changes_nothing_is_not_named(timms):
    changed = {
        "workers": 16, "checkpoint_hist": 2, "log_interval": 5, "pin_mem": True, "experiment": "a",
        "grad_checkpointing": True, "num_classes": 10, "validation_batch_size": 9,
        "no_ddp_bb": True, "wandb_project": "a", "eval_metric": "top5", "kd_temperature": 2.0,
        "fuser": "nvfuser",
        "naflex_max_seq_len": 9, "output": "there", "color_jitter": 0.0, "scale": [1.0, 1.0],
        "ratio": [1.0, 1.0],
    }  # fmt: skip
    assert timms(**changed).missed(options_in(TrainOptions)) == []


def test_timms_no_aug_leaves_pictures_as_they_are(timms):
    found = timms(no_aug=True, aa="rand-m9", reprob=0.25, vflip=0.5, grayscale_prob=0.1)
    assert (found.values["hflip"], found.values.get("aa")) == (0.0, None)
    assert found.missed(options_in(TrainOptions)) == []
