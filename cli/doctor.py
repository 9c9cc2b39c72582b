"""`wdprobe doctor`."""

import time
from dataclasses import asdict
from typing import Any

import typer
from rich.markup import escape

from wd_probe.tables import plain_table

from . import options as o
from .console import err, loading, out, to_stdout


@o.command()
def doctor(json: o.Json = False) -> None:
    """Check that the probe counts right on this machine, and say by which kernel and how fast.

    Exit code 1 if anything is wrong.
    """
    begun = time.perf_counter()
    with loading():
        from wd_probe.probe import checkup
        from wd_probe.probe.machine import machine
    here, found = machine(), []
    for device in checkup.devices():
        with err.status(f"counting on {device} ..."):
            found.append(checkup.checkup(device))
    missing = [f"{name} is not installed" for name, has in here.versions.items() if not has]
    result = {
        "command": "doctor",
        **asdict(here),
        "devices": [asdict(one) for one in found],
        "problems": [*missing, *(line for one in found for line in one.problems())],
        "seconds": time.perf_counter() - begun,
    }
    if json:
        to_stdout(result)
    else:
        _show(result)
    if result["problems"]:
        raise typer.Exit(1)


_SHOWN = ("wd-probe", "torch", "torchvision", "timm", "numpy")


def _show(result: dict[str, Any]) -> None:
    """The result of `wdprobe doctor` for a person."""
    versions = " · ".join(f"{name} {result['versions'].get(name)}" for name in _SHOWN)
    optional = result["optional"].items()
    has = [f"{name} {version}" for name, version in optional if version is not None]
    lacks = [name for name, version in optional if version is None]
    compiler, cache = result["compiler"], result["cache"]
    found = "none" if compiler["path"] is None else f"{compiler['path']} ({compiler['version']})"
    kept = f"{cache['folder']}, {cache['owner']}'s, mode {cache['mode']}"
    for title, told in (
        ("versions", f"Python {result['python']} · {versions}"),
        ("optional", ", ".join(has) or "none"),
        ("missing", ", ".join(lacks) or "nothing"),
        ("system", result["system"]),
        ("processor", _processor(result)),
        ("compiler", found),
        ("cache", "none" if cache["folder"] is None else kept),
    ):
        out.print(f"[bold]{title:<10}[/]{escape(told)}", soft_wrap=True)
    if cache["problem"]:
        out.print(f"every process compiles anew: {escape(cache['problem'])}", soft_wrap=True)
    for one in result["devices"]:
        _show_device(one)
    if not result["problems"]:
        out.print(f"\nAll is well; {result['seconds']:.0f} s.")
        return
    out.print("\n[bold]Wrong here[/]")
    for line in result["problems"]:
        out.print(f"• {escape(line)}", soft_wrap=True)


def _processor(result: dict[str, Any]) -> str:
    told = f"{result['cpu']} × {result['processors']}, torch's threads {result['threads']}"
    if (result["load"] or 0) <= result["processors"]:
        return told
    return f"{told}; {result['load']:.1f} processes want them: times tell little"


def _show_device(one: dict[str, Any]) -> None:
    why = "" if one["why_not"] is None else f": {one['why_not']}"
    named = f" ({one['name']})" if one["name"] else ""
    out.print(
        f"\n[bold]{one['device']}[/]{escape(named)} · float32 is counted by {one['kernel']}"
        f"{escape(why)}",
        soft_wrap=True,
    )
    weights = one["agreement"][0]["weights"]
    table = plain_table(f"Beside a float64 oracle, {weights:,} weights")
    for title in ("dtype", "keep", "by", "counts and sums", "sums off by"):
        table.add_column(title, justify="right" if title == "sums off by" else "left")
    for row in one["agreement"]:
        error = row["error"]
        table.add_row(
            row["dtype"], row["keep"], row["kernel"] or "–",
            "right" if row["problem"] is None else "[red]wrong[/]",
            f"{error:.0e}" if error == error else "–",
        )  # fmt: skip
    out.print(table)
    if one["untimed"]:
        out.print(f"not timed: {escape(one['untimed'])}")
        return
    table = plain_table(f"The probe's own work, {one['timed'] / 1e6:.1f} M float32 weights")
    for title in ("", "words a weight", "ms", "ns a weight", "of floor A"):
        table.add_column(title, justify="right" if title else "left")
    for row in one["pace"]:
        of_floor = f"{row['of_floor']:.2f}"
        table.add_row(
            row["what"], str(row["words"]), f"{row['ms']:.2f}", f"{row['ns_a_weight']:.3f}",
            "" if row is one["pace"][0] else of_floor,
        )  # fmt: skip
    out.print(table)
