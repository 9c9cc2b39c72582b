"""What a report page says of a sweep: best settings, maps of η and λ, robustness to λ."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..choices import METHODS
from ..errors import InputError, printable, shown_line
from ..runs import figures
from ..runs.reading import read_json
from ..runs.schema import CONFIG, SUMMARY
from ..sweeps.cells import Cell, Setting, Summary, settings
from ..training.options import TrainOptions, typed
from . import html as page
from .html import Html, element, percent

_ORDER = ("own", *METHODS)
_LISTED = 20  # settings in the table; the CSV file has all
_UNSEEN = ("command", "output", "data_dir", "hflip")  # of no account on the page
_MAPPED = 2_500  # a map of more cells than this cannot be read, nor drawn in little room


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep's folder read back: cells with a result, and why the others have none."""

    path: Path
    cells: tuple[tuple[Cell, Summary], ...]
    configs: tuple[Mapping[str, Any], ...]
    without: Mapping[str, tuple[str, str]]

    @property
    def settings(self) -> list[Setting]:
        """The cells gathered over seeds."""
        return settings(*zip(*self.cells, strict=True)) if self.cells else []

    def counts(self) -> dict[str, int]:
        """How many cells came to each end."""
        ends = [str(summary["status"]) for _, summary in self.cells]
        return dict(Counter(ends + [status for status, _ in self.without.values()]))


def read_sweep(path: Path) -> Sweep:
    """Read the options and the summary of every cell; a cell that cannot be read is named."""
    cells, configs, without = [], [], {}
    for folder in sorted(p for p in (path / "cells").iterdir() if p.is_dir()):
        try:
            config = _json(folder / "config.json", CONFIG)
            summary = _json(folder / "summary.json", SUMMARY)
            lost = _without_result(folder, summary)
            if lost is None:
                cells.append((_cell(folder.name, config), summary))
                configs.append(config)
            else:
                without[folder.name] = lost
        except InputError as error:
            without[folder.name] = ("damaged", str(error))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            without[folder.name] = ("damaged", shown_line(f"{type(error).__name__}: {error}"))
    cells.sort(key=lambda item: _place(item[0].options))
    return Sweep(path, tuple(cells), tuple(configs), without)


def _json(file: Path, shape: Mapping[str, Any]) -> Any:
    return read_json(file, shape) if file.is_file() else None


def _without_result(folder: Path, summary: Summary | None) -> tuple[str, str] | None:
    """Status and reason of a cell that has no result; None for one that has."""
    if summary is not None and summary["status"] == "failed":
        return "failed", str(summary.get("error"))
    ended = summary is not None and summary["status"] in ("finished", "diverged")
    if not ended or (folder / "incomplete").exists():
        return "unfinished", "the sweep's own command goes on with it"
    return None


def _cell(name: str, config: Mapping[str, Any]) -> Cell:
    known = {
        f.name: typed(f.name, config[f.name])
        for f in fields(TrainOptions)
        if f.name in config and f.name not in _UNSEEN
    }
    if any(isinstance(value, tuple) for value in known.values()):
        raise ValueError("an option in config.json is a list")
    if known["method"] == "lpwd" and known["scale"] == "max2":
        known["scale"] = None  # what the method does by itself is no axis of the grid
    return Cell(printable(name), TrainOptions(command=config.get("command") or "train", **known))


def _place(o: TrainOptions) -> tuple[Any, ...]:
    return (o.dataset, o.model, o.opt, _ORDER.index(o.method), o.learning_rate, o.weight_decay,
            o.seed)  # fmt: skip


# --- what a setting came to -----------------------------------------------------------------------

Basis = Literal["validation", "test"]
Others = tuple[tuple[str, Any], ...]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan


#: What a cell's top-1 is, and what settings are chosen by.
_TOP1 = {"validation": ("top1",), "test": ("best10", "mean")}
_CHOICE = {"validation": ("val_top1",), "test": ("best10", "mean")}


def top1(setting: Setting, basis: Basis) -> float:
    """Test top-1, mean over seeds; NaN where no seed came to a usable model.

    With a validation split, after the last epoch; else the mean of the ten best epochs, which is
    the paper's figure.
    """
    return _mean(setting.values(*_TOP1[basis]))


