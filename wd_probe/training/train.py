"""`wdprobe train` and `wdprobe rop`: train by a decay method, and measure R_op on the way."""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from .. import ranks
from ..decay.methods import WeightDecay
from ..decay.rules import effect_at_work
from ..errors import first_line
from ..layering import Layers, decayed_parameters, layers
from ..probe.probe import OpposingPenaltyProbe
from ..runs.folder import RunFolder, command_line, default_folder, dumps, environment, run_folder
from ..runs.locks import Lock
from ..runs.recorder import Recorder
from ..runs.verdict import Setting
from ..wording import decimal
from .batch_norm import ASKED, ENOUGH, Lag, batch_norms, check_batch_norms, lag, updated
from .checkpoint import RECOVERY, Recovery, Stateful
from .data import Batch, Data, load_data
from .interrupts import Interrupts
from .loop import Listener, Score, Trainer, autocast_dtype, evaluate, pick_device
from .models import create_model
from .optimizers import build_optimizer
from .options import ELSEWHERE, TrainOptions, assumed, parse_options
from .recipe import Recipe, average_of, recipe, scale_rates, seed_augmentations
from .recipe_options import chosen
from .resume import check_resumable
from .wandb_log import OnWandb

#: Decay rates that the λ-profile asks about.
PROFILE_RATES = tuple(float(f"{10 ** (k / 4):.3g}") for k in range(-16, 9))
#: Steps in a run at which the λ-profile is taken, about.
PROFILE_STEPS = 20

#: The moving average of the weights, beside them.
AVERAGE = "model_ema.safetensors"

_NOT_EVALUATED = Score(math.nan, math.nan)
#: How a run ends that can be resumed.
_STOPPED = ("interrupted", "failed")
Status = Literal["finished", "interrupted", "diverged", "failed"]


@dataclass(slots=True)
class Training:
    """What a run is made of."""

    options: TrainOptions
    data: Data
    model: nn.Module
    called: nn.Module  # in training: the model, or what DDP and torch.compile made of it
    optimizer: Optimizer
    decay: WeightDecay | None
    layers: Layers
    device: torch.device
    updates: int  # in an epoch
    total: int
    recipe: Recipe
    lag: Lag | None = None
    running: dict[str, float] = field(default_factory=dict)

    def trainer(self) -> Trainer:
        """The loop over its data."""
        dtype = autocast_dtype(self.options.amp, self.options.amp_dtype)
        return Trainer(
            self.called, self.optimizer, self.data.train, amp_dtype=dtype, recipe=self.recipe
        )

    def scored(self) -> nn.Module:
        """The model, or its average as timm has it."""
        return self.model if self.recipe.average is None else self.recipe.average.module

    def evaluate(self, data: Iterable[Batch], trainer: Trainer) -> Score:
        """Its score.

        DDP has no part in it, since processes may have unequal parts.
        """
        plain = ranks.size() > 1 or self.recipe.average is not None
        return evaluate(self.scored() if plain else self.called, data, trainer.autocast)

    @contextlib.contextmanager
    def statistics(self, trainer: Trainer) -> Iterator[None]:
        """Those of batch norm that the run is scored by."""
        if not self.options.update_bn:
            yield
            return
        with trainer.ahead(ENOUGH) as batches, updated(self.scored(), batches, trainer.autocast):
            yield

    def settle(self) -> None:
        """Average the running statistics of batch norm over the processes."""
        ranks.settle(self.model)
        if self.recipe.average is not None:
            ranks.settle(self.recipe.average.module)

    def method(self) -> str:
        """The rule at work: the attached method, or the optimizer's own by its effect."""
        if self.decay is not None:
            return self.decay.method
        groups = self.optimizer.param_groups
        decaying = [group for group in groups if group.get("weight_decay")]
        for group in decaying or groups:
            rule = effect_at_work(
                self.optimizer, group, max(group["params"], key=lambda p: p.ndim)
            ).rule
            if decaying or rule != "none":
                return rule
        return "baseline"


def train(
    options: TrainOptions, listener: Listener, *, resume: bool = False, lock: Lock | None = None
) -> dict[str, Any]:
    """Train, measure and evaluate; returns the summary, which is also in the run folder.

    Ctrl-C and a loss that is not a number end the run early; what was measured is kept and
    summarized, and ``status`` says "interrupted" or "diverged". The first Ctrl-C ends it at the end
    of the step, whose state is saved; a second one at once, at the state saved last. Under
    `torchrun` every process trains on its part of each batch and evaluates its part of the images,
    and the first one alone writes; where another dies it is "failed", and ``reason`` says what is
    known.

    Args:
        options: what to run.
        listener: is told how it goes.
        resume: continue the run in ``options.output`` where it was last saved, or from its start
            if it never was. On a CPU its files become those of a run never stopped, to the bit.
        lock: of this process on ``options.output``; default one for the time of the run.

    Raises:
        InputError: options that do not fit each other or this machine; with ``resume``, a folder
            without a run to resume, which is left as it is.
        Busy: another process is writing to it.
        RunError: the pretrained weights are unavailable.
    """
    if not options.log_wandb:
        return _trained(options, listener, resume, lock)
    with OnWandb(listener, every=not options.every) as logged:
        return logged.summed(_trained(options, logged, resume, lock))


