"""What a report page says of a sweep: best settings, maps of η and λ, robustness to λ."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..choices import METHODS
from ..errors import InputError, counted, printable, shown_line
from ..runs import figures
from ..runs.decay_tables import number, taken_off
from ..runs.reading import read_json
from ..runs.schema import Contents, RunConfig, RunSummary
from ..sweeps.grid import Cell, Summary
from ..sweeps.results import (
    CHOICE,
    TOP1,
    Basis,
    Interval,
    Setting,
    basis,
    best_settings,
    change,
    interval,
    lag_told,
    merit,
    paired,
    settings,
)
from ..training.options import TrainOptions, typed
from ..wording import percent, plus_minus
from .run import recipe
from .values import Columns, Figures

_ORDER = ("own", *METHODS)
_LISTED = 20  # settings in the table; the CSV file has all
_NOTHING = "0.0 points"
#: What decay did, by column, and where a run's summary has it.
_LEDGER = {
    "remaining": ("dynamics", "remaining"),
    "angular_update": ("dynamics", "angular_update", "mean"),
}
_UNSEEN = ("command", "output", "data_dir", "hflip")  # of no account on the page
_MAPPED = 2_500  # a map of more cells than this cannot be read, nor drawn in little room


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep's folder read back: cells with a result, and why the others have none.

    ``failed`` are those of the others that had begun, so that their place in the grid is known.
    """

    path: Path
    cells: tuple[tuple[Cell, Summary], ...]
    failed: tuple[tuple[Cell, Summary], ...]
    configs: tuple[Mapping[str, Any], ...]
    without: Mapping[str, tuple[str, str]]

    @property
    def settings(self) -> list[Setting]:
        """All whose place is known, gathered over seeds."""
        known = sorted(self.cells + self.failed, key=lambda item: _place(item[0].options))
        return settings(*zip(*known, strict=True)) if known else []

    def counts(self) -> dict[str, int]:
        """How many cells ended in each way."""
        ends = [str(summary["status"]) for _, summary in self.cells]
        return dict(Counter(ends + [status for status, _ in self.without.values()]))


def read_sweep(path: Path) -> Sweep:
    """Read the options and the summary of every cell; a cell that cannot be read is named."""
    cells, failed, configs, without = [], [], [], {}
    for folder in sorted(p for p in (path / "cells").iterdir() if p.is_dir()):
        try:
            config = _json(folder / "config.json", RunConfig)
            summary = _json(folder / "summary.json", RunSummary)
            lost = _without_result(folder, summary)
            if lost is None:
                cells.append((_cell(folder.name, config), summary))
                configs.append(config)
            else:
                without[folder.name] = lost
                if lost[0] == "failed" and config is not None:
                    failed.append((_cell(folder.name, config), summary))
        except InputError as error:
            without[folder.name] = ("damaged", str(error))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            without[folder.name] = ("damaged", shown_line(f"{type(error).__name__}: {error}"))
    cells.sort(key=lambda item: _place(item[0].options))
    return Sweep(path, tuple(cells), tuple(failed), tuple(configs), without)


def _json(file: Path, contents: type[Contents]) -> Any:
    return read_json(file, contents) if file.is_file() else None


def _without_result(folder: Path, summary: Summary | None) -> tuple[str, str] | None:
    """Status and reason of a cell that has no result; None for one that has."""
    if summary is not None and summary["status"] == "failed":
        return "failed", str(summary.get("error"))
    ended = summary is not None and summary["status"] in ("finished", "diverged")
    if not ended or (folder / "incomplete").exists():
        return "unfinished", "the sweep's own command resumes it"
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


# --- groups ---------------------------------------------------------------------------------------

