"""The answers to docs/experiments.md, from the cells' rows beside this file.

    python docs/data/answers.py [GRID ...] [--figures FOLDER]

GRID.toml is the grid, GRID.csv its cells.csv, GRID_falling.csv the control's. Prints Markdown, and
draws into FOLDER.
"""

import argparse
import csv
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from wd_probe.runs.decay_tables import number
from wd_probe.runs.style import INK, SERIES, dress, new_figure
from wd_probe.sweeps.results import Interval, difference, interval
from wd_probe.wording import percent

HERE = Path(__file__).parent
PREDICTORS = ("R_op", "weight_decay", "remaining", "balance", "angular_update")
Row = Mapping[str, str]


def rows_of(file: Path) -> list[Row]:
    return list(csv.DictReader(file.read_text().splitlines()))


class Grid:
    """The cells of a grid by method, λ and seed.

    Args:
        name: of its files.
        running: score by batch norm's running statistics, where the runs had ones taken anew.
    """

    def __init__(self, name: str, running: bool = False) -> None:
        self.name = name
        self.score, self.judge = "top1", "val_top1"
        if running:
            self.score, self.judge = "running_top1", "running_val_top1"
        plan = tomllib.loads((HERE / f"{name}.toml").read_text())
        self.steps = plan["epochs"] * (plan["train_samples"] // plan["batch_size"])
        self.cells: dict[tuple[str, float, int], Row] = {}
        for part, method in ((name, None), (f"{name}_falling", "falling")):
            file = HERE / f"{part}.csv"
            for row in rows_of(file) if file.exists() else ():
                if row["status"] in ("finished", "diverged"):
                    key = method or row["method"], float(row["weight_decay"]), int(row["seed"])
                    self.cells[key] = row

    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for method, *_ in self.cells))

    def rates(self, method: str) -> list[float]:
        return sorted({rate for name, rate, _ in self.cells if name == method})

    def figure(self, method: str, rate: float, name: str = "") -> dict[int, float]:
        """By seed, in points where it is an accuracy; default the score."""
        name = name or self.score
        scale = 100 if name.endswith("top1") else 1
        return {
            seed: scale * float(row[name] or "nan")
            for (m, r, seed), row in sorted(self.cells.items())
            if (m, r) == (method, rate)
        }

    def mean(self, method: str, rate: float, name: str) -> float:
        return interval(list(self.figure(method, rate, name).values())).mean

    def best(self, method: str, among: Sequence[float] = ()) -> float:
        """The λ with the highest mean validation top-1, of those that two seeds ran or more."""
        tried = among or self.rates(method)
        several = [rate for rate in tried if len(self.figure(method, rate)) > 1] or tried
        return max(several, key=lambda rate: self.mean(method, rate, self.judge))

    @property
    def has_both(self) -> bool:
        """Whether its cells were scored by running statistics too."""
        return any(row.get("running_top1") for row in self.cells.values())

    def shared(self, one: str, other: str) -> list[float]:
        """The λ that two methods have in common, and of these as many as give most cells."""
        seeds = {
            rate: len(self.figure(one, rate).keys() & self.figure(other, rate).keys())
            for rate in self.both(one, other)
        }
        least = max(seeds.values(), key=lambda n: n * sum(k >= n for k in seeds.values()))
        return sorted(rate for rate, n in seeds.items() if n >= least)

    def both(self, one: str, other: str) -> list[float]:
        """The λ that two methods have in common."""
        return sorted({*self.rates(one)} & {*self.rates(other)})

    def length(self, row: Row) -> float:
        """1/(ηλ) in lengths of the run."""
        return 1 / (float(row["lr"]) * float(row["weight_decay"]) * self.steps)

    def lengths(self, method: str) -> dict[float, float]:
        """The same by λ."""
        return {
            rate: self.length(row)
            for (name, rate, _), row in self.cells.items()
            if name == method and rate
        }


