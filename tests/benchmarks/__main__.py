"""What the probe, the methods, scans, training, sweeps and start-up cost, side by side in one run.

    python -m tests.benchmarks [PART ...] [--quick] [--model NAME]

Prints Markdown tables. Every ratio is the median over rounds in which its sides took turns.
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

from tests.benchmarks import probe, training
from tests.benchmarks.timing import alternate, header, milliseconds, ratio, row
from wd_probe import WeightDecay, half_life, kernel, layers, zero_shot_decay
from wd_probe.experiments import sweeps
from wd_probe.experiments.options import TrainOptions
from wd_probe.prefix import PartScan


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


def scan_cost(model_name, images, steps, rounds, device):
    """A scan against as many bare evaluation passes over the same data."""
    model = probe.built(model_name).to(device).eval()
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
    model = probe.built(model_name).to(device)
    parts = {layer.name: layer.parameters for layer in layers(model)}
    batches = torch.randn(images, 3, 32, 32, device=device).split(64)
    scales = dict.fromkeys(parts, (0.8, 0.5, 0.2))

    def side(reuse):
        return lambda: PartScan(model, parts, reuse).run(
            batches, scales, lambda logits, _: logits.sum().reshape(1)
        )

    times = alternate({"whole": side(False), "kept": side(True)}, rounds, device, 0)
    return times, len(parts)


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


def scans(models, images, steps, rounds, device):
    header("scan", "bare passes, s", "scan, s", "ratio")
    for name in models:
        times, weights = scan_cost(name, images, steps, rounds, device)
        row(f"{name}, {weights / 1e6:.0f} M, {steps + 1} passes of {images}",
            f"{milliseconds(times, 'bare') / 1e3:.1f}", f"{milliseconds(times, 'scan') / 1e3:.1f}",
            f"{ratio(times, 'scan', 'bare'):.3f}")  # fmt: skip
    print(
        f"\nHalf-life after a scan of {steps} steps: at most {half_life_cost(steps)} evaluations."
    )
    header("by layer, 3 scales", "whole passes, s", "kept, s", "ratio")
    for name in models:
        times, parts = part_cost(name, max(32, images // 2), 1, device)
        seconds = [f"{milliseconds(times, side) / 1e3:.1f}" for side in ("whole", "kept")]
        row(f"{name}, {parts} layers", *seconds, f"{ratio(times, 'kept', 'whole'):.2f}")


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
    """Wall-clock seconds of short commands in processes of their own, and what they import."""
    main = "import sys; sys.argv = {}; from wd_probe.cli.main import main; main()"
    commands = {
        "python -c pass": "pass",
        "import torch": "import torch",
        "import torch, timm": "import torch, timm",
        "wdprobe --help": main.format(["wdprobe", "--help"]),
        "wdprobe audit --opt adamw": main.format(["wdprobe", "audit", "--opt", "adamw"]),
        "wdprobe layers --model convnext_tiny": main.format(
            ["wdprobe", "layers", "--model", "convnext_tiny"]
        ),
    }
    heavy = ("torch", "torch._dynamo", "torchvision", "timm", "numpy", "scipy", "sklearn",
             "matplotlib", "tensorboard", "rich", "typer")  # fmt: skip
    shown = f"; import sys; print([n for n in {heavy} if n in sys.modules], file=sys.stderr)"

    at_exit = f"import atexit; atexit.register(exec, {shown[2:]!r}, {{}})"

    def run(code):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", f"{at_exit}; {code}"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return time.perf_counter() - begun, done.stderr.splitlines()[-1]

    header("start-up", "s", "imported")
    times = {title: [] for title in commands}
    for _ in range(rounds):
        for title, code in commands.items():
            times[title].append(run(code))
    for title, runs in times.items():
        names = runs[0][1].strip("[]").replace("'", "")
        row(title, f"{statistics.median(seconds for seconds, _ in runs):.2f}", names)


PARTS = (
    "probe",
    "exactness",
    "peers",
    "growth",
    "inside",
    "methods",
    "scans",
    "training",
    "sweeps",
    "startup",
)
#: What `--quick` leaves out, as it takes minutes.
LONG = ("methods", "training", "sweeps")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which tables; default all")
    parser.add_argument("--model", default="convnext_tiny")
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, models and tables")
    options = parser.parse_args()
    quick = options.quick
    parts = options.parts or [part for part in PARTS if not (quick and part in LONG)]
    rounds = options.rounds or (5 if quick else 15)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(
        f"{name or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, timm {timm.__version__}, kernel "
        f"{'compiled' if kernel.cpu.passes() else 'plain'}, {rounds} rounds"
    )
    batch = options.batch_size or (64 if device.type == "cpu" else 512)
    model = options.model
    models = [model] if quick or model != "convnext_tiny" else list(MODELS)
    tables = {
        "probe": lambda: (
            probe.floor(model, 2 * rounds, device),
            probe.steps(models, [batch] if quick else [batch // 4, batch], rounds, device),
        ),
        "exactness": lambda: probe.exactness(1 if quick else 3, device),
        "peers": lambda: probe.peers(model, batch, rounds, device),
        "growth": lambda: (
            probe.growth(rounds, device, quick),
            None if quick else probe.every("test_convnext", batch, rounds, device),
        ),
        "inside": lambda: probe.inside(2_000_000 if quick else 28_000_000, rounds, device),
        "methods": lambda: methods(model, batch, rounds, device),
        "scans": lambda: scans(models, 64 if quick else 128, 10, 3, device),
        "training": lambda: training.report("test_convnext", 128, max(3, rounds // 3), device),
        "sweeps": lambda: sweep_overheads("test_convnext"),
        "startup": lambda: start_up(3 if quick else 7),
    }
    for part in parts:
        tables[part]()


MODELS = ("convnext_tiny", "swin_tiny_patch4_window7_224", "vit_base_patch16_224")


if __name__ == "__main__":
    main()
