"""What the probe, the methods, scans, training, sweeps and start-up cost, side by side in one run.

    python -m tests.benchmarks [PART ...] [--quick] [--model NAME]

Prints Markdown tables. Every ratio is the median over rounds in which its sides took turns.
"""

import argparse
import platform

import timm
import torch

from tests.benchmarks import probe, scans, startup, sweeps, training
from wd_probe.probe import kernel

PARTS = ("probe", "exactness", "peers", "growth", "large", "methods", "scans", "training",
         "sweeps", "startup")  # fmt: skip
#: What `--quick` leaves out, as it takes minutes.
LONG = ("large", "methods", "training", "sweeps")
MODELS = ("convnext_tiny", "swin_tiny_patch4_window7_224", "vit_base_patch16_224")


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
        "large": lambda: probe.large(max(3, rounds // 3), device),
        "methods": lambda: training.methods(model, batch, rounds, device),
        "scans": lambda: scans.report(models, 3, device, quick),
        "training": lambda: training.report(
            "test_convnext", 128, max(3, rounds // 3), device, quick
        ),
        "sweeps": lambda: sweeps.report("test_convnext"),
        "startup": lambda: startup.report(1 if quick else 7),
    }
    for part in parts:
        tables[part]()


if __name__ == "__main__":
    main()