def told(found: Interval, sign: bool = False, places: int = 2) -> str:
    if math.isnan(found.mean):
        return "–"
    reach = "" if math.isnan(found.half_width) else f" ± {found.half_width:.{places}f}"
    return f"{found.mean:{'+' if sign else ''}.{places}f}{reach}".replace("-", "−")


def mean(by_seed: Mapping[int, float], sign: bool = False, places: int = 2) -> str:
    return told(interval(list(by_seed.values())), sign, places)


def gap(one: Mapping[int, float], other: Mapping[int, float]) -> Interval:
    """The difference over the seeds that both have."""
    shared = [seed for seed in one if seed in other]
    return difference([one[s] for s in shared], [other[s] for s in shared]).interval


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def verdict(found: Interval, above: bool = True) -> str:
    low, high = found.mean - found.half_width, found.mean + found.half_width
    if math.isnan(low):
        return "too few seeds"
    return "yes" if (low > 0 if above else high < 0) else "no"


def settings(grid: Grid) -> None:
    rows = []
    for method in grid.methods():
        for rate in grid.rates(method):
            top1 = grid.figure(method, rate)
            seed = next(iter(top1))
            row = grid.cells[method, rate, seed]
            length = "–" if not rate else f"{grid.length(row):.2g}"
            left = percent(grid.mean(method, rate, "remaining"))
            rows.append((method, f"{rate:g}", length, len(top1), mean(top1),
                         f"{grid.mean(method, rate, grid.judge):.2f}", left,
                         number(grid.mean(method, rate, "balance")), row["state"] or "–",
                         percent(grid.mean(method, rate, "R_op"))))  # fmt: skip
    table(("method", "λ", "1/(ηλ) in runs", "seeds", "top-1", "validation", "left", "balance",
           "state", "mean R_op"), rows)  # fmt: skip


def helps(grid: Grid) -> None:
    base = grid.figure("baseline", 0.0)
    rows = []
    for method in grid.methods():
        if method == "baseline":
            continue
        rate = grid.best(method)
        found = gap(grid.figure(method, rate), base)
        rows.append((method, f"{rate:g}", told(found, sign=True), verdict(found)))
    table(("method", "best λ", "above baseline, points", "helps"), rows)


def compared(grid: Grid) -> None:
    rows = []
    for other in ("wd", "pwd", "falling"):
        if other in grid.methods():
            both = grid.both("lpwd", other)
            sides = (grid.figure(one, grid.best(one, both)) for one in ("lpwd", other))
            found = gap(*sides)
            rows.append((f"lpwd − {other}", told(found, sign=True), verdict(found)))
    table(("each at its best λ of those that both ran", "points", "better"), rows)


def lost(grid: Grid, method: str, shared: Sequence[float]) -> dict[int, float]:
    """By seed the mean over λ of what is lost against the best λ."""
    best = grid.figure(method, grid.best(method, shared))
    each = [grid.figure(method, rate) for rate in shared]
    return {
        seed: sum(best[seed] - one[seed] for one in each) / len(each)
        for seed in best
        if all(seed in one for one in each)
    }


def robust(grid: Grid) -> None:
    rows = []
    pairs = ("lpwd", "wd"), ("lpwd", "pwd"), ("falling", "pwd"), ("cautious", "wd")
    for one, other in pairs:
        if not {one, other} <= {*grid.methods()}:
            continue
        shared = grid.shared(one, other)
        sides = lost(grid, one, shared), lost(grid, other, shared)
        found = gap(*sides)
        rows.append((f"{one} − {other}", len(shared), *map(mean, sides), told(found, sign=True),
                     verdict(found, above=False)))  # fmt: skip
    table(("", "values of λ", "lost by the first", "by the second", "difference", "more robust"),
          rows)  # fmt: skip


