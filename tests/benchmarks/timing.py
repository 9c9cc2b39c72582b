"""Sides of a comparison that take turns, and what they cost."""

import statistics
import time

import torch


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def alternate(sides, rounds, device, warm_up=3):
    """Seconds of each callable, round by round, in an order that turns around every round."""
    times = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        names = list(sides) if number % 2 else list(reversed(sides))
        for name in names:
            begun = clock(device)
            sides[name]()
            taken = clock(device) - begun
            if number >= warm_up:
                times[name].append(taken)
    return times


def ratio(times, name, base):
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def milliseconds(times, name):
    return 1e3 * statistics.median(times[name])


def header(*titles):
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")


def row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