def merit(setting: Setting, basis: Basis) -> float:
    """What the best setting is chosen by; −∞ where a seed diverged."""
    value = _mean(setting.values(*_CHOICE[basis]))
    return value if math.isfinite(value) and not setting.diverged else -math.inf


def _spread(setting: Setting, basis: Basis) -> str:
    known = [100 * value for value in setting.values(*_TOP1[basis]) if math.isfinite(value)]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.1f}{spread} %"


@dataclass(frozen=True, slots=True)
class Group:
    """The settings that differ in nothing but method, η and λ."""

    dataset: str
    model: str
    opt: str
    others: Others
    settings: tuple[Setting, ...]
    basis: Basis

    @property
    def title(self) -> str:
        """Its name."""
        further = "".join(f" · {name} {value}" for name, value in self.others)
        return f"{self.model} on {self.dataset} · {self.opt}{further}"

    @property
    def methods(self) -> dict[str, list[Setting]]:
        """Settings by method."""
        found: dict[str, list[Setting]] = {}
        for setting in self.settings:
            found.setdefault(setting.method, []).append(setting)
        return found

    def best(self) -> dict[str, Setting]:
        """By method the best setting, the best method first; none where every setting diverged."""
        found = {
            method: max(tried, key=lambda setting: merit(setting, self.basis))
            for method, tried in self.methods.items()
        }
        usable = {m: s for m, s in found.items() if math.isfinite(merit(s, self.basis))}
        return dict(sorted(usable.items(), key=lambda item: -top1(item[1], self.basis)))

    def at(self, setting: Setting, factor: float) -> Setting | None:
        """The setting whose λ is ``factor`` times as large, all else equal."""
        wanted = setting.weight_decay * factor
        near = (
            other
            for other in self.methods[setting.method]
            if other.lr == setting.lr and math.isclose(other.weight_decay, wanted, rel_tol=0.01)
        )
        return next(near, None) if wanted else None


def groups(sweep: Sweep) -> list[Group]:
    """A group for all that differs besides method, η and λ, in the order of the sweep."""
    found: dict[tuple[str, str, str, Others], list[Setting]] = {}
    for s in sweep.settings:
        found.setdefault((s.dataset, s.model, s.opt, s.others), []).append(s)
    return [Group(*key, tuple(tried), _basis(tried)) for key, tried in found.items()]


def _basis(tried: Sequence[Setting]) -> Basis:
    """Validation only where every usable cell has it: else settings could not be compared."""
    usable = [s for s in tried if not s.diverged]
    has = [math.isfinite(_mean(s.values("val_top1"))) for s in usable]
    return "validation" if has and all(has) else "test"


# --- the page -------------------------------------------------------------------------------------


def section(sweep: Sweep) -> Html:
    """All that the page says of a sweep."""
    found = groups(sweep)
    return page.joined(
        [
            element("p", lead(sweep), class_="lead"),
            page.findings([line for group in found for line in _findings(group)]),
            *(_caution(found)),
            *(_group(group) for group in found),
            _lost(sweep),
            element("h3", "What was run"),
            page.facts(_facts(sweep)),
        ]
    )


def lead(sweep: Sweep) -> str:
    """A sweep in one line."""
    counts = sweep.counts()
    shown = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"A sweep of {sum(counts.values())} cells ({shown}) in {len(sweep.settings)} settings"


def _caution(found: Sequence[Group]) -> list[Html]:
    chosen = {group.basis for group in found}
    said = {
        "validation": "The best settings are chosen on the validation images; top-1 is on the test "
        "images, after the last epoch.",
        "test": "No validation images were set apart: the best settings are chosen on the test "
        "images themselves, so their top-1 is flattering. Top-1 is the mean of the ten best "
        "epochs. --val-split sets some apart.",
    }
    if len(chosen) > 1:
        return [
            element("p", f"{group.title}: {said[group.basis]}", class_="lead") for group in found
        ]
    return [element("p", said[basis], class_="lead") for basis in chosen]


