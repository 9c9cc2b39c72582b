"""The idx files of MNIST and its kin, gzipped or not, all in one folder."""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import Any

from ...cache import cache_dir
from ...runs.reading import damaged
from .held import HELD_BYTES

_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_SETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}


def with_idx_files(name: str, folder: Path) -> Path:
    """A root that torchvision accepts, for a folder that holds the idx files themselves.

    Debian's ``dataset-fashion-mnist`` has them gzipped in one folder; torchvision wants them
    unpacked under ROOT/FashionMNIST/raw. Unpacked copies are kept in the user's cache.
    """
    kept_as = _SETS.get(name)
    if kept_as is None or (folder / kept_as / "raw").is_dir():
        return folder
    found = {
        file: path
        for file in _FILES
        for path in (folder / file, folder / f"{file}.gz")
        if path.is_file()
    }
    if len(found) < len(_FILES):
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
