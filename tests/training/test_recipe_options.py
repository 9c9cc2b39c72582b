import pytest

from wd_probe import InputError
from wd_probe.training.options import TrainOptions, options_in
from wd_probe.training.recipe_options import NAMES, NEEDS, RECIPE, SCHEDULE, chosen, defaults


def test_every_option_of_a_recipe_is_known_as_one():
    panels = {name: option.panel for name, (_, option) in options_in(TrainOptions).items()}
    assert set(NAMES) == {name for name, panel in panels.items() if panel in (SCHEDULE, RECIPE)}
    assert set(NAMES) == set(defaults(TrainOptions))
    assert {*NEEDS, *NEEDS.values()} <= set(NAMES)


def test_what_is_at_work():
    assert chosen(TrainOptions()) == {}
    assert chosen(TrainOptions(sched="cosine", clip_grad=1.0)) == {
        "sched": "cosine",
        "clip_grad": 1.0,
    }
    assert TrainOptions(smoothing=0.1).hparams()["smoothing"] == 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sched": "cosin"}, "rsqrt, plateau, got 'cosin'; did you mean cosine?"),
        ({"sched": "plateau", "both_moments": True, "method": "pwd"}, "tells after it alone"),
        ({"patience_epochs": 3}, "--patience-epochs needs --sched other than none"),
        ({"sched": "rsqrt"}, "--sched rsqrt needs --warmup-epochs, by which it falls"),
        ({"mixup_off_epoch": 3}, "--mixup-off-epoch needs --mixup or --cutmix"),
        ({"min_lr": 1e-6}, "--min-lr needs --sched other than none"),
        ({"warmup_epochs": 1}, "--warmup-epochs needs --sched other than none"),
        ({"sched_on_updates": True}, "--sched-on-updates needs --sched other than none"),
        ({"clip_mode": "agc"}, "--clip-mode needs --clip-grad"),
        ({"model_ema_decay": 0.9}, "--model-ema-decay needs --model-ema"),
        ({"model_ema_warmup": True}, "--model-ema-warmup needs --model-ema"),
        ({"sched": "cosine", "min_lr": 1e-3}, "--min-lr 0.001 is above --lr 0.0001"),
        ({"sched": "cosine", "warmup_lr": 1e-3}, "--warmup-lr 0.001 is above --lr 0.0001"),
        ({"sched": "cosine", "warmup_epochs": 4}, "--warmup-epochs 4 leaves nothing of --epochs 4"),
        ({"sched": "multistep"}, "--sched multistep and --decay-milestones need each other"),
        ({"sched": "step", "decay_milestones": "3"}, "--decay-milestones need each other"),
        ({"sched": "multistep", "decay_milestones": "3,2"}, "takes rising epochs with commas"),
        ({"sched": "multistep", "decay_milestones": "a"}, "takes rising epochs with commas"),
        ({"mixup": 0.2, "batch_size": 33}, "pairs of images; --batch-size 33 is odd"),
        ({"cutmix": 0.2, "batch_size": 33}, "pairs of images; --batch-size 33 is odd"),
        ({"smoothing": 1.0}, "--smoothing must be a share below 1, got 1.0"),
        ({"layer_decay": 1.5}, "--layer-decay must be at most 1, got 1.5"),
        ({"layer_decay": 0.0}, "--layer-decay must be a finite number > 0, got 0.0"),
        ({"clip_grad": 0.0}, "--clip-grad must be a finite number > 0, got 0.0"),
        ({"grad_accum_steps": 0}, "--grad-accum-steps must be at least 1, got 0"),
        ({"model_ema": True, "both_moments": True, "method": "pwd"}, "leave one out"),
    ],
)  # fmt: skip
def test_what_does_not_fit(values, message):
    with pytest.raises(InputError) as told:
        TrainOptions(**values)
    assert message in str(told.value)
    assert "\n" not in str(told.value)
