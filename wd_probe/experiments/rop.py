"""`wdprobe rop`: train a model and measure the opposing-penalty rate at every step."""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from .. import figures
from ..dashboard import Dashboard
from ..decay import METHODS, Convention, WeightDecay
from ..errors import InputError, WdProbeWarning
from ..layering import decayed_parameters, layers
from ..penalty import TALLY_FIELDS
from ..probe import OpposingPenaltyProbe
from ..records import StepRecord, Tally, fields, summed
from .data import Data, load_data
from .findings import findings
from .models import create_model
from .runs import RunFolder, default_folder, environment, read_run
from .training import Score, Step, Trainer, create_optimizer, evaluate, pick_device

#: Decay rates that the λ-profile asks about.
PROFILE_RATES = tuple(float(f"{10 ** (k / 4):.3g}") for k in range(-16, 9))
#: Steps in a run at which the λ-profile is taken, about.
PROFILE_STEPS = 20

Status = Literal["finished", "interrupted", "diverged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopOptions:
    """Everything that decides a run; the command line's options by the same names.

    ``method`` is "own" for the optimizer's own ``weight_decay``, else a method of
    :class:`wd_probe.WeightDecay`. ``lr`` None takes the paper's base rate: 0.01 for SGD, else
    0.0001. ``steps`` None trains ``epochs`` whole epochs.
    """

    model: str = "convnext_tiny"
    pretrained: bool = False
    checkpoint: Path | None = None
    img_size: int = 32
    dataset: str = "digits"
    data_dir: Path | None = None
    dataset_download: bool = False
    hflip: float | None = None
    opt: str = "adamw"
    lr: float | None = None
    weight_decay: float = 0.01
    momentum: float = 0.9
    method: str = "own"
    convention: Convention = "lr*rate"
    filter_bias_and_bn: bool = False
    batch_size: int = 64
    epochs: int = 4
    steps: int | None = None
    every: int = 1
    seed: int = 0
    device: str = "auto"
    amp: bool = False
    amp_dtype: str = "bfloat16"
    channels_last: bool = False
    output: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "steps", "every", "img_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"--lr must be a finite number > 0, got {self.lr}")
        for name in ("weight_decay", "momentum"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(
                    f"--{name.replace('_', '-')} must be a finite number ≥ 0, got {value}"
                )
        if self.hflip is not None and not 0 <= self.hflip <= 1:
            raise InputError(f"--hflip must be a probability, got {self.hflip}")
        if self.method not in ("own", *METHODS):
            known = ", ".join(("own", *METHODS))
            raise InputError(f"unknown method {self.method!r}; choose from {known}")
        if self.weight_decay == 0 or self.method == "baseline":
            raise InputError(
                "nothing would be penalized, so R_op is undefined; give --weight-decay above 0 "
                "and a method that decays"
            )
        if self.amp_dtype not in ("bfloat16", "float16"):
            raise InputError(f"--amp-dtype must be bfloat16 or float16, got {self.amp_dtype!r}")
        if self.convention == "rate" and self.method == "own":
            raise InputError(
                "an optimizer's own weight_decay takes off lr*rate; --convention rate needs "
                "--method wd"
            )

        taken = self.weight_decay * (1 if self.convention == "rate" else self.learning_rate)
        if taken >= 1:
            raise InputError(
                f"a step would take off {taken:g} times the weight (--weight-decay "
                f"{self.weight_decay:g}, --lr {self.learning_rate:g}); it must be less than 1"
            )

    @property
    def learning_rate(self) -> float:
        """``lr``, or the paper's base rate for this optimizer."""
        return self.lr or (0.01 if self.opt in ("sgd", "momentum", "sgdp", "nesterov") else 1e-4)


class Listener(Protocol):
    """Is told how a run goes."""

    def started(self, total_steps: int, folder: Path, data: Data, layer_count: int) -> None:
        """Everything is ready; training begins."""

    def stepped(self, step: Step, record: StepRecord | None) -> None:
        """A step was trained, and measured unless ``record`` is None."""

    def scored(self, epoch: int, score: Score) -> None:
        """An epoch ended and was evaluated."""


class _Measured:
    """What a run has measured so far, in memory, in the run folder and on the dashboard."""

    def __init__(
        self, folder: RunFolder, board: Dashboard | None, probe: OpposingPenaltyProbe
    ) -> None:
        self.folder, self.board, self.probe = folder, board, probe
        self.rates: list[float] = []
        self.masses: list[float] = []
        self.flips: list[float] = []
        self.penalized = 0
        self.values = np.zeros((len(probe.names), len(TALLY_FIELDS)))
        self.steps = 0
        self.profiles_written = 0

    def show(self, draw: Callable[[Dashboard], None]) -> None:
        board = self.board
        if board is not None:
            self.folder.guard(lambda: draw(board))

    def step(self, step: Step, record: StepRecord | None) -> None:
        self.steps = step.step
        total = None if record is None else record.total
        self.folder.rows(
            "steps.csv",
            (
                "step",
                "epoch",
                "loss",
                "lr",
                "rate",
                "mass",
                "flip_rate",
                "penalized",
                "opposing",
                "flipped",
                "nonfinite",
            ),
            [
                (step.step, step.epoch, step.loss, step.lr)
                + (
                    ("",) * 7
                    if total is None
                    else (
                        _cell(total.rate),
                        _cell(total.mass),
                        _cell(total.flip_rate),
                        total.penalized,
                        total.opposing,
                        total.flipped,
                        total.nonfinite,
                    )
                )
            ],
        )
        scalars = {"train/loss": step.loss, "train/lr": step.lr}
        self.show(lambda board: board.scalars(step.step, scalars))
        if record is not None:
            self._record(step.step, record)

    def _record(self, step: int, record: StepRecord) -> None:
        self.rates.append(record.rate)
        self.masses.append(record.mass)
        self.flips.append(record.flip_rate)
        self.penalized = record.penalized
        self.values += record.values
        self.folder.rows(
            "layers.csv",
            ("step", "index", "rate", "mass", "flip_rate", "penalized", "nonfinite"),
            [
                (
                    step,
                    t.index,
                    _cell(t.rate),
                    _cell(t.mass),
                    _cell(t.flip_rate),
                    t.penalized,
                    t.nonfinite,
                )
                for t in record.layers
            ],
        )
        self.show(lambda board: board.record(step, record))
        for profile in self.probe.profiles[self.profiles_written :]:
            self.profiles_written += 1
            self.folder.rows(
                "profile.csv",
                ("step", "rate", "opposing", "penalized"),
                [
                    (profile.step, rate, count, profile.penalized)
                    for rate, count in zip(profile.rates, profile.opposing, strict=True)
                ],
            )

    def tensors(self) -> dict[str, Tally]:
        return {
            name: Tally(*fields(row))
            for name, row in zip(self.probe.names, self.values, strict=True)
        }


def _cell(value: float) -> float | str:
    return value if math.isfinite(value) else ""


def measure(options: RopOptions, listener: Listener) -> dict[str, Any]:
    """Train and measure; returns the summary, which also stands in the run folder.

    Ctrl-C and a loss that is not a number end the run early; what was measured is kept and
    summarized, and ``status`` says "interrupted" or "diverged".

    Raises:
        InputError: options that do not fit each other, this machine, or the optimizer's rule.
        RunError: the pretrained weights could not be had.
    """
    device = pick_device(options.device)
    torch.manual_seed(options.seed)
    data = load_data(
        options.dataset,
        batch_size=options.batch_size,
        img_size=options.img_size,
        device=device,
        seed=options.seed,
        data_dir=options.data_dir,
        download=options.dataset_download,
        hflip=options.hflip,
        channels_last=options.channels_last,
    )
    model = create_model(
        options.model,
        num_classes=data.num_classes,
        img_size=options.img_size,
        pretrained=options.pretrained,
        checkpoint=options.checkpoint,
    ).to(device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    total = options.epochs * len(data.train)
    total = total if options.steps is None else options.steps
    optimizer, probe = _attach(options, model, max(1, total // options.every // PROFILE_STEPS))
    folder = RunFolder(options.output or default_folder("rop", options.model))
    with folder:
        folder.json("config.json", _config(options, data, model, probe, device))
        stages = layers(model, coarse=True)
        board = folder.guard(lambda: Dashboard(folder.path, stages))
        measured = _Measured(folder, board, probe)
        amp_dtype = getattr(torch, options.amp_dtype) if options.amp else None
        trainer = Trainer(model, optimizer, data.train, amp_dtype=amp_dtype)
        listener.started(total, folder.path, data, len(probe.layers))
        status, score, seconds = _train(trainer, data, total, probe, measured, listener)
        if status == "interrupted":
            score = Score(math.nan, math.nan)
        probe.close()
        summary = _summary(options, measured, score, status, seconds)
        folder.json("summary.json", summary)
        folder.guard(lambda: _save_weights(model, folder.path / "model.safetensors"))
        _write_tensors(measured)
    if folder.failure is None:
        folder.guard(lambda: _draw(folder.path, board, options, summary))
    if board is not None:
        folder.guard(board.close)
    return summary | {"write_failure": folder.failure} if folder.failure else summary


def _attach(
    options: RopOptions, model: nn.Module, profile_every: int
) -> tuple[Optimizer, OpposingPenaltyProbe]:
    own = options.method == "own"
    optimizer = create_optimizer(
        model,
        options.opt,
        lr=options.learning_rate,
        weight_decay=options.weight_decay if own else 0.0,
        momentum=options.momentum,
    )
    chosen = decayed_parameters(model, filter_bias_and_bn=options.filter_bias_and_bn)
    if own:
        _spare(optimizer, model, set(chosen))
    else:
        WeightDecay(
            model,
            optimizer,
            options.method,  # type: ignore[arg-type]
            rate=options.weight_decay,
            convention=options.convention,
            parameters=chosen,
        )
    scale = 1.0 if options.convention == "rate" else options.learning_rate
    own_rates = [options.weight_decay * factor for factor in (0.1, 1, 10)]
    rates = [rate for rate in (*PROFILE_RATES, *own_rates) if rate * scale <= 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", WdProbeWarning)
        try:
            probe = OpposingPenaltyProbe(
                model,
                optimizer,
                every=options.every,
                profile=sorted(set(rates)),
                profile_every=profile_every,
            )
        except WdProbeWarning as unmeasurable:
            reason = str(unmeasurable).partition(", so R_op")[0]
            raise InputError(
                f"--opt {options.opt}: {reason}; use --method wd for the paper's decoupled decay "
                "on this optimizer"
            ) from unmeasurable
    return optimizer, probe


def _spare(optimizer: Optimizer, model: nn.Module, chosen: set[str]) -> None:
    """Put what is not to decay into a parameter group of its own."""
    if all(name in chosen for name, _ in model.named_parameters()):
        return
    spared = {id(p) for name, p in model.named_parameters() if name not in chosen}
    for group in list(optimizer.param_groups):
        kept = [p for p in group["params"] if id(p) not in spared]
        rest = [p for p in group["params"] if id(p) in spared]
        group["params"] = kept
        optimizer.add_param_group({**group, "params": rest, "weight_decay": 0.0})


def _train(
    trainer: Trainer,
    data: Data,
    total: int,
    probe: OpposingPenaltyProbe,
    measured: _Measured,
    listener: Listener,
) -> tuple[Status, Score, float]:
    begun, score = time.monotonic(), Score(math.nan, math.nan)
    records: dict[int, StepRecord] = {}
    epoch = 0
    try:
        while measured.steps < total:
            epoch += 1
            for step in trainer.epoch(epoch, measured.steps + 1, total):
                records |= {record.step: record for record in probe.drain()}
                record = records.pop(step.update, None) if step.update is not None else None
                measured.step(step, record)
                listener.stepped(step, record)
                if not math.isfinite(step.loss):
                    return "diverged", score, time.monotonic() - begun
            score = evaluate(trainer.model, data.test, trainer.autocast)
            measured.folder.rows(
                "epochs.csv",
                ("epoch", "step", "top1", "loss"),
                [(epoch, measured.steps, _cell(score.top1), _cell(score.loss))],
            )
            values = {"test/top1": score.top1, "test/loss": score.loss}
            measured.show(lambda board: board.scalars(measured.steps, values))  # noqa: B023
            listener.scored(epoch, score)
    except KeyboardInterrupt:
        return "interrupted", score, time.monotonic() - begun
    return "finished", score, time.monotonic() - begun


def _config(
    options: RopOptions,
    data: Data,
    model: nn.Module,
    probe: OpposingPenaltyProbe,
    device: torch.device,
) -> dict[str, Any]:
    return {
        "command": "rop",
        **asdict(options),
        "lr": options.learning_rate,
        "hflip": data.hflip,
        "c": "lr*rate: c = ηλ, η live"
        if options.convention == "lr*rate"
        else "rate: c = λ, as Eq. 1 prints it",
        "num_classes": data.num_classes,
        "train_size": data.train_size,
        "test_size": data.test_size,
        "weights": sum(p.numel() for p in model.parameters()),
        "layer_definition": probe.layers.definition,
        "layers": [
            {"index": layer.index, "name": layer.name, "parameters": layer.parameters}
            for layer in probe.layers
        ],
        **environment(device),
    }


def _statistics(values: Sequence[float]) -> dict[str, float]:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return {"mean": math.nan, "max": math.nan, "last": math.nan}
    return {"mean": statistics.fmean(known), "max": max(known), "last": values[-1]}


def _summary(
    options: RopOptions, measured: _Measured, score: Score, status: Status, seconds: float
) -> dict[str, Any]:
    probe, tensors = measured.probe, measured.tensors()
    layer_rows = summed(probe.layers, probe.names, measured.values)
    ndims = {name: p.ndim for name, p in probe.named_parameters()}
    return {
        "command": "rop",
        "model": options.model,
        "dataset": options.dataset,
        "method": "wd",
        "decay": "optimizer" if options.method == "own" else "attached",
        "optimizer": options.opt,
        "lr": options.learning_rate,
        "weight_decay": options.weight_decay,
        "convention": options.convention,
        "steps": measured.steps,
        "measured_steps": len(measured.rates),
        "penalized": measured.penalized,
        "nonfinite": int(measured.values[:, TALLY_FIELDS.index("nonfinite")].sum()),
        "rate": _statistics(measured.rates),
        "mass": _statistics(measured.masses),
        "flip_rate": _statistics(measured.flips),
        "layers": [
            {
                "index": layer.index,
                "name": layer.name,
                "rate": (tally := Tally(*fields(row))).rate,
                "mass": tally.mass,
                "flip_rate": tally.flip_rate,
            }
            for layer, row in zip(probe.layers, layer_rows, strict=True)
        ],
        "layer_definition": probe.layers.definition,
        "findings": findings(
            {name: (ndims[name], tally) for name, tally in tensors.items()},
            probe.profiles,
            options.weight_decay,
        ),
        "top1": score.top1,
        "loss": score.loss,
        "status": status,
        "seconds": seconds,
        "run": str(measured.folder.path),
    }


def _write_tensors(measured: _Measured) -> None:
    measured.folder.rows(
        "tensors.csv",
        ("name", "penalized", "opposing", "flipped", "nonfinite", "rate", "mass"),
        [
            (name, t.penalized, t.opposing, t.flipped, t.nonfinite, _cell(t.rate), _cell(t.mass))
            for name, t in measured.tensors().items()
        ],
    )


def _save_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    save_model(model, str(path))


def _draw(
    path: Path, board: Dashboard | None, options: RopOptions, summary: dict[str, Any]
) -> None:
    drawn = figures.draw_rop(read_run(path))
    figures.save(drawn, path / "figures")
    if board is None:
        return
    for name, figure in drawn.items():
        board.figure(f"R_op figures/{name}", figure, summary["steps"])
    board.text("summary", markdown(summary))
    board.hparams(
        {
            "model": options.model,
            "dataset": options.dataset,
            "opt": options.opt,
            "lr": options.learning_rate,
            "weight_decay": options.weight_decay,
            "batch_size": options.batch_size,
            "seed": options.seed,
        },
        {
            "hparams/R_op mean": summary["rate"]["mean"],
            "hparams/R_op max": summary["rate"]["max"],
            "hparams/top1": summary["top1"],
        },
    )


def markdown(summary: dict[str, Any]) -> str:
    """The summary as Markdown, for TensorBoard."""
    rows = [
        f"| {title} | {summary[key]['mean']:.4%} | {summary[key]['max']:.4%} "
        f"| {summary[key]['last']:.4%} |"
        for title, key in (
            ("R_op (share of weights)", "rate"),
            ("R_op by size (share of penalty)", "mass"),
            ("sign flips by the step alone", "flip_rate"),
        )
    ]
    worst = sorted(
        (layer for layer in summary["layers"] if math.isfinite(layer["rate"])),
        key=lambda layer: -layer["rate"],
    )[:5]
    return "\n".join(
        [
            f"**{summary['model']}** on {summary['dataset']}, {summary['optimizer']}, "
            f"η {summary['lr']:g}, λ {summary['weight_decay']:g}, {summary['steps']} steps, "
            f"top-1 {summary['top1']:.2%} ({summary['status']})",
            "",
            "| | mean | max | last |",
            "|---|---|---|---|",
            *rows,
            "",
            *(f"- {finding}" for finding in summary["findings"]),
            "",
            "| layer | R_op |",
            "|---|---|",
            *(f"| {layer['index']} {layer['name']} | {layer['rate']:.4%} |" for layer in worst),
        ]
    )
