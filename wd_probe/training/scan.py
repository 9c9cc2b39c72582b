"""`wdprobe zeroshot`: how fragile a trained model is to shrinking, and where (Fig. 3a)."""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ranks
from ..choices import By
from ..errors import (
    InputError,
    Interrupted,
    RunError,
    WdProbeWarning,
    counted,
    first_line,
    shown_line,
)
from ..layering import Layers, chosen_parameters, layers, named_parameters
from ..runs import figures
from ..runs.findings import kind_of
from ..runs.folder import RunFolder, command_line, default_folder, environment, occupied, run_folder
from ..runs.reading import read_json, read_run
from ..runs.schema import OTHERS, RunConfig
from ..runs.tensorboard import Dashboard
from ..shrink.distortion import feature_distortion
from ..shrink.parts import PartScan
from ..shrink.scan import ScanPoint, bracket, half_life, zero_shot_decay
from ..wording import decimal, percent
from .batch_norm import batch_norms, check_batch_norms, updated
from .data import Batches, HeldBatches, load_data, load_images
from .loop import Trainer, autocast_dtype, pick_device
from .models import classifiers, create_model, read_weights, under_names_of
from .optimizers import build_optimizer
from .options import ZeroshotOptions

METRICS = ("top1", "loss", "agreement", "kl")
#: Scales at which the layers' distortion is measured.
DISTORTION_SCALES = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
_BISECTIONS = 7
#: What a run's own config may ask for: the side of its images, and where its dataset is from.
_LARGEST_SIZE, _LOCAL = 1024, ("digits", "folder", "torch")


class Listener(Protocol):
    """Is told how a scan goes."""

    def note(self, text: str) -> None:
        """Something a person should know."""

    def progress(self, what: str, done: int, total: int, numbers: str) -> None:
        """``done`` of ``total`` passes of ``what``."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is scanned: a trained model and the images it is evaluated on."""

    name: str
    model: nn.Module
    data: Batches
    labelled: bool
    source: str
    images: int
    img_size: int


class Judge:
    """Metrics of logits on a fixed sequence of batches, against the undecayed model's.

    The first logits it is given for each batch are taken as the undecayed model's.

    Args:
        subject: what is scanned.
        compiled: whether :meth:`evaluate` compiles the model.
        update_bn: whether it takes batch norm's statistics anew from these images.
    """

    def __init__(self, subject: Subject, compiled: bool = False, update_bn: bool = False) -> None:
        self.subject, self._update_bn = subject, update_bn
        self._model = torch.compile(subject.model) if compiled else subject.model
        self._whole: list[Tensor] = []
        self._labels = [labels for _, labels in subject.data]
        self.classes = 0

    def images(self) -> Iterator[Tensor]:
        """The batches, without labels."""
        return (images for images, _ in self.subject.data)

    def count(self, logits: Tensor, number: int) -> Tensor:
        """Sums over batch ``number``: right answers, loss, agreement, KL divergence, images.

        Logits that are not finite make all of them NaN: an answer read from them would be none.
        """
        logits = logits.float()
        log_p = F.log_softmax(logits, dim=1)
        if number == len(self._whole):
            self._check(logits, number)
            self._whole.append(log_p)
        whole, labels = self._whole[number], self._labels[number]
        answers = log_p.argmax(1)
        right = loss = torch.full((), math.nan, device=logits.device)
        if self.subject.labelled:
            right = (answers == labels).sum().float()
            loss = F.nll_loss(log_p, labels, reduction="sum")
        agreement = (answers == whole.argmax(1)).sum().float()
        kl = F.kl_div(log_p, whole, reduction="sum", log_target=True)
        sums = torch.stack([right, loss, agreement, kl])
        sums = torch.where(logits.isfinite().all(), sums, math.nan)
        return torch.cat([sums, sums.new_full((1,), len(logits))])

    def _check(self, logits: Tensor, number: int) -> None:
        if logits.ndim != 2:
            raise InputError(
                f"{self.subject.name} gives outputs of shape {tuple(logits.shape)}, not one row of "
                "class scores for each image"
            )
        self.classes = logits.shape[1]
        largest = int(self._labels[number].max()) if self.subject.labelled else 0
        if largest >= self.classes:
            raise InputError(
                f"label {largest} does not fit the head of {self.subject.name}, which has "
                f"{counted(self.classes, 'class', 'classes')}; use the data it was trained on, "
                "--images for unlabelled pictures, or --reset-head"
            )

    @torch.no_grad()
    def evaluate(self, _: nn.Module) -> dict[str, float]:
        """All metrics of the model in its present state, over the images of all processes."""
        with self._statistics():
            rows = [self.count(self._model(images), k) for k, images in enumerate(self.images())]
        return metrics(ranks.total(torch.stack(rows).cpu().double().sum(0)))

    def _statistics(self) -> contextlib.AbstractContextManager[None]:
        if not self._update_bn:
            return contextlib.nullcontext()
        return updated(self.subject.model, self.subject.data, contextlib.nullcontext)