Others = tuple[tuple[str, Any], ...]


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
        further = "".join(f" · {name} {value}" for name, value in self.others if value is not None)
        return f"{self.model} on {self.dataset} · {self.opt}{further}"

    @property
    def methods(self) -> dict[str, list[Setting]]:
        """Settings by method."""
        found: dict[str, list[Setting]] = {}
        for setting in self.settings:
            found.setdefault(setting.method, []).append(setting)
        return found

    def top1(self, setting: Setting) -> float:
        """Its test top-1, mean over seeds; NaN where no seed gave a usable model."""
        return setting.mean(*TOP1[self.basis])

    def best(self) -> dict[str, Setting]:
        """By method the best setting, the best method first; none without a usable model."""
        found = {b.setting.method: b.setting for b in best_settings(self.settings, self.basis)}
        usable = {m: s for m, s in found.items() if math.isfinite(self.top1(s))}
        return dict(sorted(usable.items(), key=lambda i: (i[1].diverged, -self.top1(i[1]))))

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
    by = basis(sweep.settings)
    return [Group(*key, tuple(tried), by) for key, tried in found.items()]


# --- the page -------------------------------------------------------------------------------------


def section(sweep: Sweep) -> dict[str, Any]:
    """What ``sweep.html`` shows."""
    found = groups(sweep)
    return {
        "counts": sweep.counts(),
        "setting_count": len(sweep.settings),
        "basis": basis(sweep.settings),
        "several_seeds": any(len(setting.cells) > 1 for setting in sweep.settings),
        "sentences": [
            *(line for group in found for line in _findings(group)),
            *filter(None, [lag_told(sweep.cells)]),
        ],
        "groups": [_shown(group) for group in found],
        "lost": _lost(sweep),
        "what_was_run": _facts(sweep),
    }


def _shown(group: Group) -> dict[str, Any]:
    best = group.best()
    return {
        "title": group.title,
        "methods": list(group.methods),
        "best": _best_rows(group, best),
        "figures": _maps(group, best)
        | _robustness(group, best)
        | _by_timescale(group)
        | _opposing(group),
        "settings": _settings_rows(group),
        "columns": _columns(group),
    }


def _findings(group: Group) -> list[str]:
    best = group.best()
    if not best:
        return [f"{group.title}: no setting gave a usable model."]
    found = [f"{group.title}: {_lead(group, best)}."]
    moves = {m: move for m, s in best.items() if (move := _change(group, s, 10)) is not None}
    if moves:
        told = ", ".join(f"{m} {_points(move, sign=True)}" for m, move in moves.items())
        found.append(f"{group.title}: what ten times the best λ does to top-1: {told}.")
    did = [f"{method} {told}" for method, s in best.items() if (told := _did(s))]
    if did:
        found.append(f"{group.title}: what decay did at the best λ: {'; '.join(did)}.")
    return found


def _did(setting: Setting) -> str:
    """What decay did there: its state, what is left, how long it remembers."""
    state, left, scale = setting.state, setting.mean("dynamics", "remaining"), _timescale(setting)
    if state is None or not math.isfinite(scale):
        return ""
    return f"is {state}, {percent(left)} left, its timescale {scale:.2g} of the run"


def _timescale(setting: Setting) -> float:
    """1/c as a share of the run."""
    return setting.mean("dynamics", "timescale_steps") / setting.mean("steps")


def _lead(group: Group, best: Mapping[str, Setting]) -> str:
    """Which method does best, by how much, and whether that may be chance; or which ones tie."""
    (method, first), *others = best.items()
    rivals = {m: s for m, s in others if not s.diverged}  # they come first
    tied = [m for m, s in rivals.items() if _points(_ahead(group, first, s)) == _NOTHING]
    if tied:
        named = f"{', '.join([method, *tied[:-1]])} and {tied[-1]}"
        return f"{named} tie, with {percent(group.top1(first), 1)} top-1"
    lost = f" with {_kept(first)} seeds" if first.diverged else ""
    told = f"{method} does best, with {_spread(group, first)} top-1 at "
    told += f"η {first.lr:g}, λ {first.weight_decay:g}{lost}"
    for name, second in rivals.items():
        gap = paired(first, second, *TOP1[group.basis]).interval
        return f"{told}, {_points(_ahead(group, first, second))} above {name}{_doubt(gap)}"
    return told


def _ahead(group: Group, first: Setting, second: Setting) -> float:
    return group.top1(first) - group.top1(second)


