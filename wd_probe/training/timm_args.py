"""What timm's own ``train.py`` has written down of a run, as options."""

from collections.abc import Iterator, Mapping
from typing import Any

from .option import options_in
from .options import TrainOptions
from .recipe_options import NEEDS

#: Whose names mean something else here, or that say where and not what.
_OTHERS = ("scale", "val_split", "resume", "recovery_interval", "output", "device")
#: From which options of ours follow.
_TURNED = (
    "data", "initial_checkpoint", "input_size", "lr_base", "lr_base_size", "lr_base_scale",
    "opt_betas", "opt_eps", "no_aug",
)  # fmt: skip
#: Without a counterpart, and without a part in what is trained; names that begin so, too.
_IDLE = (
    "checkpoint_hist", "dataset_trust_remote_code", "device_modules", "dist_bn", "eval_metric",
    "experiment", "fast_norm", "fuser", "grad_checkpointing", "local_rank", "log_interval",
    "model_ema_force_cpu", "no_ddp_bb", "no_prefetcher", "no_resume_opt", "num_classes", "pin_mem",
    "save_images", "synchronize_step", "torchcompile_mode", "torchscript", "tta",
    "use_multi_epochs_loader", "val_num_samples", "validation_batch_size", "worker_seeding",
    "workers", "amp_impl", "wandb_", "kd_", "naflex_",
)  # fmt: skip
_NOT_IDLE = ("kd_model_name", "naflex_loader")
#: What is made of pictures, unless ``no_aug`` says that nothing is.
_PICTURES = (
    "color_jitter", "scale", "ratio", "vflip", "reprob", "remode", "recount", "resplit",
    "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob", "train_crop_mode",
    "train_interpolation",
)  # fmt: skip
#: What those of the rest come to that are never off: timm's defaults, or what is so here.
_USUAL = {
    "scale": [1.0, 1.0], "ratio": [1.0, 1.0], "remode": "pixel", "recount": 1,
    "train_interpolation": "random", "train_split": "train",
    "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch",
    "lr_cycle_limit": 1, "lr_cycle_mul": 1.0, "lr_cycle_decay": 0.5, "lr_k_decay": 1.0,
    "lr_noise_pct": 0.67, "lr_noise_std": 1.0,
    "train_size_schedule": "constant", "train_size_schedule_spread": 0.65,
    "train_size_random_mix": 0.1, "variable_batch_loss_scale": "none",
}  # fmt: skip
#: Schedules by what they alone ask for, which timm writes down of all.
_OF_ONE = {
    "decay_milestones": ("multistep",),
    "decay_epochs": ("step", "wsd", "rsqrt"),
    "patience_epochs": ("plateau",),
}


def is_timms(args: Mapping[str, Any]) -> bool:
    """Whether ``train.py`` has written it."""
    return {"log_interval", "workers", "aug_splits"} <= set(args)


def as_options(args: Mapping[str, Any]) -> dict[str, Any]:
    """What it was asked for, by our names; others may stand among them."""
    found = {name: value for name, value in args.items() if _given(value) and name not in _OTHERS}
    found["filter_bias_and_bn"] = True  # as train.py has it
    if "dataset" not in found:
        found["data_dir"] = found.get("data_dir") or found.get("data")
        found["dataset"] = "folder" if found["data_dir"] else None
    if "initial_checkpoint" in found:
        found["checkpoint"] = found["initial_checkpoint"]
    if isinstance(size := found.get("input_size"), list):
        found["img_size"] = size[-1]
    if "no_aug" in found:
        found |= {"hflip": 0.0, "aa": None}
    found["lr"] = found.get("lr") or _rate(found)
    found["opt_kwargs"] = _optimizers(found)
    if "torchcompile" in found:
        found["torchcompile"] = True
    for name in _useless(found):
        found.pop(name, None)
    return found


def beyond_options(args: Mapping[str, Any]) -> tuple[str, ...]:
    """What else it was asked for that changes what is trained, by timm's names."""
    ours = {*options_in(TrainOptions), *_TURNED} - {"scale"}
    still = _PICTURES if args.get("no_aug") else ()
    found = [
        name
        for name in dict.fromkeys((*_PICTURES, *args))
        if name not in ours and name not in still
        if name in _NOT_IDLE or not name.startswith(_IDLE)
        if _given(value := args.get(name)) and value != _USUAL.get(name, 0)
    ]
    if args.get("sched") == "plateau" and args.get("eval_metric", "top1") != "top1":
        found.append("eval_metric")
    return tuple(found)


def _given(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


def _useless(args: Mapping[str, Any]) -> Iterator[str]:
    """What has no meaning beside the rest."""
    sched = args.get("sched")
    yield from (name for name, those in _OF_ONE.items() if sched not in those)
    for name, needed in NEEDS.items():
        if args.get(needed) in (None, False, "none"):
            yield name
    if not (args.get("mixup") or args.get("cutmix")):
        yield "mixup_off_epoch"


def _rate(args: Mapping[str, Any]) -> float | None:
    """η of timm's rule for so many images in a step, where none is given."""
    base, size = args.get("lr_base"), args.get("lr_base_size")
    batch, batches = args.get("batch_size", 128), args.get("grad_accum_steps", 1)
    if not all(isinstance(one, int | float) and one > 0 for one in (base, size, batch, batches)):
        return None
    ratio = batch * batches / size
    adaptive = any(kind in str(args.get("opt", "sgd")).lower() for kind in ("ada", "lamb"))
    how = args.get("lr_base_scale") or ("sqrt" if adaptive else "linear")
    return float(base * (ratio**0.5 if how == "sqrt" else ratio))


def _optimizers(args: Mapping[str, Any]) -> dict[str, Any]:
    own = {"betas": args.get("opt_betas"), "eps": args.get("opt_eps")}
    found = {name: value for name, value in own.items() if value is not None}
    more = args.get("opt_kwargs")
    return found | (more if isinstance(more, dict) else {})