def metrics(sums: Tensor) -> dict[str, float]:
    """What :meth:`Judge.count` summed, as means over the images."""
    return dict(zip(METRICS, (sums[:4] / sums[4]).tolist(), strict=True))


def prepare(options: ZeroshotOptions, listener: Listener) -> Subject:
    """Get the model, train it if it has no weights yet, and open the images.

    Raises:
        InputError: options, files or data that cannot be used.
        RunError: the pretrained weights could not be fetched.
    """
    device = pick_device(options.device)
    subject = _subject(options, device, listener)
    if options.channels_last:
        subject.model.to(memory_format=torch.channels_last)
    dtype = autocast_dtype(options.amp, options.amp_dtype)
    if dtype is not None:  # entered anew by each pass: what autocast keeps of weights would be old
        subject.model.forward = torch.autocast(device.type, dtype)(subject.model.forward)
    return subject


def _subject(options: ZeroshotOptions, device: torch.device, listener: Listener) -> Subject:
    torch.manual_seed(options.seed)
    if options.run is not None:
        return _from_run(options, options.run, device, listener)
    if options.checkpoint is not None or options.pretrained or options.images is not None:
        return _from_checkpoint(options, device, listener)
    size = options.img_size or 32
    data = _dataset(options, options.dataset, options.data_dir, size, device)
    model = create_model(options.model, num_classes=data.num_classes, img_size=size).to(device)
    listener.note(
        f"no weights are given: training {options.model} without decay (the paper's Baseline) for "
        f"{counted(options.epochs, 'epoch')} of {options.dataset} first"
    )
    _train(model, data.train, options, listener)
    source = f"Baseline, {counted(options.epochs, 'epoch')} of {options.dataset}, {options.opt}"
    test, count = _limited(data.test, data.test_size, options)
    return Subject(options.model, model, test, True, source, count, size)


def _dataset(
    options: ZeroshotOptions, name: str, folder: Path | None, size: int, device: torch.device
) -> Any:
    return load_data(
        name,
        batch_size=options.batch_size,
        img_size=size,
        device=device,
        seed=options.seed,
        data_dir=folder,
        download=options.dataset_download,
        channels_last=options.channels_last,
    )


def _limited(data: Batches, size: int, options: ZeroshotOptions) -> tuple[Batches, int]:
    most = options.num_samples
    if most is None or most >= size:
        return data, size
    if not isinstance(data, HeldBatches):
        raise InputError("--num-samples needs a dataset small enough to be held in memory")
    data.images, data.labels = data.images[:most], data.labels[:most]
    data.batch_size = min(data.batch_size, most)
    return data, most


