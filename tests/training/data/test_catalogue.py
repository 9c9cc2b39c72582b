import pytest
import torch
from PIL import Image

from tests.training.datasets import open_data
from wd_probe import InputError
from wd_probe.training.data import held
from wd_probe.training.data.streamed import LoaderBatches


def test_digits_are_split_the_same_way_by_every_seed():
    first, second = open_data("digits", seed=0), open_data("digits", seed=1)
    assert (first.train_size, first.test_size, first.num_classes) == (1437, 360, 10)
    assert first.hflip == 0
    assert torch.equal(first.test.images, second.test.images)
    a, b = (next(iter(d.train)) for d in (first, second))
    assert a[0].shape == (16, 3, 32, 32)
    assert not torch.equal(a[1], b[1])
    images = next(iter(first.test))[0]
    assert first.test.images.dtype == torch.uint8
    mean = torch.tensor(held.IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    std = torch.tensor(held.IMAGENET_DEFAULT_STD).view(3, 1, 1)
    torch.testing.assert_close(images[0] * std + mean, first.test.images[0] / 255)


def test_digits_are_not_blown_up_without_end():
    with pytest.raises(InputError, match="digits at 1000000×1000000 need too much memory"):
        open_data("digits", img_size=10**6)


# timm's folder reader leaves the files it opens to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("streamed", [False, True])
def test_image_folders_held_or_through_timms_loader(tmp_path, monkeypatch, streamed):
    for split, count in (("train", 12), ("validation", 4)):
        for label, colour in (("cat", 255), ("dog", 0)):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (40 + k, 50), (colour, k, 0)).save(folder / f"{k}.png")
    if streamed:
        monkeypatch.setattr(held, "HELD_BYTES", 0)
    found = open_data("folder", data_dir=tmp_path, batch_size=6, img_size=16)
    assert (found.train_size, found.test_size, found.num_classes) == (24, 8, 2)
    assert isinstance(found.train, LoaderBatches) is streamed
    batches = list(found.train)
    assert len(batches) == len(found.train) == 4
    images, labels = next(iter(found.test))
    assert images.shape[1:] == (3, 16, 16)
    assert torch.equal(images[:, 0].mean((1, 2)) > 0, labels == 0)
