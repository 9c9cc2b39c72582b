"""Do weights turn as fast as equilibrium says? Three decay rates on the embedded digits.

    python docs/examples/equilibrium.py equilibrium.png

Trains timm's test_resnet (800 steps of AdamW, η = 1e-3) at λ = 0.01, 1 and 10, and draws, for every
kernel and the head, the angle of the last quarter of the steps over √(2c(1 − β)/(1 + β)). That
takes steps for related through β alone; so it prints, too, how alike steps are that lie 50 apart.
"""

import math
import sys
from collections import deque

import timm
import torch
from matplotlib import pyplot as plt
from torch.nn import functional as F

import wd_probe
from wd_probe.probe.dynamics import state
from wd_probe.training.data import load_data

LR, BETA, STEPS = 1e-3, 0.9, 800
RATES = (0.01, 1.0, 10.0)
APART, SAMPLE = 50, 2000


def measured(rate: float, steps: int) -> tuple[list[str], list[float]]:
    """The names of the weights, and of each its angle over the one that is predicted."""
    torch.manual_seed(0)
    data = load_data("digits", batch_size=64, img_size=32, device=torch.device("cpu"), seed=0)
    model = timm.create_model("test_resnet", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=rate, betas=(BETA, 0.999))
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    updates = {name: deque[torch.Tensor](maxlen=steps // 4) for name in weights}
    with wd_probe.OpposingPenaltyProbe(model, optimizer) as probe:
        while probe.steps < steps:
            for images, labels in data.train:
                F.cross_entropy(model(images), labels).backward()
                before = [p.detach().flatten()[:SAMPLE].clone() for p in weights.values()]
                optimizer.step()
                optimizer.zero_grad()
                for (name, p), old in zip(weights.items(), before, strict=True):
                    updates[name].append(p.detach().flatten()[:SAMPLE] - (1 - LR * rate) * old)
                if probe.steps == steps:
                    break
    names = list(weights)
    predicted = math.sqrt(2 * LR * rate * (1 - BETA) / (1 + BETA))
    late = probe.records[-(steps // 4) :]
    angles = [
        sum(r.tensors[name].angular_update for r in late) / len(late) / predicted for name in names
    ]
    for name, angle in zip(names, angles, strict=True):
        taken = torch.stack(tuple(updates[name]))
        alike = F.cosine_similarity(taken[APART:], taken[:-APART]).mean()
        print(f"  {name}: over prediction {angle:.2f}, cosine of steps {APART} apart {alike:.2f}")
    whole, last = probe.total, probe.late
    states = [state(whole.tensors[name], last.tensors[name]) for name in names]
    print(
        f"λ = {rate:g}: remaining {whole.total.remaining:.3g}, balance of the last quarter "
        f"{last.total.balance:.2f}, angle over prediction {min(angles):.2f} to {max(angles):.2f}",
        *(f"{states.count(one)} {one}" for one in sorted(set(states))),
        sep=", ",
    )
    return names, angles


def main(target: str, steps: int = STEPS) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axes.axhline(1, color="0.4", linewidth=1)
    for rate, mark, color in zip(RATES, "os^", ("0.65", "#e69f00", "#0072b2"), strict=True):
        names, angles = measured(rate, steps)
        places = range(1, len(names) + 1)
        axes.plot(places, angles, mark, color=color, label=f"λ = {rate:g}")
    axes.set(yscale="log", ylim=(0.01, 2), xlabel="weights, shallow to deep; the last is the head",
             ylabel="angle a step / equilibrium's")  # fmt: skip
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
