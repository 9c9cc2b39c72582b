"""What the probe costs, measured side by side in one run.

    python -m tests.benchmarks [--scans | --methods | --sweeps | --training] [--model NAME]

Prints Markdown tables. Every ratio is the median over rounds in which its two sides took turns.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from torch.nn import functional as F

from tests.benchmarks import training
from wd_probe import OpposingPenaltyProbe, WeightDecay, kernel, layers, zero_shot_decay
from wd_probe.experiments import sweeps
from wd_probe.experiments.options import TrainOptions
from wd_probe.hooks import StepHooks
from wd_probe.prefix import PartScan


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


def step_cost(model_name, batch_size, rounds, device):
    """A training step with the probe attached against the same step without it."""

    torch.manual_seed(0)
    model = timm.create_model(model_name, num_classes=10).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (batch_size,), device=device)

    def step():
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    probe = OpposingPenaltyProbe(model, optimizer)
    probe._hooks.remove()

    def probed():
        probe._hooks = StepHooks(optimizer, probe._before, probe._after, outermost=True)
        step()
        probe.flush()
        probe._hooks.remove()

    return alternate({"plain": step, "probed": probed}, rounds, device)


def method_cost(model_name, batch_size, rounds, device):
    """A training step by each method against the same step with AdamW's own decay."""

    def side(method):
        torch.manual_seed(0)
        model = timm.create_model(model_name, num_classes=10).to(device)
        own = method == "adamw"
        kind = torch.optim.AdamW if own else torch.optim.Adam
        optimizer = kind(model.parameters(), lr=1e-4, weight_decay=0.01 if own else 0.0)
        if not own:
            WeightDecay(model, optimizer, method, rate=0.01)

        def step():
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (batch_size,), device=device)
    names = ("adamw", "baseline", "l2", "wd", "rwd", "pwd", "lpwd")
    return alternate({name: side(name) for name in names}, rounds, device)


def methods(model_name, batch_size, rounds, device):
    times = method_cost(model_name, batch_size, rounds, device)
    print(f"\n| training step, {model_name}, batch {batch_size} | ms | of AdamW's |\n|---|---|---|")
    for name in times:
        title = "AdamW, its own decay" if name == "adamw" else f"Adam, {name}"
        print(f"| {title} | {milliseconds(times, name):.0f} | {ratio(times, name, 'adamw'):.3f} |")


