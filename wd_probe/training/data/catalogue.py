"""Datasets by name: the embedded digits, and everything timm can name."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from torch import Tensor

from ...errors import InputError, counted, first_line, shown, shown_line
from .augment import AutoAugment
from .batches import Batch, Data
from .folders import EVALUATION, TRAINING, check_classes, class_map, splits
from .held import HeldBatches, fits, hold, resized
from .idx import with_idx_files
from .pictures import ReadAsRgb
from .streamed import stream

#: Image folders of one's own, by our name and by timm's for torchvision's.
_FOLDERS = ("folder", "torch/folder", "torch/image_folder")
#: Kinds of datasets whose splits have the names that their makers gave them.
_NAMED_SPLITS = ("hfds/", "hfids/", "wds/", "tfds/")
#: Datasets whose pictures mean something else when mirrored.
_NO_FLIP = ("digits", "mnist", "emnist", "qmnist", "kmnist", "svhn", "gtsrb")


def load_data(
    name: str,
    *,
    batch_size: int,
    img_size: int,
    device: torch.device,
    seed: int,
    data_dir: Path | None = None,
    download: bool = False,
    hflip: float | None = None,
    val_split: float = 0.0,
    train_samples: int | None = None,
    channels_last: bool = False,
    aa: str | None = None,
) -> Data:
    """Open a dataset.

    Args:
        name: ``digits`` (scikit-learn's 1,797 images, a fifth of them held out, by a split that no
            seed changes), or a dataset as timm names it: ``torch/cifar100``,
            ``torch/fashion_mnist``, ``hfds/...``, ``wds/...``, or ``folder`` for the image folder
            ``data_dir`` with ``train`` and ``validation`` (or ``val``, ``test``) below it, a folder
            for each class in both. The training folder's classes number those of the other.
        batch_size: images in a batch, over all processes.
        img_size: images are resized to this square.
        device: where batches are needed.
        seed: of shuffling and flips.
        data_dir: where it lies. For MNIST and its kin the folder with the four ``idx`` files,
            gzipped or not, will do too.
        download: let timm fetch it.
        hflip: probability of a horizontal flip; default 0.5, and 0 for digits and signs.
        val_split: share of the training images to hold out for validation, the same by every seed.
        train_samples: train on so many of the rest, the same by every seed.
        channels_last: memory format of the batches.
        aa: timm's policy of augmentations for training.

    Raises:
        InputError: an unknown name or policy, data that is not there, splits that are missing or
            whose classes differ, a split of data too large to hold.
    """
    if hflip is None:
        hflip = 0.0 if name.rpartition("/")[2].lower() in _NO_FLIP else 0.5
    augment = AutoAugment(aa, img_size) if aa else None
    generator = torch.Generator().manual_seed(seed)
    splits = _splits(name, img_size, data_dir, download)
    if splits is None:
        if val_split or train_samples:
            raise InputError(
                "--val-split and --train-samples need a dataset small enough to be held in memory"
            )
        train, test = _both(name, data_dir, download, batch_size, seed)
        return stream(name, train, test, batch_size, img_size, device, hflip, channels_last, aa)
    whole, tested = splits
    kept, held_out = _parted(whole, val_split, train_samples)

    def still(images: Tensor, labels: Tensor) -> HeldBatches:
        size = max(batch_size, 256)
        return HeldBatches(images, labels, size, device=device, channels_last=channels_last)

    return Data(
        name,
        int(torch.cat([whole[1], tested[1]]).max()) + 1,
        HeldBatches(
            *kept,
            batch_size,
            device=device,
            hflip=hflip,
            generator=generator,
            channels_last=channels_last,
            augment=augment,
        ),
        still(*tested),
        len(kept[0]),
        len(tested[0]),
        hflip,
        still(*held_out) if len(held_out[0]) else None,
        len(held_out[0]),
    )


def _parted(whole: Batch, val_split: float, train_samples: int | None) -> tuple[Batch, Batch]:
    """What is trained on and what is held out; one shuffled order serves every seed."""
    images, labels = whole
    if not val_split and train_samples is None:
        return whole, (images[:0], labels[:0])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out = order[: round(val_split * len(labels))]
    kept = order[len(held_out) :][:train_samples]
    if not len(kept) or (train_samples or 0) > len(kept):
        raise InputError(
            f"{counted(len(order) - len(held_out), 'training image')} left beside the validation "
            "split; "
            f"{f'{train_samples:,}' if train_samples else 'some'} are asked for"
        )
    return (images[kept], labels[kept]), (images[held_out], labels[held_out])


@functools.lru_cache(maxsize=2)  # a sweep opens the same data for every run
def _splits(
    name: str, img_size: int, data_dir: Path | None, download: bool
) -> tuple[Batch, Batch] | None:
    """Training and test images, decoded and resized; None where they are too many to hold."""
    if name == "digits":
        return _digits(img_size)
    train, test = _both(name, data_dir, download, 1, 0)
    try:
        count = len(train) + len(test)
    except TypeError:  # a stream
        return None
    if not fits(count, img_size):
        return None
    return hold(train, img_size), hold(test, img_size)


def _digits(img_size: int) -> tuple[Batch, Batch]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    if not fits(len(images), img_size):
        raise InputError(f"digits at {img_size}×{img_size} need too much memory; try --img-size 32")
    kept, held_out = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    pixels = torch.from_numpy(images.reshape(-1, 1, 8, 8) * (255 / 16)).round().to(torch.uint8)
    pixels, targets = resized(pixels, img_size), torch.from_numpy(labels).long()
    return (pixels[kept], targets[kept]), (pixels[held_out], targets[held_out])


def _both(
    name: str, data_dir: Path | None, download: bool, batch_size: int, seed: int
) -> tuple[Any, Any]:
    """The data to train and to test on, with the same number for the same class."""
    root = _root(name, data_dir, download)

    def opened(names: Sequence[str], folder: Path = root, **more: Any) -> Any:
        """The first split of these names that the dataset has."""
        shared = {"root": str(folder), "download": download, "batch_size": batch_size, "seed": seed}
        options = {"is_training": names is TRAINING, **shared, **more}
        refused: list[InputError] = []
        for split in names if name.startswith(_NAMED_SPLITS) else names[:1]:
            try:
                return _open(name, data_dir, {"split": split, **options})
            except InputError as error:
                refused.append(error)
        raise refused[0]

    if name in _FOLDERS:
        folders = splits(root)
        more = {"class_map": class_map(*folders), "search_split": False}
        return opened(TRAINING, folders[0], **more), opened(EVALUATION, folders[1], **more)
    train, test = opened(TRAINING), opened(EVALUATION)
    known, others = _classes(train), _classes(test)
    if isinstance(known, Mapping) and isinstance(others, Mapping) and dict(known) != dict(others):
        check_classes(f"{name}'s training split", known, "the split to test on", others)
        test.reader.class_to_idx = known
    return train, test


def _classes(dataset: Any) -> Any:
    reader = getattr(dataset, "reader", dataset)
    return getattr(reader, "class_to_idx", None)


def _root(name: str, data_dir: Path | None, download: bool) -> Path:
    kind, _, rest = name.rpartition("/")
    if kind and kind.split("/")[0] not in ("torch", "hfds", "hfids", "wds", "tfds"):
        raise InputError(
            f"unknown dataset {shown(name)}; use digits, torch/NAME, hfds/NAME, wds/NAME, "
            "or folder for the image folder --data-dir"
        )
    if not kind and name not in _FOLDERS:
        near = f"digits, folder or torch/{shown_line(name, 80)}"
        raise InputError(f"unknown dataset {shown(name)}; did you mean {near}?")
    if data_dir is not None and not data_dir.is_dir() and not download:
        raise InputError(f"data folder {data_dir} does not exist")
    if name in _FOLDERS and data_dir is None:
        raise InputError(f"--dataset {name} needs --data-dir")
    return Path() if data_dir is None else with_idx_files(rest.lower(), data_dir)


def _open(name: str, data_dir: Path | None, options: dict[str, Any]) -> Any:
    try:
        dataset = timm.data.create_dataset("" if name in _FOLDERS else name, **options)
    except Exception as error:
        if isinstance(error, AssertionError) and "Unknown" in str(error):
            raise InputError(f"timm knows no dataset {shown(name)}") from error
        raise InputError(
            f"dataset {shown(name)} cannot be read from {data_dir or '.'} "
            f"({first_line(error)}); give --data-dir, or --dataset-download where there is a "
            "network"
        ) from error
    if isinstance(dataset, timm.data.ImageDataset):
        dataset.reader = ReadAsRgb(dataset.reader)
    return dataset
