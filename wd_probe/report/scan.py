"""What a report page says of one zero-shot scan."""

from collections.abc import Mapping
from typing import Any

from ..errors import counted
from ..runs import figures
from ..runs.reading import Run
from ..wording import half_life_cells, half_life_told, percent
from .run import facts, is_number, status, with_data
from .values import number

_WORST = 8


def section(run: Run) -> dict[str, Any]:
    """What ``scan.html`` shows of a scan."""
    summary = run.summary or {"parts": (), "distortion": ()}
    return {
        "config": run.config,
        "status": status(run),
        "sentences": _findings(run),
        "figures": with_data(run, figures.draw_zeroshot([run])),
        "parts": [
            (str(part["name"]), *half_life_cells(part["half_life"]), f"{part['weights']:,}")
            for part in summary["parts"]
        ],
        "distorted": [
            (str(x["index"]), str(x["name"]), number(x["distortion"]), number(x["norm_ratio"]))
            for x in _distorted(summary)[:_WORST]
        ],
        "what_was_run": facts(run),
    }


def _findings(run: Run) -> list[str]:
    summary = run.summary
    if summary is None:
        points = counted(len(run.curve.get("step", ())), "point")
        return [f"The scan has not come to its end, or was killed: {points} on file."]
    metric, life = str(summary["metric"]).replace("top1", "top-1"), summary["half_life"]
    start = summary["curve"][0][summary["metric"]]
    found = [f"On {counted(summary['images'], 'image')} {metric} starts at {percent(start, 1)}."]
    if life:
        found.append(
            f"The half-life: {metric} has lost half of what it had above chance at scale "
            f"{half_life_told(life, 4)}."
        )
    else:
        found.append(f"There is no half-life: {metric} never loses half of what it had.")
    if norms := summary.get("batch_norms"):
        how = (
            "taken anew at each scale"
            if summary.get("update_bn")
            else "those of the undecayed weights throughout (`--update-bn` takes them anew)"
        )
        found.append(f"Statistics of its {counted(norms, 'batch norm')} were {how}.")
    if summary["parts"] and summary["parts"][0]["half_life"]:
        part = summary["parts"][0]
        found.append(
            f"Decayed alone, {part['name']} is the most fragile part: half of it is lost at scale "
            f"{half_life_told(part['half_life'])}."
        )
    bent = _distorted(summary)
    if bent:
        found.append(
            f"At scale {bent[0]['scale']:g} the output of layer {bent[0]['index']}, "
            f"{bent[0]['name']}, is distorted most: 1 − cos² = {number(bent[0]['distortion'])}."
        )
    return found


def _distorted(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    known = [layer for layer in summary["distortion"] if is_number(layer["distortion"])]
    return sorted(known, key=lambda layer: -layer["distortion"])
