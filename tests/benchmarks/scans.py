"""What a zero-shot scan costs beyond its passes, what going by layer saves, scales in batches."""

import itertools

import torch
from torch.func import functional_call, vmap

from tests.benchmarks.probe import built
from tests.benchmarks.timing import alternate, clock, header, milliseconds, ratio, row
from wd_probe import half_life, layers, zero_shot_decay
from wd_probe.shrink.parts import PartScan
from wd_probe.shrink.scan import Shrunk


def batches_of(images, device):
    return torch.randn(images, 3, 32, 32, device=device).split(64)


def scan_cost(name, images, steps, rounds, device, *, compiled=False, amp=False):
    """Seconds of a scan and of as many bare passes over the same data, one beside each of its own.

    Two passes follow each other at every scale: the first is the scan's, the second is bare.
    """
    model = built(name).to(device).eval()
    called = torch.compile(model) if compiled else model
    batches = batches_of(images, device)
    times = {"bare": [], "scan": []}

    @torch.no_grad()
    def passes():
        total = 0
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                total = total + called(batch).float().sum()
        return float(total)

    def evaluate(_):
        found = passes()
        begun = clock(device)
        passes()
        times["bare"][-1] += clock(device) - begun
        return {"sum": found}

    passes()
    for _ in range(rounds):
        times["bare"].append(0.0)
        begun = clock(device)
        zero_shot_decay(model, evaluate, steps)
        times["scan"].append(clock(device) - begun - times["bare"][-1])
    return times, sum(p.numel() for p in model.parameters())


def part_cost(name, images, rounds, device):
    """A scan layer by layer with what does not change kept, against whole passes."""
    model = built(name).to(device)
    parts = {layer.name: layer.parameters for layer in layers(model)}
    batches = batches_of(images, device)
    scales = dict.fromkeys(parts, (0.8, 0.5, 0.2))

    def side(reuse):
        return lambda: PartScan(model, parts, reuse).run(
            batches, scales, lambda logits, _: logits.sum().reshape(1)
        )

    times = alternate({"whole": side(False), "kept": side(True)}, rounds, device, 0)
    return times, len(parts)


def batch_of_scales_cost(name, count, rounds, device):
    """Passes at several scales one after another, and as one pass under `torch.func.vmap`."""
    model = built(name).to(device).eval()
    batch = torch.randn(64, 3, 32, 32, device=device)
    scales = torch.linspace(1, 0.1, count, device=device)
    buffers = dict(model.named_buffers())

    def called(weights):
        return functional_call(model, (weights, buffers), (batch,))

    @torch.no_grad()
    def in_turn():
        with Shrunk(model) as shrunk:
            for scale in scales.tolist():
                shrunk.to(scale)
                model(batch)

    @torch.no_grad()
    def stacked():
        weights = {
            name: scales.view(-1, *[1] * p.ndim) * p.detach()
            for name, p in model.named_parameters()
        }
        vmap(called)(weights)

    return alternate({"in turn": in_turn, "stacked": stacked}, rounds, device, 1)


def half_life_cost(steps):
    """Evaluations that the half-life takes after a scan, over answers of every steepness."""
    counts = []
    for sharpness in (1, 2, 4, 8, 16, 32):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        calls = []

        def evaluate(m, sharpness=sharpness, calls=calls):
            calls.append(1)
            return {"top1": 1 - (1 - m.weight.item()) ** sharpness}

        curve = zero_shot_decay(model, evaluate, steps)
        scanned = len(calls)
        half_life(model, evaluate, curve, metric="top1", chance=0.0)
        counts.append(len(calls) - scanned)
    return max(counts)


def report(models, rounds, device, quick):
    """Print the tables."""
    header("scan", "bare passes, s", "scan, s", "ratio")
    faster = {"compiled": {"compiled": True}, "compiled, bf16": {"compiled": True, "amp": True}}
    ways = {"": {}} | (faster if device.type == "cuda" else {})
    sizes = [(64, 10)] if quick else [(256, 20), (1024, 5)]
    for name, (images, steps), (way, options) in itertools.product(models, sizes, ways.items()):
        times, weights = scan_cost(name, images, steps, rounds, device, **options)
        title = f"{name}, {weights / 1e6:.0f} M, {steps + 1} passes of {images}"
        row(f"{title}, {way}" if way else title,
            *(f"{milliseconds(times, side) / 1e3:.2g}" for side in ("bare", "scan")),
            f"{ratio(times, 'scan', 'bare'):.3f}")  # fmt: skip
    header("half-life after a scan", "evaluations, at most")
    for steps in (10, 100):
        row(f"{steps} steps", half_life_cost(steps))
    header("by layer, 3 scales", "whole passes, s", "kept, s", "ratio")
    for name in models:
        times, parts = part_cost(name, 64, 1 if quick else rounds, device)
        seconds = [f"{milliseconds(times, side) / 1e3:.2g}" for side in ("whole", "kept")]
        row(f"{name}, {parts} layers", *seconds, f"{ratio(times, 'kept', 'whole'):.2f}")
    count = 2 if quick else 4
    header(f"{count} scales, 64 images", "in turn, ms", "one batch of scales, ms", "ratio")
    for name in ("test_convnext", *models):
        times = batch_of_scales_cost(name, count, rounds, device)
        row(name, *(f"{milliseconds(times, side):.0f}" for side in ("in turn", "stacked")),
            f"{ratio(times, 'stacked', 'in turn'):.2f}")  # fmt: skip
