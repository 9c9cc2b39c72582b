"""Sides of a comparison that take turns, and what they cost."""

import statistics

from wd_probe.probe.checkup import alternate, clock

__all__ = ["alternate", "clock", "header", "milliseconds", "ratio", "row"]


def ratio(times, name, base):
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def milliseconds(times, name):
    return 1e3 * statistics.median(times[name])


def header(*titles):
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")


def row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