def stale(grid: Grid) -> None:
    """What running statistics cost at each λ, and what decay costs without them."""
    base = grid.figure("baseline", 0.0)
    rows = []
    for method in ("baseline", "wd", "lpwd"):
        for rate in grid.rates(method):
            anew, running = (grid.figure(method, rate, n) for n in ("top1", "running_top1"))
            parts = (gap(running, anew), gap(anew, base))
            rows.append((method, f"{rate:g}", len(anew), mean(anew), mean(running),
                         *(told(part, sign=True) for part in parts)))  # fmt: skip
    table(("method", "λ", "seeds", "taken anew", "running", "the statistics' part",
           "the weights' part"), rows)  # fmt: skip


SCALES = ("lite0_adam", "lite1_adam", "lite2_adam")


def scale() -> None:
    """Whether the gain grows from one model to the next, at λ that all have."""
    grids = [Grid(name) for name in SCALES]
    rates = [r for r in grids[1].rates("wd") if all(r in g.rates("wd") for g in grids)]
    gains: dict[str, list[dict[int, float]]] = {"baseline": [], "wd": []}
    for grid in grids:
        mine = grid.figure("lpwd", grid.best("lpwd", rates))
        for other, found in gains.items():
            rate = grid.best(other, rates) if other != "baseline" else 0.0
            theirs = grid.figure(other, rate)
            found.append({seed: mine[seed] - theirs[seed] for seed in mine if seed in theirs})
    rows = []
    for other, found in gains.items():
        grown = gap(found[-1], found[0])
        rows.append((other, *(mean(one, sign=True) for one in found), told(grown, sign=True),
                     verdict(grown)))  # fmt: skip
    table(("gain of lpwd over", *(name.partition("_")[0] for name in SCALES), "lite2 − lite0",
           "grows"), rows)  # fmt: skip


def predictors(grid: Grid) -> None:
    rows = []
    for method in ("wd", "pwd", "lpwd"):
        found = []
        for name in PREDICTORS:
            by_seed = []
            for seed in {seed for m, _, seed in grid.cells if m == method}:
                pairs = [
                    (float(row[name] or "nan"), float(row[grid.score]))
                    for (m, _, s), row in grid.cells.items()
                    if (m, s) == (method, seed)
                ]
                pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
                constant = len({x for x, _ in pairs}) < 2
                if len(pairs) > 3 and not constant:
                    by_seed.append(float(spearmanr(*zip(*pairs, strict=True)).statistic))
            found.append(told(interval(by_seed), sign=True))
        rows.append((method, *found))
    table(("rank correlation with top-1", *("λ" if n == "weight_decay" else n for n in PREDICTORS)),
          rows)  # fmt: skip


def rules(grid: Grid) -> None:
    rates = grid.rates("wd")
    if not rates:
        return
    best = grid.figure("wd", grid.best("wd"))
    rows_of = {rate: next(r for (m, x, _), r in grid.cells.items() if (m, x) == ("wd", rate))
               for rate in rates}  # fmt: skip
    near = {
        f"1/(ηλ) nearest to {wanted:g} runs": min(
            rates, key=lambda r: abs(math.log(grid.length(rows_of[r]) / wanted))
        )
        for wanted in (10, 1, 0.3, 0.1)
    }
    near["`remaining` nearest to a half"] = min(
        rates, key=lambda r: abs(grid.mean("wd", r, "remaining") - 0.5)
    )
    balanced = [r for r in rates if grid.mean("wd", r, "balance") >= 0.5]
    if balanced:
        near["smallest λ of `balance` ≥ 0.5"] = min(balanced)
    rare = [r for r in rates if grid.mean("wd", r, "R_op") < 0.01]
    if rare:
        near["largest λ of mean R_op < 1 %"] = max(rare)
    rows = []
    for rule, rate in near.items():
        found = gap(best, grid.figure("wd", rate))
        usable = found.mean + found.half_width < 0.5 if rate != grid.best("wd") else True
        rows.append((rule, f"{rate:g}", told(found), "yes" if usable else "no"))
    table(("rule, for wd", "λ", "points below the best λ", "usable"), rows)


