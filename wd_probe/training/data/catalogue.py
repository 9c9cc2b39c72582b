"""Image classification data: the embedded digits, and everything timm can name."""

import functools
import gzip
import hashlib
import itertools
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import timm.data
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F

from ... import ranks
from ...errors import InputError, first_line
from ...probe.kernel.cpu import cache_dir
from ...runs.reading import damaged

#: A dataset whose resized uint8 images need no more than this is kept on the device.
HELD_BYTES = 2 << 30
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
#: Their decoders, and no others: PIL would run Ghostscript on a PostScript file of any name.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
#: Datasets whose pictures mean something else when mirrored.
_NO_FLIP = ("digits", "mnist", "emnist", "qmnist", "kmnist", "svhn", "gtsrb")
_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_IDX_SETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """Batches of (float32 images (B, 3, H, W), normalized; int64 labels (B,)), again and again."""

    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""
        ...

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def batches(self, skip: int = 0) -> Iterator[Batch]:
        """One epoch without its first batches; all it draws at random is drawn in this call."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What decides the epochs to come, beside the global random state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        ...


@dataclass(frozen=True, slots=True)
class Data:
    """A dataset ready for training: ``train`` shuffles and flips, the others do neither."""

    name: str
    num_classes: int
    train: Batches
    test: Batches
    train_size: int
    test_size: int
    hflip: float
    validation: Batches | None = None
    validation_size: int = 0


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
    ) -> None:
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch_size = min(batch_size, len(images))
        self.hflip, self.generator = hflip, generator
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
            pixels = (images.float() - self._mean) / self._std
            yield pixels.contiguous(memory_format=self.format), self.labels[chosen]

    def state_dict(self) -> dict[str, Any]:
        """The state of its generator."""
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        if self.generator is not None:
            self.generator.set_state(state["generator"])


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
) -> Data:
    """Open a dataset.

    Args:
        name: ``digits`` (scikit-learn's 1,797 images, a fifth of them held out, by a split that no
            seed changes), or a dataset as timm names it: ``torch/cifar100``,
            ``torch/fashion_mnist``, ``hfds/...``, ``wds/...``, or ``folder`` for the image folder
            ``data_dir`` with ``train`` and ``validation`` below it.
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

    Raises:
        InputError: an unknown name, data that is not there, a split of data too large to hold.
    """
    if hflip is None:
        hflip = 0.0 if name.rpartition("/")[2].lower() in _NO_FLIP else 0.5
    generator = torch.Generator().manual_seed(seed)
    splits = _splits(name, img_size, data_dir, download)
    if splits is None:
        if val_split or train_samples:
            raise InputError(
                "--val-split and --train-samples need a dataset small enough to be held in memory"
            )
        train, test = (
            _open(name, split, data_dir, download, batch_size, seed)
            for split in ("train", "validation")
        )
        return _streamed(name, train, test, batch_size, img_size, device, hflip, channels_last)
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
            f"{len(order) - len(held_out)} training images are left beside the validation split; "
            f"{train_samples or 'some'} are asked for"
        )
    return (images[kept], labels[kept]), (images[held_out], labels[held_out])


@functools.lru_cache(maxsize=2)  # a sweep opens the same data for every run
def _splits(
    name: str, img_size: int, data_dir: Path | None, download: bool
) -> tuple[Batch, Batch] | None:
    """Training and test images, decoded and resized; None where they are too many to hold."""
    if name == "digits":
        return _digits(img_size)
    train, test = (
        _open(name, split, data_dir, download, 1, 0) for split in ("train", "validation")
    )
    if not _can_be_held(train, test, img_size):
        return None
    return _held(train, img_size), _held(test, img_size)


def _digits(img_size: int) -> tuple[Batch, Batch]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    if len(images) * 3 * img_size**2 > HELD_BYTES:
        raise InputError(f"digits at {img_size}×{img_size} need too much memory; try --img-size 32")
    kept, held_out = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    pixels = torch.from_numpy(images.reshape(-1, 1, 8, 8) * (255 / 16)).round().to(torch.uint8)
    pixels, targets = _resized(pixels, img_size), torch.from_numpy(labels).long()
    return (pixels[kept], targets[kept]), (pixels[held_out], targets[held_out])


def _resized(images: Tensor, img_size: int) -> Tensor:
    """uint8 (N, 1 or 3, h, w) to uint8 (N, 3, img_size, img_size), a thousand at a time."""
    parts = []
    for chunk in images.split(1000):
        if chunk.shape[-2:] != (img_size, img_size):
            size = (img_size, img_size)
            wide = F.interpolate(chunk.float(), size, mode="bilinear", antialias=True)
            chunk = wide.round().clamp(0, 255).to(torch.uint8)
        parts.append(chunk.expand(-1, 3, -1, -1))
    return torch.cat(parts)


def _open(
    name: str, split: str, data_dir: Path | None, download: bool, batch_size: int, seed: int
) -> Any:
    kind, _, rest = name.rpartition("/")
    if kind and kind.split("/")[0] not in ("torch", "hfds", "hfids", "wds", "tfds"):
        raise InputError(
            f"unknown dataset {name!r}; use digits, torch/NAME, hfds/NAME, wds/NAME, "
            "or folder for the image folder --data-dir"
        )
    if not kind and name != "folder":
        raise InputError(f"unknown dataset {name!r}; did you mean digits, folder or torch/{name}?")
    if data_dir is not None and not data_dir.is_dir() and not download:
        raise InputError(f"data folder {data_dir} does not exist")
    if name == "folder" and data_dir is None:
        raise InputError("--dataset folder needs --data-dir")
    root = None if data_dir is None else str(_with_idx_files(rest.lower(), data_dir))
    try:
        dataset = timm.data.create_dataset(
            name if kind else "",
            root=root or ".",
            split=split,
            download=download,
            is_training=split == "train",
            batch_size=batch_size,
            seed=seed,
        )
    except Exception as error:
        if isinstance(error, AssertionError) and "Unknown" in str(error):
            raise InputError(f"timm knows no dataset {name!r}") from error
        raise InputError(
            f"dataset {name!r} cannot be read from {data_dir or '.'} "
            f"({first_line(error)}); give --data-dir, or --dataset-download where there is a "
            "network"
        ) from error
    return dataset


def _with_idx_files(name: str, folder: Path) -> Path:
    """A root that torchvision accepts, for a folder that holds the idx files themselves.

    Debian's ``dataset-fashion-mnist`` has them gzipped in one folder; torchvision wants them
    unpacked under ROOT/FashionMNIST/raw. Unpacked copies are kept in the user's cache.
    """
    kept_as = _IDX_SETS.get(name)
    if kept_as is None or (folder / kept_as / "raw").is_dir():
        return folder
    found = {
        file: path
        for file in _IDX_FILES
        for path in (folder / file, folder / f"{file}.gz")
        if path.is_file()
    }
    if len(found) < len(_IDX_FILES):
        return folder
    stamps = [
        f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
        for path in found.values()
    ]
    key = hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]
    raw = cache_dir() / "idx" / key / kept_as / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for file, path in found.items():
        target = raw / file
        if not target.exists():
            partial = target.with_suffix(".partial")
            reader = gzip.open if path.suffix == ".gz" else open
            try:
                with reader(path, "rb") as source, partial.open("wb") as sink:
                    _copy_idx(source, sink)
            except (OSError, EOFError, ValueError, zlib.error, struct.error) as error:
                partial.unlink(missing_ok=True)
                raise damaged(path, error) from error
            partial.replace(target)
    return raw.parent.parent


def _copy_idx(source: Any, sink: Any) -> None:
    """As many bytes as the header says, a part at a time; a file of fewer or more is refused."""
    head = source.read(4)
    if head[:3] != b"\0\0\x08" or head[3:] not in (b"\1", b"\3"):
        raise ValueError("it is no idx file of bytes")
    sizes = source.read(4 * head[3])
    left = math.prod(struct.unpack(f">{head[3]}I", sizes))
    if left > HELD_BYTES:
        raise ValueError(f"its header promises {left:,} bytes")
    sink.write(head + sizes)
    while part := source.read(min(left, 1 << 20)):
        sink.write(part)
        left -= len(part)
    if left or source.read(1):
        raise ValueError("it does not hold the bytes that its header promises")


def _can_be_held(train: Any, test: Any, img_size: int) -> bool:
    try:
        return (len(train) + len(test)) * 3 * img_size**2 <= HELD_BYTES
    except TypeError:
        return False


def _held(dataset: Any, img_size: int) -> Batch:
    """A map-style dataset decoded once into uint8 images and labels."""
    pixels, labels = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    if isinstance(pixels, Tensor | np.ndarray) and labels is not None:
        images = torch.as_tensor(pixels)
        images = images.unsqueeze(1) if images.ndim == 3 else images.movedim(-1, 1)
        return _resized(images, img_size), torch.as_tensor(labels).long()
    from torchvision.transforms import v2

    dataset.transform = v2.Compose(
        [v2.RGB(), v2.Resize(img_size), v2.CenterCrop(img_size), v2.PILToTensor()]
    )
    parts = [
        (images, torch.as_tensor(labels))
        for images, labels in torch.utils.data.DataLoader(dataset, batch_size=256)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]).long()


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


def _streamed(
    name: str,
    train: Any,
    test: Any,
    batch_size: int,
    img_size: int,
    device: torch.device,
    hflip: float,
    channels_last: bool,
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
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        **shared,
    )
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
        raise InputError(f"dataset {name!r} does not say how many classes it has")
    return Data(
        name,
        len(classes),
        LoaderBatches(train_loader, device, channels_last),
        LoaderBatches(test_loader, device, channels_last),
        len(train),
        len(test),
        hflip,
    )


def load_images(folder: Path, img_size: int, most: int | None = None) -> tuple[Tensor, list[str]]:
    """Every picture below a folder: resized by the shorter side, center-cropped.

    Args:
        folder: looked through with all its subfolders.
        img_size: side of the square.
        most: take no more than so many, in the order of their names.

    Returns:
        uint8 (N, 3, img_size, img_size), and the names of files that look like pictures but cannot
        be read; those are left out.

    Raises:
        InputError: no such folder, or no readable picture in it.
    """
    from PIL import Image
    from torchvision.transforms import v2

    if not folder.is_dir():
        raise InputError(f"image folder {folder} does not exist")
    prepare = v2.Compose([v2.Resize(img_size), v2.CenterCrop(img_size), v2.PILToTensor()])
    pictures: list[Tensor] = []
    unreadable: list[str] = []
    found = (p for p in folder.rglob("*") if p.suffix.lower() in _PICTURES and p.is_file())
    for path in sorted(found):
        if most is not None and len(pictures) >= most:
            break
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=_FORMATS) as picture:
                    resized = img_size**2 * max(picture.size) / min(picture.size)
                    if resized > (Image.MAX_IMAGE_PIXELS or math.inf):
                        raise ValueError("too narrow")
                    pictures.append(prepare(picture.convert("RGB")))
        except Exception:  # a decoder raises what it likes over bytes it does not understand
            unreadable.append(str(path.relative_to(folder)))
    if not pictures:
        raise InputError(
            f"image folder {folder} holds no readable picture"
            + (f" ({len(unreadable)} unreadable, {unreadable[0]} first)" if unreadable else "")
        )
    return torch.stack(pictures), unreadable