def _trained(
    options: TrainOptions, listener: Listener, resume: bool, lock: Lock | None
) -> dict[str, Any]:
    ranks.join(pick_device(options.device))
    if not resume:
        run = prepare(options)
        probes = _probes(run)
        path = options.output or default_folder(options.command, options.model)
        with run_folder(path, lock=lock) as folder:
            return _run(run, probes, folder, listener, None)
    assert options.output is not None
    check_resumable(options.output)
    with run_folder(options.output, again=True, lock=lock) as folder:
        record = check_resumable(options.output)  # it may have just ended
        saved = ranks.same((options.output / RECOVERY).is_file())
        run = prepare(options, weights=not saved)
        return _run(run, _probes(run), folder, listener, record, saved)


def _run(
    run: Training,
    probes: tuple[OpposingPenaltyProbe | None, OpposingPenaltyProbe | None],
    folder: RunFolder,
    listener: Listener,
    record: dict[str, Any] | None,
    saved: bool = False,
) -> dict[str, Any]:
    """Train in the folder; ``record`` is a resumed run's config.json, ``saved`` whether it has been
    saved before.
    """  # fmt: skip
    options, (probe, literal) = run.options, probes
    config = _config(run)
    trainer, recorder = run.trainer(), Recorder(folder, probe, literal)
    recovery = _recovery(run, trainer, recorder, config)
    if record is not None:
        if saved:
            recovery.load()
        else:
            folder.rewind({})
        config = record | {"resumed_at": [*record.get("resumed_at", ()), recorder.steps]}
    folder.json("config.json", config)
    recorder.open_dashboard(layers(run.model, coarse=True))
    listener.started(run.total, folder.path, run.data, len(run.layers), recorder.steps)
    status, reason = _train(run, trainer, recorder, recovery, listener)
    seconds = recovery.seconds
    for attached in probes:
        if attached is not None:
            attached.close()
    summary = _summary(run, recorder, status, seconds)
    summary |= {"reason": reason} if reason else {}
    if status in _STOPPED:  # who ends it may not wait for the rest
        folder.json("summary.json", summary)
    with run.statistics(trainer) if status == "finished" else contextlib.nullcontext():
        folder.replace("model.safetensors", lambda partial: _save_weights(run.model, partial))
        if (average := run.recipe.average) is not None:
            folder.replace(AVERAGE, lambda partial: _save_weights(average.module, partial))
    recorder.close(summary, options.hparams())
    if status not in _STOPPED:
        recovery.remove()
    return summary | {"write_failure": folder.failure} if folder.failure else summary


def _recovery(
    run: Training, trainer: Trainer, recorder: Recorder, config: dict[str, Any]
) -> Recovery:
    parts: dict[str, Stateful | None] = {
        "model": run.model,
        "optimizer": run.optimizer,
        "decay": run.decay,
        "average": run.recipe.average,
        "plateau": None if run.recipe.plateau is None else run.recipe.plateau.lr_scheduler,
        "probe": recorder.probe,
        "literal probe": recorder.literal,
        "journal": recorder,
        "trainer": trainer,  # last: it holds the random state
    }
    facts = {field.name: config[field.name] for field in fields(TrainOptions)}
    plain = json.loads(dumps({k: v for k, v in facts.items() if k not in ELSEWHERE}))
    return Recovery(
        recorder.folder,
        {name: part for name, part in parts.items() if part is not None},
        plain,
        run.options.recovery_interval,
        recorder.flush,
        assumed(),
    )