def _findings(group: Group) -> list[str]:
    best = group.best()
    if not best:
        return [f"{group.title}: no setting came to a usable model."]
    method, setting = next(iter(best.items()))
    found = [
        f"{group.title}: {method} does best, with {_spread(setting, group.basis)} top-1 at "
        f"η {setting.lr:g}, λ {setting.weight_decay:g}{_ahead(group, best)}."
    ]
    moves = {m: move for m, s in best.items() if (move := _change(group, s, 10)) is not None}
    if moves:
        told = ", ".join(f"{m} {_points(move, sign=True)}" for m, move in moves.items())
        found.append(f"{group.title}: what ten times the best λ does to top-1: {told}.")
    return found


def _ahead(group: Group, best: Mapping[str, Setting]) -> str:
    """By how much the best method leads, and whether seeds differ by more."""
    if len(best) < 2:
        return ""
    (_, first), (name, second) = list(best.items())[:2]
    ahead = top1(first, group.basis) - top1(second, group.basis)
    known = [s.values(*_TOP1[group.basis]) for s in (first, second)]
    apart = max((statistics.stdev(v) for v in known if len(v) > 1), default=0.0)
    doubt = ", less than seeds are apart" if ahead < apart else ""
    if min(map(len, known)) < 2:
        doubt = doubt or ", by a single seed"
    return f", {_points(ahead)} above {name}{doubt}"


def _points(share: float, sign: bool = False) -> str:
    return f"{100 * share:{'+' if sign else ''}.1f} points".replace("-", "−")


def _told_change(change: float | None) -> str:
    return "–" if change is None else _points(change, sign=True)


def _change(group: Group, setting: Setting, factor: float) -> float | None:
    """What becomes of top-1 as λ is multiplied; it goes to 0 where the run diverges."""
    other = group.at(setting, factor)
    if other is None:
        return None
    value = top1(other, group.basis)
    return (value if math.isfinite(value) else 0.0) - top1(setting, group.basis)


def _group(group: Group) -> Html:
    best = group.best()
    return page.joined(
        [
            element("h2", group.title),
            page.table(*_best_table(group, best)),
            element("div", *_maps(group, best), class_="figures"),
            element("div", *_curves(group, best), class_="figures"),
            element("h3", "Settings, the best first"),
            page.table(*_settings_table(group)),
            page.download("settings", _columns(group)),
        ]
    )


