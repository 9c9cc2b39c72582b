import torch

from tests.training.datasets import CPU
from wd_probe.training.data import HeldBatches


def test_held_batches_shuffle_flip_and_cover_everything():
    images = torch.arange(10 * 3 * 2 * 2, dtype=torch.uint8).view(10, 3, 2, 2)
    labels = torch.arange(10)
    plain = HeldBatches(images, labels, 4, device=CPU)
    assert torch.equal(torch.cat([y for _, y in plain]), labels)
    assert len(plain) == 3
    generator = torch.Generator().manual_seed(0)
    flipped = HeldBatches(images, labels, 5, device=CPU, hflip=1.0, generator=generator)
    pixels, seen = (torch.cat(part) for part in zip(*flipped, strict=True))
    assert sorted(seen.tolist()) == labels.tolist()
    assert torch.equal(pixels.flip(-1), torch.cat([x for x, _ in plain])[seen])
    unflipped = HeldBatches(images, labels, 4, device=CPU, generator=generator)
    assert len(unflipped) == 2
