"""Training throughput: `wdprobe train`'s loop against timm's own, on the same model and images.

timm's side is what its train.py does without a GPU: `create_loader` with two workers decoding and
augmenting PIL images, its optimizer, forward, loss, backward, step. Ours keeps the images on the
device. On a GPU each further choice is measured on top of the last: bf16, channels-last, compile.
"""

import statistics
import time

import timm.data
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

from wd_probe.experiments.data import HeldBatches
from wd_probe.experiments.models import create_model
from wd_probe.experiments.training import Trainer, create_optimizer


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


def ours(name, images, labels, batch, device, *, amp=False, channels_last=False, compiled=False):
    data = HeldBatches(
        images, labels, batch, device=device, hflip=0.5, channels_last=channels_last,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    model = create_model(name, num_classes=10, img_size=32).to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    called = torch.compile(model) if compiled else model
    optimizer = create_optimizer(model, "adam", lr=1e-3, weight_decay=0.0, momentum=0.9)
    trainer = Trainer(called, optimizer, data, amp_dtype=torch.bfloat16 if amp else None)

    def epoch():
        return batch * sum(1 for _ in trainer.epoch(1, 1, len(data)))

    return epoch


def throughput(name, batch, rounds, device):
    """Images per second of each side, round by round, the sides taking turns."""
    images, labels = pictures(16 * batch if device.type == "cpu" else 64 * batch)
    given = (name, images, labels, batch, device)
    sides = {"timm's loop": timms(*given), "wdprobe train": ours(*given)}
    if device.type == "cuda":
        sides["+ bf16"] = ours(*given, amp=True)
        sides["+ channels-last"] = ours(*given, amp=True, channels_last=True)
        sides["+ compile"] = ours(*given, amp=True, channels_last=True, compiled=True)
    found = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, epoch in sides.items():
            begun = time.perf_counter()
            seen = epoch()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first starts workers and compiles
                found[side].append(seen / (time.perf_counter() - begun))
    return found


def report(name, batch, rounds, device):
    """Print the table."""
    found = throughput(name, batch, rounds, device)
    print(f"\n| training {name}, 32×32, batch {batch} | images/s | of timm's |\n|---|---|---|")
    for side, paces in found.items():
        ratio = statistics.median(a / b for a, b in zip(paces, found["timm's loop"], strict=True))
        print(f"| {side} | {statistics.median(paces):.0f} | {ratio:.2f} |")