def _from_run(
    options: ZeroshotOptions, folder: Path, device: torch.device, listener: Listener
) -> Subject:
    config = read_run(folder).config
    if config.get("command") in OTHERS:
        raise InputError(
            f"{folder} is of a script, whose model is not kept: save its weights, with torch.save, "
            "and name --model, --checkpoint and --dataset instead"
        )
    for key in ("model", "img_size", "num_classes", "dataset"):
        if config.get(key) is None:
            made = shown_line((config.get("versions") or {}).get("wd-probe", "unknown"), 80)
            raise InputError(
                f"{folder} was made by another version of wd_probe ({made}): its config.json has "
                f"no usable {key!r}; name --model, --checkpoint and --dataset instead"
            )
    name, dataset = config["model"], config["dataset"]
    size, classes = options.img_size or config["img_size"], config["num_classes"]
    _refuse_elsewhere(folder, name, dataset)
    if options.data_dir is None and config.get("data_dir") and options.images is None:
        raise InputError(
            f"{folder} was trained on images in {shown_line(config['data_dir'])}; a run's own "
            "config is not followed out of its folder: give --data-dir"
        )
    if classes < 1 or not 1 <= size <= (options.img_size or _LARGEST_SIZE):
        raise InputError(
            f"{folder}/config.json asks for {counted(classes, 'class', 'classes')} of "
            f"{size}×{size} images; name --model, --checkpoint and --dataset instead"
        )
    model = create_model(
        name, num_classes=classes, img_size=size, checkpoint=folder / "model.safetensors"
    ).to(device)
    if options.images is not None:
        return _on_pictures(options, name, model, size, str(folder), device, listener)
    data = _dataset(options, dataset, options.data_dir, size, device)
    test, count = _limited(data.test, data.test_size, options)
    return Subject(name, model, test, True, f"run {folder}", count, size)


def _refuse_elsewhere(folder: Path, name: str, dataset: str) -> None:
    """A run folder may come from anyone: it names no model and no data that would be fetched."""
    kind = dataset.partition("/")[0]
    for what, foreign in ((name, ":" in name), (dataset, kind not in _LOCAL)):
        if foreign:
            raise InputError(
                f"{folder}/config.json names {shown_line(what)}, which timm would fetch from "
                "elsewhere; if it is to be trusted, name --model, --checkpoint and --dataset "
                "instead"
            )


def _from_checkpoint(options: ZeroshotOptions, device: torch.device, listener: Listener) -> Subject:
    probe = create_model(options.model, num_classes=1000, img_size=224, check_size=False)
    own_size = int((getattr(probe, "default_cfg", None) or {}).get("input_size", (3, 224, 224))[-1])
    size = options.img_size or _size_beside(options.checkpoint) or own_size
    data, classes = None, None
    if options.images is None:
        data = _dataset(options, options.dataset, options.data_dir, size, device)
    if options.checkpoint is not None:
        state, entry = read_weights(options.checkpoint)
        state = under_names_of(probe, state)
        if entry:
            listener.note(f"taking {entry} of {options.checkpoint}")
        heads = [state[f"{n}.weight"] for n in classifiers(probe) if f"{n}.weight" in state]
        classes = len(heads[0]) if heads else None
    if options.reset_head and data is not None:
        classes = data.num_classes
    elif options.pretrained:
        cfg = getattr(probe, "pretrained_cfg", None) or {}
        classes = int(cfg.get("num_classes") or 1000)
    elif classes is None:
        classes = data.num_classes if data is not None else 1000
    model = create_model(
        options.model,
        num_classes=classes,
        img_size=size,
        pretrained=options.pretrained,
        checkpoint=options.checkpoint,
        reset_head=options.reset_head,
    ).to(device)
    source = str(options.checkpoint or ("timm's pretrained weights" if options.pretrained else ""))
    if not source:
        raise InputError("--images needs a trained model: give --run, --checkpoint or --pretrained")
    if data is None:
        return _on_pictures(options, options.model, model, size, source, device, listener)
    test, count = _limited(data.test, data.test_size, options)
    return Subject(options.model, model, test, True, source, count, size)


def _size_beside(checkpoint: Path | None) -> int | None:
    """The size of images that a checkpoint in a run folder was trained on."""
    beside = None if checkpoint is None else checkpoint.parent / "config.json"
    if beside is None or not beside.is_file():
        return None
    try:
        size = read_json(beside, RunConfig).get("img_size")
    except InputError:  # of something else
        return None
    return size if size is not None and 1 <= size <= _LARGEST_SIZE else None