def probe_floor(model_name, rounds, device):
    """The probe's own work against the bytes it must move: copy θ, read the copy and θ'."""
    torch.manual_seed(0)
    model = timm.create_model(model_name, num_classes=10).to(device)
    stepped = [p.detach() for p in model.parameters()]
    theta = [p + 1e-4 * torch.randn_like(p) for p in stepped]
    kept = [torch.empty_like(p) for p in stepped]

    def copy():
        torch._foreach_copy_(kept, theta)

    def read():
        for p, q in zip(kept, stepped, strict=True):
            p.sum()
            q.sum()

    def own():
        kernel.copy_all(kept, theta)
        kernel.tally_all([(p, q, 1e-6) for p, q in zip(kept, stepped, strict=True)])

    def floor():
        copy()
        read()

    times = alternate({"copy": copy, "read": read, "floor": floor, "probe": own}, rounds, device)
    passes = kernel._passes
    kernel._passes = lambda: None
    try:
        plain = alternate({"floor": floor, "probe": own}, max(3, rounds // 3), device, warm_up=1)
    finally:
        kernel._passes = passes
    return times, plain, sum(p.numel() for p in stepped)


def scan_cost(model_name, images, steps, rounds, device):
    """A scan against as many bare evaluation passes over the same data."""
    size = {"img_size": 32} if "vit" in model_name else {}
    model = timm.create_model(model_name, num_classes=10, **size).to(device).eval()
    batches = torch.randn(images, 3, 32, 32, device=device).split(64)

    @torch.no_grad()
    def evaluate(m):
        return {"sum": float(sum(m(batch).sum() for batch in batches))}

    def bare():
        for _ in range(steps + 1):
            evaluate(model)

    times = alternate(
        {"bare": bare, "scan": lambda: zero_shot_decay(model, evaluate, steps)}, rounds, device, 1
    )
    return times, sum(p.numel() for p in model.parameters())


def part_cost(model_name, images, rounds, device):
    """A scan layer by layer with what does not change kept, against whole passes."""
    model = timm.create_model(model_name, num_classes=10).to(device)
    parts = {layer.name: layer.parameters for layer in layers(model)}
    batches = torch.randn(images, 3, 32, 32, device=device).split(64)
    scales = dict.fromkeys(parts, (0.8, 0.5, 0.2))

    def side(reuse):
        return lambda: PartScan(model, parts, reuse).run(
            batches, scales, lambda logits, _: logits.sum().reshape(1)
        )

    return alternate({"whole": side(False), "kept": side(True)}, rounds, device, 0)


def scans(rounds, device):
    print("\n| scan | bare passes, s | scan, s | ratio |\n|---|---|---|---|")
    for name, images, steps in (("convnext_tiny", 256, 10), ("vit_base_patch16_224", 256, 10)):
        times, weights = scan_cost(name, images, steps, rounds, device)
        print(
            f"| {name}, {weights / 1e6:.0f} M, {steps + 1} passes of {images} "
            f"| {milliseconds(times, 'bare') / 1e3:.1f} | {milliseconds(times, 'scan') / 1e3:.1f} "
            f"| {ratio(times, 'scan', 'bare'):.3f} |"
        )
    print("\n| by layer, 3 scales | whole passes, s | kept, s | ratio |\n|---|---|---|---|")
    times = part_cost("convnext_tiny", 128, 1, device)
    print(
        f"| convnext_tiny, 20 layers | {milliseconds(times, 'whole') / 1e3:.1f} "
        f"| {milliseconds(times, 'kept') / 1e3:.1f} | {ratio(times, 'kept', 'whole'):.2f} |"
    )


class Silent:
    def begun(self, *_): ...

    def cell_started(self, cell): ...

    def cell_ended(self, cell, summary): ...


def timed_cell(run, *arguments):
    """Run a cell and leave beside it how long it took."""
    begun = time.perf_counter()
    summary = run(*arguments)
    Path(f"{summary['run']}.seconds").write_text(str(time.perf_counter() - begun))
    return summary


def sweep_cost(cells, runner, lanes):
    """Wall-clock seconds of a sweep, and of its cells alone where ``lanes`` of them run at once."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        sweeps.sweep(cells, Path(folder), Silent(), runner=runner)
        wall = time.perf_counter() - begun
        own = [float(path.read_text()) for path in Path(folder, "cells").glob("*.seconds")]
    assert len(own) == len(cells)
    return wall, sum(own) / lanes


def sweep_overheads(model_name):
    """In this process, then on Ray with one thread a cell; Ray's start stands apart."""
    from wd_probe.experiments import on_ray

    def cells(first, count):
        base = TrainOptions(model=model_name, method="wd", steps=20, every=10)
        return sweeps.grid(base, {"seed": range(first, first + count)})

    plain, task = sweeps.run_cell, on_ray._run
    sweeps.run_cell = lambda *arguments: timed_cell(plain, *arguments)
    sweep_cost(cells(0, 1), None, 1)
    print("\n| sweep | wall, s | its cells, s | overhead | start, s |\n|---|---|---|---|---|")
    wall, own = sweep_cost(cells(1, 6), None, 1)
    print(f"| 6 cells, in turn | {wall:.1f} | {own:.1f} | {wall / own - 1:.2%} | – |", flush=True)
    sweeps.run_cell = plain
    on_ray._run = lambda *arguments: timed_cell(task, *arguments)
    begun = time.perf_counter()
    with on_ray.OnRay() as runner:
        lanes = runner._room()
        wall, own = sweep_cost(cells(0, lanes), runner, lanes)
        start = time.perf_counter() - begun - own
        wall, own = sweep_cost(cells(lanes, 6 * lanes), runner, lanes)
    print(
        f"| {6 * lanes} cells on Ray, {lanes} at once | {wall:.1f} | {own:.1f} "
        f"| {wall / own - 1:.2%} | {start:.1f} |"
    )


def start_up(rounds):
    def run(*arguments):
        begun = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begun

    main = (
        "import sys; sys.argv = ['wdprobe', '--help']; from wd_probe.cli.main import main; main()"
    )
    return (
        statistics.median(run("-c", "pass") for _ in range(rounds)),
        statistics.median(run("-c", main) for _ in range(rounds)),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="convnext_tiny")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--methods", action="store_true", help="measure the decay methods")
    parser.add_argument("--training", action="store_true", help="measure training throughput")
    parser.add_argument("--scans", action="store_true", help="measure scans instead of the probe")
    parser.add_argument("--sweeps", action="store_true", help="measure what a sweep adds to cells")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(
        f"{name or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, timm {timm.__version__}, kernel "
        f"{'compiled' if kernel._passes() else 'plain'}, {options.rounds} rounds\n"
    )
    if options.training:
        training.report(options.model, options.batch_size[0], max(3, options.rounds // 5), device)
        return
    if options.methods:
        methods(options.model, options.batch_size[0], options.rounds, device)
        return
    if options.sweeps:
        sweep_overheads(options.model)
        return
    if options.scans:
        scans(max(3, options.rounds // 8), device)
        return
    print("| training step, 32×32 | plain, ms | probed at every step, ms | ratio |")
    print("|---|---|---|---|")
    for size in options.batch_size:
        times = step_cost(options.model, size, options.rounds, device)
        print(
            f"| {options.model}, batch {size} | {milliseconds(times, 'plain'):.0f} "
            f"| {milliseconds(times, 'probed'):.0f} | {ratio(times, 'probed', 'plain'):.3f} |"
        )
    times, plain, weights = probe_floor(options.model, 2 * options.rounds, device)
    print(f"\n| the probe's own work, {weights / 1e6:.1f} M float32 weights | ms | of the floor |")
    print("|---|---|---|")
    for title, side in (("copy θ", "copy"), ("read both", "read"), ("floor: both", "floor")):
        print(f"| {title} | {milliseconds(times, side):.1f} | |")
    for title, measured in (("probe", times), ("probe, no C compiler", plain)):
        print(
            f"| {title} | {milliseconds(measured, 'probe'):.1f} "
            f"| {ratio(measured, 'probe', 'floor'):.2f} |"
        )
    bare, help_ = start_up(9)
    print(f"\n| start-up | s |\n|---|---|\n| python -c pass | {bare:.2f} |")
    print(f"| wdprobe --help | {help_:.2f} |")


if __name__ == "__main__":
    main()
