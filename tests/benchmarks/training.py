"""Training: what methods cost, the pace beside timm's loop, what quickens it, models in a stack.

timm's side is what its train.py does: `create_loader` with two workers decoding and augmenting PIL
images, its optimizer, forward, loss, backward, step. Ours keeps the images on the device. Each
further choice is measured on top of the last.
"""

import timm
import timm.data
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from tests.benchmarks.timing import alternate, header, milliseconds, ratio, row
from wd_probe import WeightDecay
from wd_probe.training.data import HeldBatches
from wd_probe.training.loop import Trainer
from wd_probe.training.models import create_model


class Pictures(torch.utils.data.Dataset):
    """PIL images with labels, transformed as timm's loader asks."""

    def __init__(self, images, labels):
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.labels, self.transform = labels.tolist(), None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, k):
        return self.transform(self.images[k]), self.labels[k]


def pictures(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def timms(name, images, labels, batch, device):
    """One epoch of timm's loop; returns images trained on."""
    loader = timm.data.create_loader(
        Pictures(images, labels), (3, 32, 32), batch, is_training=True, hflip=0.5, scale=(1, 1),
        ratio=(1, 1), color_jitter=0, num_workers=2, device=device,
        use_prefetcher=device.type == "cuda",
    )  # fmt: skip
    model = create_model(name, num_classes=10, img_size=32).to(device).train()
    optimizer = create_optimizer_v2(model, "adam", lr=1e-3)

    def epoch():
        seen = 0
        for pixels, target in loader:
            loss = F.cross_entropy(model(pixels.to(device)), target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(target)
        return seen

    return epoch


def ours(
    name, images, labels, batch, device, *, amp=False, channels_last=False, fused=False,
    compiled=False, mode=None, compiled_step=False,
):  # fmt: skip
    data = HeldBatches(
        images, labels, batch, device=device, hflip=0.5, channels_last=channels_last,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    model = create_model(name, num_classes=10, img_size=32).to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    called = torch.compile(model, mode=mode) if compiled else model
    optimizer = create_optimizer_v2(model, "adam", lr=1e-3, fused=fused)
    if compiled_step:
        optimizer.step = torch.compile(optimizer.step)
    trainer = Trainer(called, optimizer, data, amp_dtype=torch.bfloat16 if amp else None)

    def epoch():
        return batch * sum(1 for _ in trainer.epoch(1, 1, len(data)))

    return epoch


def sides(device, quick):
    """What is tried beside `wdprobe train`, each on top of the last."""
    added = {"+ fused optimizer": {"fused": True}}
    if device.type == "cuda":
        added |= {
            "+ bf16": {"amp": True},
            "+ channels-last": {"channels_last": True},
            "+ compile": {"compiled": True},
            "+ compiled optimizer": {"compiled_step": True, "fused": False},
            "fused again, CUDA graphs": {
                "compiled_step": False, "fused": True, "mode": "reduce-overhead"
            },
        }  # fmt: skip
    elif not quick:
        added |= {
            "+ compile": {"compiled": True},
            "+ compiled optimizer": {"compiled_step": True, "fused": False},
        }
    together, found = {}, {}
    for title, options in added.items():
        together |= options
        found[title] = dict(together)
    return found


def throughput(name, batch, rounds, device, quick):
    """Seconds of an epoch of each side, round by round, the sides taking turns."""
    images, labels = pictures((16 if device.type == "cpu" else 64) * batch)
    given = (name, images, labels, batch, device)
    epochs = {"timm's loop": timms(*given), "wdprobe train": ours(*given)}
    for title, options in sides(device, quick).items():
        epochs[title] = ours(*given, **options)
    seen = {title: epoch() for title, epoch in epochs.items()}  # starts workers and compiles
    return alternate(epochs, rounds, device, warm_up=1), seen


def report(name, batch, rounds, device, quick):
    """Print the tables."""
    times, seen = throughput(name, batch, rounds, device, quick)
    header(f"training {name}, 32×32, batch {batch}", "images/s", "of timm's")
    for side in times:
        pace = 1e3 * seen[side] / milliseconds(times, side)
        share = 1 / ratio(times, side, "timm's loop")
        row(side, f"{pace:.0f}", f"{share:.2f}")
    stack(name, batch, 2 if quick else 4 if device.type == "cpu" else 16, rounds, device)


def stack(name, batch, count, rounds, device):
    """Training steps of several models one after another, and of all in one under `torch.func`."""
    models = [create_model(name, num_classes=10, img_size=32).to(device) for _ in range(count)]
    images = torch.randn(count, batch, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (count, batch), device=device)
    weights, buffers = stack_module_state(models)
    optimizer = torch.optim.Adam(weights.values(), lr=1e-3, fused=True)
    each = [torch.optim.Adam(model.parameters(), lr=1e-3, fused=True) for model in models]

    def loss(weights, buffers, images, labels):
        return F.cross_entropy(functional_call(models[0], (weights, buffers), (images,)), labels)

    gradients = vmap(grad(loss), randomness="different")

    def stacked():
        for key, gradient in gradients(weights, buffers, images, labels).items():
            weights[key].grad = gradient
        optimizer.step()

    def in_turn():
        for k, model in enumerate(models):
            F.cross_entropy(model(images[k]), labels[k]).backward()
            each[k].step()
            each[k].zero_grad()

    times = alternate({"in turn": in_turn, "stacked": stacked}, rounds, device)
    header(f"a step of {count} models {name}, batch {batch} each", "ms", "ratio")
    row("in turn", f"{milliseconds(times, 'in turn'):.0f}", "")
    row("stacked under torch.func", f"{milliseconds(times, 'stacked'):.0f}",
        f"{ratio(times, 'stacked', 'in turn'):.2f}")  # fmt: skip


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