def _doubt(gap: Interval) -> str:
    """What a lead is worth, from the difference seed by seed."""
    if gap.count < 2:
        return ", by a single seed" if gap.count else ", by different seeds"
    if gap.half_width < abs(gap.mean):
        return ""
    return f", within the 95 % interval of the difference (± {percent(gap.half_width, 1, unit='')})"


def _spread(group: Group, setting: Setting) -> str:
    found = interval(setting.values(*TOP1[group.basis]))
    return plus_minus(found.mean, found.half_width, 1)


def _kept(setting: Setting) -> str:
    """The seeds that gave a usable model."""
    count = len(setting.cells)
    return f"{count - setting.diverged} of {count}" if setting.diverged else f"{count}"


def _points(share: float, sign: bool = False) -> str:
    return f"{100 * share:{'+' if sign else ''}.1f} points".replace("-", "−")


def _told_change(change: float | None) -> str:
    return "–" if change is None else _points(change, sign=True)


def _change(group: Group, setting: Setting, factor: float) -> float | None:
    """What becomes of top-1 as λ is multiplied; it goes to 0 where a seed diverges."""
    other = group.at(setting, factor)
    return None if other is None else change(setting, other, *TOP1[group.basis])


def _best_rows(group: Group, best: Mapping[str, Setting]) -> list[tuple[str, ...]]:
    return [
        (
            method,
            f"{s.lr:g}",
            f"{s.weight_decay:g}",
            _spread(group, s),
            _kept(s),
            *(_told_change(_change(group, s, factor)) for factor in (10, 0.1)),
            percent(_rate(s)),
        )
        for method, s in best.items()
    ]


def _maps(group: Group, best: Mapping[str, Setting]) -> Figures:
    values = [group.top1(s) for s in group.settings]
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    limits = min(known), max(max(known), min(known) + 0.01)
    return {
        f"top1_{method}": (
            figures.lr_decay_map(
                {(s.lr, s.weight_decay): group.top1(s) for s in tried},
                "",
                best=(best[method].lr, best[method].weight_decay) if method in best else None,
                limits=limits,
            ),
            _columns(group, tried),
        )
        for method, tried in group.methods.items()
        if len({s.lr for s in tried}) * len({s.weight_decay for s in tried}) <= _MAPPED
    }


def _robustness(group: Group, best: Mapping[str, Setting]) -> Figures:
    """Top-1 over λ at each method's best η."""
    at_best = {
        method: [s for s in tried if s.lr == best[method].lr]
        for method, tried in group.methods.items()
        if method in best
    }
    lines = {
        method: [(s.weight_decay, group.top1(s)) for s in tried]
        for method, tried in at_best.items()
    }
    if not any(len(line) > 1 for line in lines.values()):
        return {}
    marks = {method: s.weight_decay for method, s in best.items()}
    drawn = figures.top1_by_decay_rate(lines, "", marks=marks)
    data = _columns(group, [s for each in at_best.values() for s in each])
    return {"top1_by_decay_rate": (drawn, data)}


def _by_timescale(group: Group) -> Figures:
    """Top-1 over 1/c: settings of other η, λ and methods beside each other."""
    points = {
        method: [(_timescale(s), group.top1(s), s.state) for s in tried]
        for method, tried in group.methods.items()
    }
    known = {
        method: [(x, y, state) for x, y, state in each if math.isfinite(x) and math.isfinite(y)]
        for method, each in points.items()
    }
    known = {method: each for method, each in known.items() if each}
    if len({x for each in known.values() for x, _, _ in each}) < 2:
        return {}
    return {"top1_by_timescale": (figures.top1_by_timescale(known, ""), _columns(group))}


def _opposing(group: Group) -> Figures:
    points = {
        method: [(_rate(s), group.top1(s)) for s in tried]
        for method, tried in group.methods.items()
    }
    known = {m: [p for p in pairs if all(map(math.isfinite, p))] for m, pairs in points.items()}
    rates = [rate for pairs in known.values() for rate, _ in pairs]
    if len(rates) < 2 or not any(rates):
        return {}
    return {"rop_beside_top1": (figures.opposing_beside_top1(known, ""), _columns(group))}


