"""`wdprobe zeroshot`."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from wd_probe.errors import InputError, counted
from wd_probe.tables import plain_table
from wd_probe.training.option import Option
from wd_probe.training.options import MODEL, ZeroshotOptions
from wd_probe.wording import half_life_cells, half_life_told, number

from . import options as o
from .ahead import check_ahead
from .console import loading, out, to_stdout
from .processes import process


@o.command("model", given=o.Fields(ZeroshotOptions()))
def zeroshot(
    model: Annotated[
        list[str] | None,
        Option("A timm model; may be given several times (default convnext_tiny).", MODEL),
    ] = None,
    run: Annotated[
        list[Path] | None,
        Option("A run folder: its model, data and weights; may be given several times.", MODEL),
    ] = None,
    *,
    given: o.Given[ZeroshotOptions],
    json: o.Json = False,
) -> None:
    """Scale a trained model's weights to zero without training, and evaluate on the way (Eq. 12).

    Without --run, --checkpoint or --pretrained the paper's Baseline is trained first, briefly.
    """
    subjects, several = _subjects(given, model or [], run or [])
    check_ahead(*subjects)
    with loading():
        from wd_probe.training.scan import compare, scan

        from .progress import ScanProgress
    summaries = []
    for subject in subjects:
        with ScanProgress() as progress:
            summaries.append(scan(subject, progress))
        if not json:
            _show(summaries[-1])
    if several and not process():
        compare(summaries, several)
    if json:
        all_of_them = {"command": "zeroshot", "models": summaries, "run": str(several)}
        to_stdout(all_of_them if several else summaries[0])
    elif several:
        show_comparison(summaries, several)
    if any("write_failure" in summary for summary in summaries):
        raise typer.Exit(1)


def _subjects(
    given: o.Given[ZeroshotOptions], models: list[str], runs: list[Path]
) -> tuple[list[ZeroshotOptions], Path | None]:
    """The options of each scan, and the folder of all where there are several."""
    if models and runs:
        raise InputError("--run brings its own model; give --model or --run")
    if "checkpoint" in given.typed and len(models) > 1:
        raise InputError("--checkpoint goes with one --model")
    subjects = [given.options(run=folder) for folder in runs]
    subjects += [given.options(model=name) for name in models]
    if len(subjects) < 2:
        return subjects or [given.options()], None
    from wd_probe.runs.folder import default_folder

    names = "-".join(models or [run.name for run in runs])[:60]
    folder = subjects[0].output or default_folder("zeroshot", names)
    numbered = enumerate(subjects, start=1)
    return [replace(one, output=folder / f"{place}") for place, one in numbered], folder


_METRICS = ("top1", "loss", "agreement", "kl")


def _show(summary: dict[str, Any]) -> None:
    """The result of `wdprobe zeroshot` for a person."""
    from wd_probe.shrink.scan_tables import curve_table

    out.print(
        f"\n[bold]Zero-shot decay[/] · {escape(summary['model'])} · {escape(summary['source'])}\n"
        f"{counted(summary['images'], 'image')} of {summary['img_size']}×{summary['img_size']}, "
        f"{counted(summary['classes'], 'class', 'classes')}"
    )
    out.print(
        curve_table(
            [(point["scale"], {k: point[k] for k in _METRICS}) for point in summary["curve"]]
        )
    )
    life, metric = summary["half_life"], summary["metric"].replace("top1", "top-1")
    if life is None or life != life:
        out.print(f"No half-life: {metric} starts at chance, or never loses half of what it has.")
    else:
        out.print(
            f"[bold]Half-life[/]: {metric} has lost half of what it had above chance at scale "
            f"[bold]{half_life_told(life, 4)}[/]."
        )
    _fragile(summary["parts"])
    _distorted(summary["distortion"])
    out.print(f"\nRun folder: {escape(summary['run'])}", soft_wrap=True)


def _fragile(parts: list[dict[str, Any]]) -> None:
    if not parts:
        return
    table = plain_table("Decayed alone, most fragile first")
    table.add_column("part", overflow="ellipsis", no_wrap=True, max_width=48)
    for title in ("half-life", "taken off", "weights"):
        table.add_column(title, justify="right")
    for part in parts[:12]:
        life = half_life_cells(part["half_life"])
        table.add_row(escape(part["name"]), *life, f"{part['weights']:,}")
    out.print()
    out.print(table)
    if len(parts) > 12:
        out.print(f"and {len(parts) - 12} more in summary.json")


def _distorted(found: list[dict[str, Any]]) -> None:
    known = [f for f in found if f["distortion"] is not None and f["distortion"] == f["distortion"]]
    if not known:
        return
    table = plain_table(f"Output distorted most at scale {known[0]['scale']:g}")
    table.add_column("layer", justify="right")
    table.add_column("name", overflow="ellipsis", no_wrap=True, max_width=48)
    table.add_column("1 − cos²", justify="right")
    table.add_column("norm ratio", justify="right")
    for layer in sorted(known, key=lambda f: -f["distortion"])[:5]:
        table.add_row(
            str(layer["index"]), escape(layer["name"]), f"{layer['distortion']:.2g}",
            number(layer["norm_ratio"]),
        )  # fmt: skip
    out.print()
    out.print(table)


def show_comparison(summaries: list[dict[str, Any]], folder: Path) -> None:
    """Half-lives of several models, most robust first."""
    table = plain_table()
    for title in ("model", "half-life", "taken off"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for summary in sorted(summaries, key=_half_life):
        named = escape(f"{summary['model']} · {summary['source']}")
        table.add_row(named, *half_life_cells(summary["half_life"], 4))
    out.print()
    out.print(table)
    out.print(f"Figure: {escape(str(folder / 'figures' / 'zeroshot.png'))}", soft_wrap=True)


def _half_life(summary: dict[str, Any]) -> float:
    """The half-life, or what is more than any where there is none."""
    life = summary["half_life"]
    return math.inf if life is None or life != life else life
