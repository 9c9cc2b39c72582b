"""Images held on one device, decoded and resized once."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F

from ... import ranks
from ...errors import InputError, WdProbeWarning, counted, printable
from .batches import Batch

#: A dataset whose resized uint8 images need no more than this is kept on the device.
HELD_BYTES = 2 << 30


class HeldBatches:
    """Images held on one device as uint8, normalized as they are handed out.

    Args:
        images: uint8 (N, 3, H, W).
        labels: int64 (N,).
        batch_size: images in a batch, over all processes; the last one may be smaller in
            evaluation.
        device: where they are kept.
        hflip: probability of a horizontal flip.
        generator: shuffles and flips; None keeps the order and never flips.
        channels_last: memory format of the batches.
        mean: of each channel, in [0, 1]; default ImageNet's.
        std: likewise.
        augment: what is made of the images of each batch, as uint8.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        device: torch.device,
        hflip: float = 0.0,
        generator: torch.Generator | None = None,
        channels_last: bool = False,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch_size = min(batch_size, len(images))
        self.hflip, self.generator, self.augment = hflip, generator, augment
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self._mean, self._std = (
            255 * torch.tensor(list(values), device=device).view(1, 3, 1, 1)
            for values in (mean, std)
        )

    def __len__(self) -> int:
        """Batches in an epoch; a training epoch leaves out an incomplete last one."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (rest > 0 and self.generator is None)

    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""
        return self.batches()

    def batches(self, skip: int = 0) -> Iterator[Batch]:
        """One epoch without its first batches."""
        count, device = len(self.images), self.images.device
        order = None
        flips = torch.zeros(count, dtype=torch.bool)
        if self.generator is not None:
            order = torch.randperm(count, generator=self.generator).to(device)
            flips = torch.rand(count, generator=self.generator) < self.hflip
        return self._handed_out(skip, order, flips.to(device))

    def _handed_out(self, skip: int, order: Tensor | None, flips: Tensor) -> Iterator[Batch]:
        for number in range(skip, len(self)):
            start = number * self.batch_size
            stop = min(start + self.batch_size, len(self.images))
            start, stop = ranks.share(start, stop)
            if start == stop:
                continue
            chosen = slice(start, stop) if order is None else order[start:stop]
            images, flip = self.images[chosen], flips[start:stop].view(-1, 1, 1, 1)
            if self.generator is not None and self.hflip > 0:
                images = torch.where(flip, images.flip(-1), images)
            if self.augment is not None:
                images = self.augment(images)
            pixels = (images.float() - self._mean) / self._std
            yield pixels.contiguous(memory_format=self.format), self.labels[chosen]

    def state_dict(self) -> dict[str, Any]:
        """The state of its generator."""
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        if self.generator is not None:
            self.generator.set_state(state["generator"])


def fits(images: int, img_size: int) -> bool:
    """Whether so many images can be held."""
    return images * 3 * img_size**2 <= HELD_BYTES


def hold(dataset: Any, img_size: int) -> Batch:
    """A map-style dataset decoded once into uint8 images and labels.

    Pictures of files that cannot be read are left out, and a warning counts them.
    """
    pixels, labels = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    if isinstance(pixels, Tensor | np.ndarray) and labels is not None:
        images = torch.as_tensor(pixels)
        images = images.unsqueeze(1) if images.ndim == 3 else images.movedim(-1, 1)
        return resized(images, img_size), torch.as_tensor(labels).long()
    from torchvision.transforms import v2

    dataset.transform = v2.Compose(
        [v2.RGB(), v2.Resize(img_size), v2.CenterCrop(img_size), v2.PILToTensor()]
    )
    found: list[tuple[Tensor, int]] = []
    unreadable: list[str] = []
    for number in range(len(dataset)):
        if not hasattr(dataset, "reader"):
            found.append(dataset[number])
            continue
        try:  # timm itself would hand out the next one in the place of one that cannot be read
            found.append(_read(dataset, number))
        except Exception:  # a decoder raises what it likes over bytes it does not understand
            unreadable.append(_name(dataset, number))
    if unreadable:
        told = ", ".join(unreadable[:3]) + (", ..." if len(unreadable) > 3 else "")
        warnings.warn(
            f"{counted(len(unreadable), 'unreadable picture')} left out: {told}",
            WdProbeWarning,
            stacklevel=2,
        )
    if not found:
        raise InputError("none of the dataset's pictures can be read")
    return torch.stack([image for image, _ in found]), torch.tensor([label for _, label in found])


def _read(dataset: Any, number: int) -> tuple[Tensor, int]:
    from PIL import Image

    file, target, *_ = dataset.reader[number]
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dataset.transform(Image.open(file)), int(target)


def _name(dataset: Any, number: int) -> str:
    try:
        return printable(dataset.filename(number, basename=True))
    except Exception:  # a reader without names
        return f"number {number + 1}"


def resized(images: Tensor, img_size: int) -> Tensor:
    """uint8 (N, 1 or 3, h, w) to uint8 (N, 3, img_size, img_size), a thousand at a time."""
    parts = []
    for chunk in images.split(1000):
        if chunk.shape[-2:] != (img_size, img_size):
            size = (img_size, img_size)
            wide = F.interpolate(chunk.float(), size, mode="bilinear", antialias=True)
            chunk = wide.round().clamp(0, 255).to(torch.uint8)
        parts.append(chunk.expand(-1, 3, -1, -1))
    return torch.cat(parts)