def _rate(setting: Setting) -> float:
    return setting.mean("rate", "mean")


def _columns(group: Group, tried: Sequence[Setting] | None = None) -> Columns:
    """A row for each setting."""
    rows = group.settings if tried is None else tried
    return {
        "method": [s.method for s in rows],
        "lr": [s.lr for s in rows],
        "weight_decay": [s.weight_decay for s in rows],
        "seeds": [len(s.cells) for s in rows],
        "no_model": [s.diverged for s in rows],
        "top1": [group.top1(s) for s in rows],
        "val_top1": [s.mean(*CHOICE["validation"]) for s in rows],
        "best10": [s.mean("best10", "mean") for s in rows],
        "rop": [_rate(s) for s in rows],
        "state": [s.state for s in rows],
        "timescale_of_run": [_timescale(s) for s in rows],
        "balance": [_balance(s) for s in rows],
        **{name: [s.mean(*path) for s in rows] for name, path in _LEDGER.items()},
    }


def _settings_rows(group: Group) -> list[tuple[str, ...]]:
    ranked = sorted(group.settings, key=lambda s: merit(s, group.basis), reverse=True)[:_LISTED]
    return [
        (
            s.method,
            f"{s.lr:g}",
            f"{s.weight_decay:g}",
            _spread(group, s),
            percent(s.mean(*CHOICE["validation"]), 1),
            percent(_rate(s)),
            s.state or "–",
            taken_off(s.mean("dynamics", "remaining")),
            number(_balance(s)),
            f"{s.diverged} of {len(s.cells)}" if s.diverged else "–",
        )
        for s in ranked
    ]


def _balance(setting: Setting) -> float:
    """That by which states are told; of files that do not have it, that of all steps."""
    late = setting.mean("dynamics", "balance", "late")
    return setting.mean("dynamics", "balance", "mean") if math.isnan(late) else late


def _lost(sweep: Sweep) -> list[tuple[str, str, str]]:
    """The cells without a usable model."""
    diverged = [
        (cell.name, "diverged", f"at step {summary.get('steps')}")
        for cell, summary in sweep.cells
        if summary["status"] == "diverged"
    ]
    return diverged + [(name, status, why) for name, (status, why) in sweep.without.items()]


def _facts(sweep: Sweep) -> dict[str, object]:
    chosen = [cell.options for cell, _ in sweep.cells]
    seconds = sum(float(summary.get("seconds") or 0) for _, summary in sweep.cells)
    configs = sweep.configs
    return {
        "folder": sweep.path,
        "command": _several(c.get("command_line") for c in configs),
        "datasets": _several(o.dataset for o in chosen),
        "models": _several(o.model for o in chosen),
        "weights from": _several(c.get("source") or c.get("checkpoint") for c in configs),
        "optimizers": _several(o.opt for o in chosen),
        "methods": _several(o.method for o in chosen),
        "layer-wise rates": _several(c.get("scale") for c in configs),
        "learning rates η": _several(sorted({o.learning_rate for o in chosen})),
        "decay rates λ": _several(sorted({o.weight_decay for o in chosen})),
        "seeds": _several(sorted({o.seed for o in chosen})),
        "length": _several(_length(c) for c in configs),
        "batch": _several(c.get("batch_size") for c in configs),
        "training images": _several(c.get("train_size") for c in configs),
        "timm's recipe": _several(recipe(c) or None for c in configs),
        "machines": _several(f"{c.get('device_name')} ({c.get('device')})" for c in configs),
        "versions": _several(
            f"{name} {version}" for c in configs for name, version in c.get("versions", {}).items()
        ),
        "hours of training": f"{seconds / 3600:.2g}",
    }


def _length(config: Mapping[str, Any]) -> str | None:
    lengths = (config.get("steps"), "step"), (config.get("epochs"), "epoch")
    return next((counted(length, what) for length, what in lengths if length), None)


def _several(values: Any) -> str | None:
    """Each value once, in order."""
    shown = dict.fromkeys(
        f"{value:g}" if isinstance(value, float) else str(value)
        for value in values
        if value is not None
    )
    return ", ".join(shown) or None