def prepare(options: TrainOptions, *, weights: bool = True) -> Training:
    """Open the data, build model and optimizer, attach the method.

    Args:
        options: what to run.
        weights: False leaves out pretrained weights and checkpoints, where others will take their
            place.

    Raises:
        InputError: options that do not fit each other or this machine.
        RunError: the pretrained weights are unavailable.
    """
    device = pick_device(options.device)
    torch.manual_seed(options.seed)
    seed_augmentations(options.seed)
    ranks.check_divides(options.batch_size)
    data = load_data(
        options.dataset,
        batch_size=options.batch_size,
        img_size=options.img_size,
        device=device,
        seed=options.seed,
        data_dir=options.data_dir,
        download=options.dataset_download,
        hflip=options.hflip,
        val_split=options.val_split,
        train_samples=options.train_samples,
        channels_last=options.channels_last,
        aa=options.aa,
    )
    model = create_model(
        options.model,
        num_classes=data.num_classes,
        img_size=options.img_size,
        pretrained=options.pretrained and weights,
        checkpoint=options.checkpoint if weights else None,
        reset_head=True,
    ).to(device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    average = average_of(options, model)
    if options.update_bn:
        check_batch_norms(model, options.model)
    called: Any = ranks.wrapped(model)
    called = torch.compile(called) if options.torchcompile else called
    seed_augmentations(options.seed)
    ranks.draw_apart()
    optimizer, decay = _optimizer(options, model, called)
    updates = -(-len(data.train) // options.grad_accum_steps)
    total = options.epochs * updates if options.steps is None else options.steps
    more = recipe(
        options,
        model,
        optimizer,
        classes=data.num_classes,
        updates=updates,
        total=total,
        average=average,
    )
    return Training(
        options, data, model, called, optimizer, decay, layers(model), device, updates, total, more
    )


def _optimizer(
    options: TrainOptions, model: nn.Module, called: nn.Module
) -> tuple[Optimizer, WeightDecay | None]:
    own = options.method == "own"
    rate = options.weight_decay if own else 0.0
    optimizer = build_optimizer(
        options.opt,
        model,
        lr=options.learning_rate,
        weight_decay=rate,
        momentum=options.momentum,
        options=parse_options(options.opt_kwargs.split()),
        filter_bias_and_bn=own and options.filter_bias_and_bn,
        layer_decay=options.layer_decay,
    )
    if not options.filter_bias_and_bn and options.layer_decay is not None:
        for group in optimizer.param_groups:  # timm's own would spare some
            group["weight_decay"] = rate
    scale_rates(optimizer)
    if own:
        return optimizer, None
    return optimizer, WeightDecay(
        called,
        optimizer,
        options.method,  # type: ignore[arg-type]
        rate=options.weight_decay,
        scale=options.scale,
        convention=options.convention,
        parameters=decayed_parameters(model, filter_bias_and_bn=options.filter_bias_and_bn),
    )


def _probes(run: Training) -> tuple[OpposingPenaltyProbe | None, OpposingPenaltyProbe | None]:
    """The probe, and for pwd one more that reads Eq. 10 to the letter."""
    options = run.options
    if not options.every or not options.weight_decay or options.method == "baseline":
        return None, None
    scale = 1.0 if options.convention == "rate" else options.learning_rate
    own_rates = [decimal(options.weight_decay * factor) for factor in (0.1, 1, 10)]
    rates = [rate for rate in (*PROFILE_RATES, *own_rates) if rate * scale <= 1]
    probe = OpposingPenaltyProbe(
        run.model,
        run.optimizer,
        every=options.every,
        profile=sorted(set(rates)),
        profile_every=max(1, run.total // options.every // PROFILE_STEPS),
        groups=run.layers,
    )
    if run.decay is None or run.decay.moment != "forward":
        return probe, None
    literal = OpposingPenaltyProbe(
        run.model, run.optimizer, every=options.every, groups=run.layers, reading="literal"
    )
    return probe, literal


def _train(
    run: Training, trainer: Trainer, recorder: Recorder, recovery: Recovery, listener: Listener
) -> tuple[Status, str]:
    """Train to the end; how that came, and the reason if it is known."""
    # of several processes, one that held a signal back would wait for one that did not
    interrupts = Interrupts(hold=ranks.size() == 1)
    try:
        with interrupts:
            while recorder.evaluated < run.total:
                epoch = len(recorder.epochs) + 1
                for step in trainer.epoch(epoch, recorder.steps + 1, run.total):
                    record = recorder.step(
                        step.step, epoch=epoch, loss=step.loss, lr=step.lr, update=step.update
                    )
                    listener.stepped(step, record)
                    if not math.isfinite(step.loss):
                        return "diverged", ""
                    if step.step == trainer.steps:
                        interrupts.raise_if_asked()
                        recovery.offer(step.step)
                run.settle()
                scores: dict[str, float] = {}
                if epoch % run.options.val_interval == 0 or recorder.steps >= run.total:
                    with interrupts.at_once():
                        test, scores = _scores(run, trainer)
                    listener.scored(epoch, test)
                if (plateau := run.recipe.plateau) is not None:
                    plateau.step(epoch, _metric(scores))
                recorder.epoch(epoch, **scores)
                interrupts.raise_if_asked()
                recovery.offer(recorder.steps)
            with interrupts.at_once():
                _ask_batch_norm(run, trainer)
    except KeyboardInterrupt:
        if interrupts.between_steps:
            recovery.save(recorder.steps)
        return "interrupted", ""
    except RuntimeError as error:
        if ranks.size() == 1:
            raise
        ranks.outlive_the_others()
        return "failed", first_line(error)
    return "finished", ""


def _scores(run: Training, trainer: Trainer) -> tuple[Score, dict[str, float]]:
    """What the model scores after an epoch; all of it by the names of the table of epochs."""
    with run.statistics(trainer):
        test, validation = run.evaluate(run.data.test, trainer), _validated(run, trainer)
    other = _other_moment(run, trainer)
    return test, {
        "top1": test.top1,
        "loss": test.loss,
        "other_top1": other.top1,
        "other_loss": other.loss,
        "val_top1": validation.top1,
        "val_loss": validation.loss,
    }


def _metric(scores: dict[str, float]) -> float | None:
    """What tells whether an epoch was better: validation's top-1, without it the test's."""
    validation = scores.get("val_top1", math.nan)
    return scores.get("top1") if math.isnan(validation) else validation


def _other_moment(run: Training, trainer: Trainer) -> Score:
    decay = run.decay
    if not run.options.both_moments or decay is None or not decay.has_other_moment:
        return _NOT_EVALUATED
    if decay.moment == "forward":  # with the next step's η
        trainer.set_rates()
    with decay.at_other_moment(), run.statistics(trainer):
        return run.evaluate(run.data.test, trainer)


def _validated(run: Training, trainer: Trainer) -> Score:
    if run.data.validation is None:
        return _NOT_EVALUATED
    return run.evaluate(run.data.validation, trainer)


def _ask_batch_norm(run: Training, trainer: Trainer) -> None:
    """How far its running statistics lag, and what they score where the run is scored without."""
    if not batch_norms(run.scored()):
        return
    with trainer.ahead(ASKED) as batches:
        run.lag = lag(
            run.scored(),
            list(batches),
            trainer.autocast,
            lambda batches: run.evaluate(batches, trainer).top1,
        )
    if run.lag is not None and run.options.update_bn:
        test, validation = run.evaluate(run.data.test, trainer), _validated(run, trainer)
        run.running = {"running_top1": test.top1, "running_val_top1": validation.top1}


def _config(run: Training) -> dict[str, Any]:
    options = run.options
    return {
        **asdict(options),
        "lr": options.learning_rate,
        "scale": None if run.decay is None else run.decay.scale,
        "hflip": run.data.hflip,
        "c": "lr*rate: c = ηλ, η live"
        if options.convention == "lr*rate"
        else "rate: c = λ, as Eq. 1 prints it",
        "num_classes": run.data.num_classes,
        "train_size": run.data.train_size,
        "validation_size": run.data.validation_size,
        "test_size": run.data.test_size,
        "weights": sum(p.numel() for p in run.model.parameters()),
        "layer_definition": run.layers.definition,
        "layers": [
            {"index": layer.index, "name": layer.name, "parameters": layer.parameters}
            for layer in run.layers
        ],
        "command_line": command_line(),
        **environment(run.device),
    }


def _summary(run: Training, recorder: Recorder, status: Status, seconds: float) -> dict[str, Any]:
    options = run.options
    batches = recorder.steps / run.updates * len(run.data.train)
    images = batches * min(options.batch_size, run.data.train_size)
    measured = recorder.summary(options.weight_decay, _setting(run))
    if run.lag is not None:
        measured["batch_norm"] = asdict(run.lag)
        decays = options.weight_decay > 0 and options.method != "baseline"
        told = run.lag.findings(decays=decays, updated=options.update_bn)
        measured["findings"] = [*told, *measured["findings"]]
    return {
        "command": options.command,
        "model": options.model,
        "dataset": options.dataset,
        "method": run.method(),
        "decay": "optimizer" if options.method == "own" else "attached",
        "optimizer": options.opt,
        "lr": options.learning_rate,
        "weight_decay": options.weight_decay,
        "scale": None if run.decay is None else run.decay.scale,
        "convention": options.convention,
        "seed": options.seed,
        **chosen(options),
        "layer_definition": run.layers.definition,
        **measured,
        **run.running,
        "status": status,
        "seconds": seconds,
        "images_per_second": images / seconds if seconds else math.nan,
        "run": str(recorder.folder.path),
    }


def _setting(run: Training) -> Setting:
    options = run.options
    return Setting(
        lr=options.learning_rate,
        rule=run.method(),
        optimizer=options.opt,
        steps_per_epoch=run.updates,
    )


def _save_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    save_model(model, str(path))