def shrunk(rows: Sequence[Row]) -> None:
    """Half-lives by zero-shot decay after fine-tuning, and what decay has moved them by."""
    found: dict[tuple[str, str, float], dict[int, float]] = {}
    for row in rows:
        setting = row["statistics"], row["method"], float(row["weight_decay"])
        found.setdefault(setting, {})[int(row["seed"])] = float(row["half_life"])
    table(("statistics", "method", "λ", "seeds", "half-life", "above baseline"),
          [(kind, method, f"{rate:g}", len(each), mean(each, places=4),
            told(gap(each, found[kind, "baseline", 0.0]), sign=True, places=4)
            if method != "baseline" else "–")
           for (kind, method, rate), each in found.items()])  # fmt: skip


MARKS = {"l2": "s", "wd": "o", "pwd": "^", "lpwd": "v", "falling": "D", "cautious": "P"}


def drawn(grid: Grid, folder: Path) -> None:
    """Top-1 by how long decay remembers, bars are 95 % intervals over seeds; beside it mean R_op,
    or top-1 by running statistics.
    """  # fmt: skip
    figure = new_figure(grid.name, width=8.4, height=3.6)
    sides = list(figure.subplots(1, 2))
    label = "1/(ηλ), lengths of the run: less memory to the right"
    names = ["test top-1, %"]
    if grid.has_both:
        names = ["top-1, statistics taken anew, %", "top-1, running statistics, %"]
    for axes, name, view in zip(sides, names, (grid, Grid(grid.name, running=True)), strict=False):
        base = interval(list(view.figure("baseline", 0.0).values()))
        axes.axhspan(base.mean - base.half_width, base.mean + base.half_width, color=INK, alpha=0.1)
        axes.axhline(base.mean, color=INK, linewidth=1, label="baseline")
        for method, x, style in _lines(grid):
            top1 = [interval(list(view.figure(method, rate).values())) for rate in x]
            bars = [0 if math.isnan(one.half_width) else one.half_width for one in top1]
            means = [one.mean for one in top1]
            axes.errorbar(list(x.values()), means, bars, capsize=2, **style)
        dress(axes, name, label).set(ylim=(0, 100))
    if not grid.has_both:
        for method, x, style in _lines(grid):
            rates = [100 * grid.mean(method, rate, "R_op") for rate in x]
            sides[1].plot(list(x.values()), rates, **style)
        dress(sides[1], "mean R_op, %", label).set(ylim=(0, None))
    for axes in sides:
        axes.set(xscale="log")
        axes.invert_xaxis()
    sides[0].legend(fontsize=8, frameon=False, loc="lower left")
    figure.savefig(folder / f"{grid.name}.png")


def _lines(grid: Grid) -> Iterator[tuple[str, Mapping[float, float], dict[str, Any]]]:
    """Of each method lengths by λ, and how its line looks."""
    for (method, mark), color in zip(MARKS.items(), SERIES, strict=True):
        lengths = grid.lengths(method)
        x = {rate: lengths[rate] for rate in grid.rates(method) if rate}
        if x:
            yield method, x, {
                "color": color, "marker": mark, "markersize": 5, "linewidth": 1, "label": method
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grids", nargs="*")
    parser.add_argument("--figures", type=Path)
    asked = parser.parse_args()
    names = asked.grids or [
        p.stem for p in sorted(HERE.glob("*.toml")) if p.with_suffix(".csv").exists()
    ]
    for name in names:
        if name.endswith("_falling"):
            continue
        grid = Grid(name)
        print(f"\n## {name}: {len(grid.cells)} cells")
        parts = (settings, helps, compared, robust, predictors, rules)
        for part in parts:
            part(grid)
        if grid.has_both:
            stale(grid)
            print(f"\n### {name}, by running statistics")
            for part in (helps, compared, robust, rules):
                part(Grid(name, running=True))
        if asked.figures and len(grid.rates("wd")) > 3:
            drawn(grid, asked.figures)
    if not asked.grids:
        print("\n## scale")
        scale()
        print("\n## lite0_zeroshot")
        shrunk(rows_of(HERE / "lite0_zeroshot.csv"))


if __name__ == "__main__":
    main()
