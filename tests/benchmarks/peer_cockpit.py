"""Cockpit's UpdateSize beside the probe, on an MLP, one of the models Cockpit takes.

Cockpit 1.0.2 imports only where setuptools still has pkg_resources, so this runs in an environment
of its own:

    python -m venv VENV && VENV/bin/pip install 'setuptools<70' cockpit-for-pytorch numpy
    VENV/bin/python -m tests.benchmarks.peer_cockpit
"""

import statistics
import time
import warnings

import torch
from backpack import extend
from cockpit import Cockpit
from cockpit.quantities import UpdateSize
from cockpit.utils import schedules
from torch import nn

from wd_probe import OpposingPenaltyProbe

warnings.simplefilter("ignore")
BATCH, ROUNDS = 128, 60
IMAGES, LABELS = torch.randn(BATCH, 784), torch.randint(0, 10, (BATCH,))


def side(instrument):
    torch.manual_seed(0)
    sizes = ((784, 1024), (1024, 1024), (1024, 10))
    layers = [part for a, b in sizes for part in (nn.Linear(a, b), nn.ReLU())][:-1]
    model, loss_of = nn.Sequential(*layers), nn.CrossEntropyLoss()
    each = nn.CrossEntropyLoss(reduction="none")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    probe = OpposingPenaltyProbe(model, optimizer) if instrument == "wd_probe" else None
    cockpit, done = None, 0
    if instrument == "Cockpit":
        model, loss_of = extend(model), extend(loss_of)
        quantity = UpdateSize(track_schedule=schedules.linear(interval=1))
        cockpit = Cockpit(model.parameters(), quantities=[quantity])

    def step():
        nonlocal done
        logits = model(IMAGES)
        loss = loss_of(logits, LABELS)
        if cockpit is None:
            loss.backward()
        else:
            info = {"batch_size": BATCH, "individual_losses": each(logits, LABELS), "loss": loss,
                    "optimizer": optimizer}  # fmt: skip
            with cockpit(done, info=info):
                loss.backward(create_graph=cockpit.create_graph(done))
        optimizer.step()
        optimizer.zero_grad()
        if probe is not None:
            probe.flush()
        done += 1

    return step


def main():
    sides = {name: side(name) for name in ("none", "wd_probe", "Cockpit")}
    times = {name: [] for name in sides}
    for number in range(ROUNDS + 5):
        for name in sides if number % 2 else list(reversed(sides)):
            begun = time.perf_counter()
            sides[name]()
            if number >= 5:
                times[name].append(time.perf_counter() - begun)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {ROUNDS} rounds")
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, times["none"], strict=True))
        print(f"{name}: {1e3 * statistics.median(taken):.2f} ms, {ratio:.3f}")


if __name__ == "__main__":
    main()