def _on_pictures(
    options: ZeroshotOptions,
    name: str,
    model: nn.Module,
    size: int,
    source: str,
    device: torch.device,
    listener: Listener,
) -> Subject:
    assert options.images is not None
    pictures, unreadable = load_images(options.images, size, options.num_samples)
    if unreadable:
        named = ", ".join(unreadable[:3]) + (", ..." if len(unreadable) > 3 else "")
        listener.note(f"{counted(len(unreadable), 'unreadable picture')} left out: {named}")
    config = resolve_model_data_config(model)
    data = HeldBatches(
        pictures,
        torch.zeros(len(pictures), dtype=torch.long),
        options.batch_size,
        device=device,
        channels_last=options.channels_last,
        mean=config["mean"],
        std=config["std"],
    )
    return Subject(name, model, data, False, source, len(pictures), size)


def _train(model: nn.Module, data: Batches, options: ZeroshotOptions, listener: Listener) -> None:
    optimizer = build_optimizer(options.opt, model, lr=options.lr, weight_decay=0.0, momentum=0.9)
    ranks.check_divides(options.batch_size)
    called: Any = ranks.wrapped(model)
    called = torch.compile(called) if options.torchcompile else called
    trainer = Trainer(
        called, optimizer, data, amp_dtype=autocast_dtype(options.amp, options.amp_dtype)
    )
    ranks.draw_apart()
    total = options.epochs * len(data)
    done = 0
    for epoch in range(1, options.epochs + 1):
        for step in trainer.epoch(epoch, done + 1, total):
            done = step.step
            listener.progress("training", done, total, f"loss {step.loss:.3f}")
    ranks.settle(model)


def scan(options: ZeroshotOptions, listener: Listener) -> dict[str, Any]:
    """Scan one model; returns the summary, which is also in the run folder.

    Raises:
        InputError: options, files or data that cannot be used.
        RunError: the pretrained weights could not be fetched.
    """
    ranks.join(pick_device(options.device))
    if refusal := ranks.same("" if options.output is None else occupied(options.output)):
        raise InputError(refusal)
    folder: RunFolder | None = None
    try:
        subject = prepare(options, listener)
        if subject.images < ranks.size():
            count = counted(subject.images, "image")
            raise InputError(f"{count}: too few for {ranks.size()} processes")
        _tell_statistics(options, subject, listener)
        judge = Judge(subject, options.torchcompile, options.update_bn)
        groups = layers(subject.model)
        parts = _parts(subject.model, groups, options.by)
        folder = run_folder(options.output or default_folder("zeroshot", subject.name))
        return _scan(options, subject, judge, groups, parts, folder, listener)
    except KeyboardInterrupt:
        if folder is None:
            raise
        folder.close()
        raise Interrupted(f"interrupted; what was measured is in {folder.path}") from None
    except RuntimeError as error:
        if ranks.size() == 1 or isinstance(error, RunError):
            raise
        ranks.outlive_the_others()
        kept = "nothing was measured yet"
        if folder is not None:
            folder.close()
            kept = f"what was measured is in {folder.path}"
        raise RunError(f"{ranks.FAILED} ({first_line(error)}); {kept}") from error


