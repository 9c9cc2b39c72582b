import gzip
import struct

import pytest

from tests.training.datasets import idx_files, open_data
from wd_probe import InputError
from wd_probe.cache import cache_dir


def test_gzipped_idx_files_in_one_folder_serve_as_fashion_mnist(tmp_path):
    """Debian's dataset-fashion-mnist has them so; torchvision alone says "Dataset not found"."""
    idx_files(tmp_path)
    found = open_data("torch/fashion_mnist", data_dir=tmp_path)
    assert (found.train_size, found.test_size, found.num_classes) == (40, 20, 10)
    assert found.hflip == 0.5
    assert open_data("torch/fashion_mnist", data_dir=tmp_path, hflip=0.0).hflip == 0
    images, labels = next(iter(found.test))
    assert images.shape == (20, 3, 32, 32)
    assert labels[:3].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


NAME = "t10k-images-idx3-ubyte.gz"
HEAD = struct.pack(">HBB3I", 0, 8, 3, 20, 28, 28)
IDX = {
    "bomb": gzip.compress(HEAD + bytes(200 << 20), 1),
    "promises more": gzip.compress(HEAD + bytes(100)),
    "promises all": gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 9)),
    "floats": gzip.compress(struct.pack(">HBB3I", 0, 13, 3, 20, 28, 28) + bytes(15680)),
    "cut": gzip.compress(HEAD + bytes(15680))[:-30],
    "no gzip": HEAD,
    "header cut": gzip.compress(HEAD[:6]),
    "empty": b"",
}


@pytest.mark.parametrize("case", IDX)
def test_damaged_idx_files(tmp_path, case):
    idx_files(tmp_path)
    (tmp_path / NAME).write_bytes(IDX[case])
    with pytest.raises(InputError, match=f"{NAME} is damaged: ") as told:
        open_data("torch/fashion_mnist", data_dir=tmp_path)
    assert str(told.value).isprintable()
    kept = list((cache_dir() / "idx").rglob("*.partial"))
    assert kept == []
