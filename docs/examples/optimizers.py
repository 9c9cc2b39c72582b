"""Prints the tables of docs/optimizers.md: what weight decay does in every optimizer it can get.

python docs/examples/optimizers.py
"""

import importlib
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata

from wd_probe.training.survey import known_optimizers, survey


def names(package: str) -> list[str]:
    if package == "timm":
        return [name for name in known_optimizers() if "." not in name]
    if package == "torch":
        return [name for name in known_optimizers() if name.startswith("torch.optim.")]
    loaded = importlib.import_module(package)
    classes = {loaded.load_optimizer(name).__name__ for name in loaded.get_supported_optimizers()}
    return sorted(f"{package}.{name}" for name in classes if hasattr(loaded, name))


def table(package: str) -> Iterator[str]:
    rows = list(survey(names(package)))
    audited = [row for row in rows if not row.error]
    version = metadata.version(package).partition("+")[0]
    yield f"{package} {version}: {len(audited)} of {len(rows)} optimizers\n"
    yield "| optimizer | rule | × ηλ | remarks |"
    yield "|---|---|---|---|"
    for row in audited:
        remarks = "; ".join(row.remarks)
        yield f"| {row.name.rpartition('.')[2]} | {row.rule} | {row.multiple or '–'} | {remarks} |"
    if len(audited) < len(rows):
        yield "\nNot audited on this machine:\n"
    for row in rows:
        if row.error:
            yield f"- {row.name.rpartition('.')[2]}: {row.error}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for package in sys.argv[1:] or ("timm", "torch", "pytorch_optimizer"):
        print("\n".join(table(package)), end="\n\n")