def _scan(
    options: ZeroshotOptions,
    subject: Subject,
    judge: Judge,
    groups: Layers,
    parts: Mapping[str, Sequence[str]],
    folder: RunFolder,
    listener: Listener,
) -> dict[str, Any]:
    with folder:
        folder.json("config.json", _config(options, subject, groups, parts))
        curve = _curve(options, subject, judge, folder, listener)
        metric = "top1" if subject.labelled else "agreement"
        chance = 1 / judge.classes
        _tell_chance(subject, curve[0].metrics[metric], chance, listener)
        listener.progress("half-life", 0, 1, "")
        life = half_life(subject.model, judge.evaluate, curve, metric=metric, chance=chance)
        lives = _by_part(options, subject, judge, parts, metric, chance, folder, listener)
        bent = _distortion(options, subject, judge, groups, folder, listener)
        summary = {
            "command": "zeroshot",
            "model": subject.name,
            "source": subject.source,
            "images": subject.images,
            "img_size": subject.img_size,
            "classes": judge.classes,
            "curve": [
                {"step": p.step, "scale": decimal(p.scale), **{m: p.metrics[m] for m in METRICS}}
                for p in curve
            ],
            "batch_norms": len(batch_norms(subject.model)),
            "update_bn": options.update_bn,
            "metric": metric,
            "half_life": decimal(life),
            "parts": lives,
            "distortion": bent,
            "run": str(folder.path),
        }
        folder.json("summary.json", summary)
        if options.run is None and options.checkpoint is None and not options.pretrained:
            from safetensors.torch import save_model

            folder.replace("model.safetensors", lambda path: save_model(subject.model, str(path)))
    folder.guard(lambda: _draw(folder.path, curve, subject))
    return summary | {"write_failure": folder.failure} if folder.failure else summary


def _tell_statistics(options: ZeroshotOptions, subject: Subject, listener: Listener) -> None:
    """Running statistics of undecayed weights do not fit decayed ones."""
    norms = len(batch_norms(subject.model))
    if options.update_bn:
        check_batch_norms(subject.model, subject.name)
    elif norms:
        listener.note(
            f"{counted(norms, 'batch norm')} of {subject.name} keep the running statistics of the "
            "undecayed weights, which costs answers too; --update-bn takes them anew at each scale"
        )


def _tell_chance(subject: Subject, score: float, chance: float, listener: Listener) -> None:
    """A half-life of what luck may have given says nothing."""
    spread = math.sqrt(chance * (1 - chance) / subject.images)
    if subject.labelled and score < chance + 2 * spread:
        listener.note(
            f"top-1 is {percent(score, 1)} before any decay, no better than chance on "
            f"{counted(subject.images, 'image')} of {subject.img_size}×{subject.img_size}; was it "
            "trained on this --dataset at this --img-size?"
        )


