import numpy as np
import pytest
from PIL import Image

from tests.training.datasets import open_data
from wd_probe import InputError, WdProbeWarning

SHADES = {"ant": 10, "bee": 90, "cat": 170, "dog": 250}


def write(folder, **splits):
    """Pictures whose shade tells their class: splits by name, each a list of classes."""
    for split, classes in splits.items():
        for label in classes:
            where = folder / split / label
            where.mkdir(parents=True, exist_ok=True)
            for k in range(2):
                Image.new("L", (8, 8), SHADES[label.lower()] + k).save(where / f"{k}.png")
    return folder


def opened(folder, **options):
    return open_data("folder", data_dir=folder, batch_size=8, img_size=8, hflip=0, **options)


def shades(batches):
    """The shade of each label's first picture."""
    return {
        int(label): int(image[0, 0, 0]) // 10 * 10
        for image, label in zip(batches.images, batches.labels, strict=True)
    }


@pytest.mark.parametrize("name", ["folder", "torch/folder", "torch/image_folder"])
@pytest.mark.parametrize("left_out", [["ant"], ["bee"], ["ant", "cat"], []])
def test_a_class_that_the_test_set_lacks_shifts_no_label(tmp_path, left_out, name):
    kept = [label for label in SHADES if label not in left_out]
    write(tmp_path, train=list(SHADES), val=kept)
    found = open_data(name, data_dir=tmp_path, batch_size=8, img_size=8, hflip=0)
    assert found.num_classes == 4
    assert shades(found.train) == {0: 10, 1: 90, 2: 170, 3: 250}
    assert shades(found.test) == {k: v for k, v in enumerate(SHADES.values())
                                  if v not in {SHADES[name] for name in left_out}}  # fmt: skip


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("more", [{}, {"streamed": True}])
def test_a_class_that_training_lacks_is_refused(tmp_path, monkeypatch, more):
    if more:
        monkeypatch.setattr("wd_probe.training.data.held.HELD_BYTES", 0)
    write(tmp_path, train=["ant", "cat"], validation=["ant", "bee", "cat", "dog"])
    with pytest.raises(InputError, match=(
        r"validation has classes that .*train lacks: bee, dog \(it has ant, cat\); their images "
        "have no label"
    )):  # fmt: skip
        opened(tmp_path)


def test_class_names_in_another_case_are_other_classes(tmp_path):
    write(tmp_path, train=["ant", "bee"], val=["Ant", "bee"])
    with pytest.raises(InputError, match="lacks: Ant"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "val"), ("Train", "Validation"), ("TRAINING", "valid"), ("train", "test"),
     ("Training", "Testing"), ("train", "eval")],
)  # fmt: skip
def test_splits_have_timms_and_torchvisions_names_in_any_case(tmp_path, train, test):
    write(tmp_path, **{train: ["ant", "bee"], test: ["bee"]})
    found = opened(tmp_path)
    assert (found.train_size, found.test_size) == (4, 2)
    assert shades(found.test) == {1: 90}


def test_a_validation_folder_goes_before_a_test_folder(tmp_path):
    write(tmp_path, train=["ant", "bee"], test=["ant"], val=["bee"])
    assert shades(opened(tmp_path).test) == {1: 90}


@pytest.mark.parametrize(
    ("splits", "told"),
    [
        ({"ant": [""], "bee": [""]}, "it has ant, bee"),
        ({"train": ["ant"]}, "it has train"),
        ({"val": ["ant"], "images": ["ant"]}, "it has images, val"),
        ({}, "it has no folders"),
    ],
)
def test_without_both_splits_nothing_is_trained_on_its_own_test_set(tmp_path, splits, told):
    for split, classes in splits.items():
        for label in classes:
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / split / label / "a.png")
    with pytest.raises(InputError, match=r"needs a folder train and one of validation, val, test"):
        opened(tmp_path)
    with pytest.raises(InputError, match=told):
        opened(tmp_path)


def test_two_folders_of_one_name_in_two_cases_are_refused(tmp_path):
    write(tmp_path, train=["ant"], Train=["ant"], val=["ant"])
    with pytest.raises(InputError, match="has Train, train; keep one of them"):
        opened(tmp_path)


def test_images_outside_of_classes_and_empty_folders_are_refused(tmp_path):
    write(tmp_path, train=["ant", "bee"], val=["ant", "bee"])
    Image.new("L", (8, 8)).save(tmp_path / "train" / "loose.png")
    with pytest.raises(InputError, match=r"train holds images outside of the folders of classes"):
        opened(tmp_path)
    (tmp_path / "train" / "loose.png").rename(tmp_path / "val" / "loose.png")
    with pytest.raises(InputError, match=r"val holds images outside of the folders of classes"):
        opened(tmp_path)
    for file in (tmp_path / "val").rglob("*.png"):
        file.unlink()
    with pytest.raises(InputError, match=r"val holds no images"):
        opened(tmp_path)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_wide_pictures_are_scaled_and_unreadable_ones_counted(tmp_path, monkeypatch, streamed):
    write(tmp_path, train=["ant", "bee"], val=["ant", "bee"])
    for split in ("train", "val"):
        wide = np.full((8, 8), 257 * 40, np.uint16)
        Image.fromarray(wide).save(tmp_path / split / "ant" / "wide.png")
    if streamed:
        monkeypatch.setattr("wd_probe.training.data.catalogue.fits", lambda *_: False)
        found = opened(tmp_path)
        images = next(iter(found.test.batches()))[0]
        white = 255
    else:
        (tmp_path / "val" / "bee" / "broken.png").write_bytes(b"\x89PNG")
        with pytest.warns(WdProbeWarning, match="1 unreadable picture left out: broken.png"):
            found = opened(tmp_path)
        assert (found.train_size, found.test_size) == (5, 5)
        assert sorted(found.test.images[:, 0, 0, 0].tolist()) == [10, 11, 40, 90, 91]
        return
    mean, std = 255 * 0.485, 255 * 0.229
    red = (images[:, 0, 0, 0] * std + mean).round().int()
    assert sorted(red.tolist()) == [10, 11, 40, 90, 91]
    assert white not in red