def _best_table(
    group: Group, best: Mapping[str, Setting]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    header = ("method", "η", "λ", "top-1", "seeds", "change at 10 λ", "at λ/10", "mean R_op")
    rows = [
        (
            method,
            f"{s.lr:g}",
            f"{s.weight_decay:g}",
            _spread(s, group.basis),
            str(len(s.cells)),
            *(_told_change(_change(group, s, factor)) for factor in (10, 0.1)),
            percent(_rate(s)),
        )
        for method, s in best.items()
    ]
    return header, rows


def _maps(group: Group, best: Mapping[str, Setting]) -> list[Html]:
    values = [top1(s, group.basis) for s in group.settings]
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    limits = min(known), max(max(known), min(known) + 0.01)
    return [
        page.figure(
            figures.lr_decay_map(
                {(s.lr, s.weight_decay): top1(s, group.basis) for s in tried},
                method,
                best=(best[method].lr, best[method].weight_decay) if method in best else None,
                limits=limits,
            ),
            f"Top-1 of {method}",
            "Per cent. Ring: the best setting. Cross: no usable model.",
            (f"top1_{method}", _columns(group, tried)),
        )
        for method, tried in group.methods.items()
        if len({s.lr for s in tried}) * len({s.weight_decay for s in tried}) <= _MAPPED
    ]


def _curves(group: Group, best: Mapping[str, Setting]) -> list[Html]:
    return [*_robustness(group, best), *_opposing(group)]


def _robustness(group: Group, best: Mapping[str, Setting]) -> list[Html]:
    at_best = {
        method: [s for s in tried if s.lr == best[method].lr]
        for method, tried in group.methods.items()
        if method in best
    }
    lines = {
        method: [(s.weight_decay, top1(s, group.basis)) for s in tried]
        for method, tried in at_best.items()
    }
    if not any(len(line) > 1 for line in lines.values()):
        return []
    title, marks = "Robustness to λ", {method: s.weight_decay for method, s in best.items()}
    return [
        page.figure(
            figures.top1_by_decay_rate(lines, title, marks=marks),
            title,
            "Top-1 over the decay rate, at each method's best learning rate; the filled point is "
            "its best setting.",
            ("top1_by_decay_rate", _columns(group, [s for each in at_best.values() for s in each])),
        )
    ]


def _opposing(group: Group) -> list[Html]:
    points = {
        method: [(_rate(s), top1(s, group.basis)) for s in tried]
        for method, tried in group.methods.items()
    }
    known = {m: [p for p in pairs if all(map(math.isfinite, p))] for m, pairs in points.items()}
    if sum(map(len, known.values())) < 2:
        return []
    title = "R_op beside top-1"
    return [
        page.figure(
            figures.opposing_beside_top1(known, title),
            title,
            "A point is a setting: its mean opposing-penalty rate and its top-1.",
            ("rop_beside_top1", _columns(group)),
        )
    ]


def _rate(setting: Setting) -> float:
    return _mean(setting.values("rate", "mean"))


def _columns(group: Group, tried: Sequence[Setting] | None = None) -> dict[str, list[Any]]:
    """A row for each setting."""
    rows = group.settings if tried is None else tried
    return {
        "method": [s.method for s in rows],
        "lr": [s.lr for s in rows],
        "weight_decay": [s.weight_decay for s in rows],
        "seeds": [len(s.cells) for s in rows],
        "no_model": [s.diverged for s in rows],
        "top1": [top1(s, group.basis) for s in rows],
        "val_top1": [_mean(s.values("val_top1")) for s in rows],
        "best10": [_mean(s.values("best10", "mean")) for s in rows],
        "rop": [_rate(s) for s in rows],
    }


def _settings_table(group: Group) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    ranked = sorted(group.settings, key=lambda s: -merit(s, group.basis))[:_LISTED]
    header: tuple[str, ...] = (
        "method", "η", "λ", "top-1", "validation", "mean R_op", "no model",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (
            s.method,
            f"{s.lr:g}",
            f"{s.weight_decay:g}",
            _spread(s, group.basis),
            percent(_mean(s.values("val_top1")), 1),
            percent(_rate(s)),
            f"{s.diverged} of {len(s.cells)}" if s.diverged else "–",
        )
        for s in ranked
    ]
    return header, rows


def _lost(sweep: Sweep) -> Html:
    """The cells without a usable model."""
    rows = [
        (cell.name, "diverged", f"at step {summary.get('steps')}")
        for cell, summary in sweep.cells
        if summary["status"] == "diverged"
    ]
    rows += [(name, status, why) for name, (status, why) in sweep.without.items()]
    if not rows:
        return Html()
    return page.joined(
        [
            element("h2", f"Cells without a usable model ({len(rows)})"),
            page.table(("cell", "status", "why"), rows),
        ]
    )


def _facts(sweep: Sweep) -> dict[str, object]:
    chosen = [cell.options for cell, _ in sweep.cells]
    seconds = sum(float(summary.get("seconds") or 0) for _, summary in sweep.cells)
    configs = sweep.configs
    return {
        "folder": sweep.path,
        "datasets": _several(o.dataset for o in chosen),
        "models": _several(o.model for o in chosen),
        "optimizers": _several(o.opt for o in chosen),
        "methods": _several(o.method for o in chosen),
        "learning rates η": _several(sorted({o.learning_rate for o in chosen})),
        "decay rates λ": _several(sorted({o.weight_decay for o in chosen})),
        "seeds": _several(sorted({o.seed for o in chosen})),
        "epochs": _several(c.get("epochs") for c in configs),
        "batch": _several(c.get("batch_size") for c in configs),
        "training images": _several(c.get("train_size") for c in configs),
        "machines": _several(f"{c.get('device_name')} ({c.get('device')})" for c in configs),
        "versions": _several(
            f"{name} {version}" for c in configs for name, version in c.get("versions", {}).items()
        ),
        "hours of training": f"{seconds / 3600:.2g}",
    }


def _several(values: Any) -> str | None:
    """Each value once, in order."""
    shown = dict.fromkeys(
        f"{value:g}" if isinstance(value, float) else str(value)
        for value in values
        if value is not None
    )
    return ", ".join(shown) or None