def _config(
    options: ZeroshotOptions, subject: Subject, groups: Layers, parts: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    device = next(subject.model.parameters()).device
    return {
        **asdict(options),
        "command": "zeroshot",
        "model": subject.name,
        "source": subject.source,
        "num_classes": getattr(subject.model, "num_classes", None),
        "img_size": subject.img_size,
        "layer_definition": groups.definition,
        "layers": [{"index": layer.index, "name": layer.name} for layer in groups],
        "parts": list(parts),
        "command_line": command_line(),
        **environment(device),
    }


def _curve(
    options: ZeroshotOptions,
    subject: Subject,
    judge: Judge,
    folder: RunFolder,
    listener: Listener,
) -> tuple[ScanPoint, ...]:
    def told(point: ScanPoint) -> None:
        folder.rows(
            "curve.csv",
            ("step", "scale", *METRICS),
            [(point.step, decimal(point.scale), *(point.metrics[m] for m in METRICS))],
        )
        shown, name = ("top1", "top-1") if subject.labelled else ("agreement", "agreement")
        listener.progress(
            "scan", point.step + 1, options.steps + 1,
            f"scale {point.scale:.2f} · {name} {percent(point.metrics[shown], 1)}",
        )  # fmt: skip

    return zero_shot_decay(subject.model, judge.evaluate, options.steps, on_point=told)


def _parts(model: nn.Module, groups: Layers, by: By) -> dict[str, list[str]]:
    if by == "none":
        return {}
    if by == "layer":
        return {f"{layer.index} {layer.name}": list(layer.parameters) for layer in groups}
    head = set(classifiers(model))
    kinds: dict[str, list[str]] = {}
    for name, parameter in named_parameters(model):
        in_head = name.rpartition(".")[0] in head
        kinds.setdefault("head" if in_head else kind_of(name, parameter.ndim), []).append(name)
    return kinds


def _by_part(
    options: ZeroshotOptions,
    subject: Subject,
    judge: Judge,
    parts: Mapping[str, Sequence[str]],
    metric: str,
    chance: float,
    folder: RunFolder,
    listener: Listener,
) -> list[dict[str, Any]]:
    """Half-lives of the parts, most fragile first: a grid of scales, then bisection of each."""
    if not parts:
        return []
    scanner, rounds = PartScan(subject.model, parts), 1 + _BISECTIONS
    grid = [1 - k / options.by_steps for k in range(options.by_steps + 1)]
    sums = _run(scanner, judge, dict.fromkeys(parts, grid))
    listener.progress(f"by {options.by}", 1, rounds, "")
    open_brackets: dict[str, tuple[float, float, float]] = {}
    for index, part in enumerate(parts):
        points = [metrics(row) for row in sums[part]]
        folder.rows(
            "parts.csv",
            ("index", "name", "scale", *METRICS),
            [
                (index + 1, part, decimal(scale), *(p[m] for m in METRICS))
                for scale, p in zip(grid, points, strict=True)
            ],
        )
        found = bracket([(s, p[metric]) for s, p in zip(grid, points, strict=True)], chance)
        if found is not None:
            open_brackets[part] = found
    for number in range(_BISECTIONS if open_brackets else 0):
        middles = {part: [(a + b) / 2] for part, (_, a, b) in open_brackets.items()}
        sums = _run(scanner, judge, middles)
        for part, (target, above, below) in list(open_brackets.items()):
            middle = middles[part][0]
            alive = metrics(sums[part][0])[metric] > target
            open_brackets[part] = (target, middle, below) if alive else (target, above, middle)
        listener.progress(f"by {options.by}", 2 + number, rounds, "")
    lives = [
        {
            "name": part,
            "half_life": decimal(sum(open_brackets[part][1:]) / 2)
            if part in open_brackets
            else math.nan,
            "weights": sum(p.numel() for p in chosen_parameters(subject.model, names).values()),
            "modules_not_run_again": len(scanner.skipped[part]),
        }
        for part, names in parts.items()
    ]
    return sorted(lives, key=lambda part: -_or_zero(part["half_life"]))


def _run(
    scanner: PartScan, judge: Judge, scales: Mapping[str, Sequence[float]]
) -> dict[str, Tensor]:
    found = scanner.run(judge.images(), scales, judge.count)
    return {part: ranks.total(sums) for part, sums in found.items()}


def _or_zero(value: Any) -> float:
    return float(value) if value == value else 0.0


def _distortion(
    options: ZeroshotOptions,
    subject: Subject,
    judge: Judge,
    groups: Layers,
    folder: RunFolder,
    listener: Listener,
) -> list[dict[str, Any]]:
    if not options.distortion:
        return []
    listener.progress("distortion", 0, 1, "")
    found = feature_distortion(
        subject.model, judge.images(), DISTORTION_SCALES, groups=groups, total=ranks.total
    )
    folder.rows(
        "distortion.csv",
        ("scale", "index", "distortion", "norm_ratio"),
        [(f.scale, f.index, f.distortion, f.norm_ratio) for f in found],
    )
    return [asdict(f) for f in found if f.scale == 0.9]


def _draw(path: Path, curve: Sequence[ScanPoint], subject: Subject) -> None:
    drawn = figures.draw_zeroshot([read_run(path)])
    figures.save(drawn, path / "figures")
    board = Dashboard(path, layers(subject.model, coarse=True))
    for point in curve:
        board.scalars(point.step, {f"zero-shot decay/{m}": point.metrics[m] for m in METRICS})
    for name, figure in drawn.items():
        board.figure(f"zero-shot figures/{name}", figure, curve[-1].step)
    board.close()


def compare(summaries: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draw several scans into one figure, ``FOLDER/figures/zeroshot.png``."""
    runs = [read_run(Path(summary["run"])) for summary in summaries]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = figures.draw_zeroshot(runs)
        figures.save({"zeroshot": drawn["zeroshot"]}, folder / "figures")
    except OSError as error:
        warnings.warn(f"no figure is written to {folder} ({error})", WdProbeWarning, stacklevel=2)
