"""How long short commands take in processes of their own, and what they import."""

import statistics
import subprocess
import sys
import time

from tests.benchmarks.timing import header, row

MAIN = "import sys; sys.argv = {}; from wd_probe.cli.main import main; main()"
EMPTY = (
    "import typer; app = typer.Typer(); app.command('a')(lambda: 0); app.command('b')(lambda: 0); "
    "app(['--help'])"
)
COMMANDS = {
    "python -c pass": "pass",
    "an empty Typer app's --help": EMPTY,
    "wdprobe --help": MAIN.format(["wdprobe", "--help"]),
    "wdprobe rop --lr -1": f"try: {MAIN.format(['wdprobe', 'rop', '--lr', '-1'])}\n"
    "except SystemExit: pass",
    "import torch": "import torch",
    "import torch, timm": "import torch, timm",
    "wdprobe audit --opt adamw": MAIN.format(["wdprobe", "audit", "--opt", "adamw"]),
    "wdprobe layers --model convnext_tiny": MAIN.format(
        ["wdprobe", "layers", "--model", "convnext_tiny"]
    ),
}
HEAVY = ("torch", "torch._dynamo", "torchvision", "timm", "numpy", "scipy", "sklearn",
         "matplotlib", "tensorboard", "rich", "typer")  # fmt: skip
SHOWN = f"import sys; print([n for n in {HEAVY} if n in sys.modules], file=sys.stderr)"


def run(code):
    """Seconds, and the heavy modules that were imported."""
    at_exit = f"import atexit; atexit.register(exec, {SHOWN!r}, {{}})"
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", f"{at_exit}\n{code}"], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - begun, done.stderr.splitlines()[-1]


def report(rounds):
    """Print the table."""
    times = {title: [] for title in COMMANDS}
    for number in range(rounds + 1):
        for title, code in COMMANDS.items():
            found = run(code)
            if number:  # the first reads files from the disk
                times[title].append(found)
    header("start-up", "s", "imported")
    for title, runs in times.items():
        names = runs[0][1].strip("[]").replace("'", "")
        row(title, f"{statistics.median(seconds for seconds, _ in runs):.2f}", names)
