"""Datasets too large to hold, through timm's loader."""

import itertools
from collections.abc import Iterator
from typing import Any

import timm.data
import torch

from ... import ranks
from ...errors import InputError, shown
from .augment import allow_no_bits
from .batches import Batch, Data


class LoaderBatches:
    """timm's loader, its batches moved to the device."""

    def __init__(self, loader: Any, device: torch.device, channels_last: bool) -> None:
        self.loader, self.device = loader, device
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.epochs = 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""
        return self.batches()

    def batches(self, skip: int = 0) -> Iterator[Batch]:
        """One epoch; batches left out are read all the same, since that draws random numbers."""
        for shuffling in (self.loader.dataset, getattr(self.loader, "sampler", None)):
            set_epoch = getattr(shuffling, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self.epochs)
        self.epochs += 1
        return self._moved(itertools.islice(iter(self.loader), skip, None))

    def _moved(self, loaded: Iterator[Batch]) -> Iterator[Batch]:
        for images, labels in loaded:
            moved = images.to(self.device, non_blocking=True, memory_format=self.format)
            yield moved, labels.to(self.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """How many epochs were begun."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.epochs = int(state["epochs"])


def stream(
    name: str,
    train: Any,
    test: Any,
    batch_size: int,
    img_size: int,
    device: torch.device,
    hflip: float,
    channels_last: bool,
    aa: str | None,
) -> Data:
    """A dataset too large to hold, through timm's loader with the same augmentation."""
    shared: dict[str, Any] = {
        "input_size": (3, img_size, img_size),
        "use_prefetcher": False,
        "num_workers": 2,
        "persistent_workers": False,  # they would carry random state from epoch to epoch
        "device": device,
    }
    train_loader = timm.data.create_loader(
        train,
        batch_size=batch_size // ranks.size(),
        is_training=True,
        distributed=ranks.size() > 1,
        hflip=hflip,
        color_jitter=0.0,
        auto_augment=aa,
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        **shared,
    )
    if aa:
        allow_no_bits(train_loader.dataset.transform)
    test_loader = timm.data.create_loader(
        _Part(test) if hasattr(test, "__getitem__") else test,  # timm itself splits streams
        batch_size=max(batch_size, 256),
        is_training=False,
        crop_pct=1.0,
        **shared,
    )
    reader = getattr(train, "reader", None)
    classes = getattr(reader, "class_to_idx", None) or getattr(train, "classes", None)
    if not classes:
        raise InputError(f"dataset {shown(name)} does not say how many classes it has")
    return Data(
        name,
        len(classes),
        LoaderBatches(train_loader, device, channels_last),
        LoaderBatches(test_loader, device, channels_last),
        len(train),
        len(test),
        hflip,
    )


class _Part(torch.utils.data.Subset[Any]):
    """This process's part of a dataset, each image in one part."""

    def __init__(self, whole: Any) -> None:
        super().__init__(whole, range(ranks.rank(), len(whole), ranks.size()))

    @property
    def transform(self) -> Any:
        """The whole dataset's."""
        return self.dataset.transform  # type: ignore[attr-defined]

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform  # type: ignore[attr-defined]
