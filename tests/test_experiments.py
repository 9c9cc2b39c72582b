import gzip
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from wd_probe import InputError
from wd_probe.probe.records import ProfileRecord, Tally
from wd_probe.runs import figures
from wd_probe.runs import folder as runs
from wd_probe.runs.findings import findings, kind_of
from wd_probe.runs.reading import read_run
from wd_probe.training import data
from wd_probe.training.data import held
from wd_probe.training.data.streamed import LoaderBatches
from wd_probe.training.options import TrainOptions
from wd_probe.training.train import train

CPU = torch.device("cpu")


def open_data(name, **options):
    defaults = {"batch_size": 16, "img_size": 32, "device": CPU, "seed": 0}
    return data.load_data(name, **{**defaults, **options})


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


def test_held_batches_shuffle_flip_and_cover_everything():
    images = torch.arange(10 * 3 * 2 * 2, dtype=torch.uint8).view(10, 3, 2, 2)
    labels = torch.arange(10)
    plain = data.HeldBatches(images, labels, 4, device=CPU)
    assert torch.equal(torch.cat([y for _, y in plain]), labels)
    assert len(plain) == 3
    generator = torch.Generator().manual_seed(0)
    flipped = data.HeldBatches(images, labels, 5, device=CPU, hflip=1.0, generator=generator)
    pixels, seen = (torch.cat(part) for part in zip(*flipped, strict=True))
    assert sorted(seen.tolist()) == labels.tolist()
    assert torch.equal(pixels.flip(-1), torch.cat([x for x, _ in plain])[seen])
    unflipped = data.HeldBatches(images, labels, 4, device=CPU, generator=generator)
    assert len(unflipped) == 2


def write_idx(folder, name, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(folder / f"{name}.gz", "wb") as file:
        file.write(header + array.tobytes())


def test_gzipped_idx_files_in_one_folder_serve_as_fashion_mnist(tmp_path):
    """Debian's dataset-fashion-mnist has them so; torchvision alone says "Dataset not found"."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        pictures = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path, f"{part}-images-idx3-ubyte", pictures)
        write_idx(tmp_path, f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    found = open_data("torch/fashion_mnist", data_dir=tmp_path)
    assert (found.train_size, found.test_size, found.num_classes) == (40, 20, 10)
    assert found.hflip == 0.5
    assert open_data("torch/fashion_mnist", data_dir=tmp_path, hflip=0.0).hflip == 0
    images, labels = next(iter(found.test))
    assert images.shape == (20, 3, 32, 32)
    assert labels[:3].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


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


def test_layer_scales_are_named_in_the_findings():
    scales = Tally(1000, 400, 400, 0, 0.1, 10.0)
    rest = Tally(1_000_000, 1000, 990, 0, 0.001, 1000.0)
    told = findings(
        {"blocks.0.gamma": (1, scales), "blocks.0.conv.weight": (4, rest)},
        [ProfileRecord(1, (0.001, 0.01, 0.1), (5, 6, 9), 1000)],
        0.01,
    )
    assert told[0] == (
        "The layer scales `gamma` oppose 400 times as often as the rest; "
        "they are usually left undecayed."
    )
    assert told[-1] == (
        "With the same updates R_op would have been 0.5 % under λ = 0.001 and 0.9 % under "
        "λ = 0.1 (asked at 1 of the steps)."
    )
    nothing = Tally(10, 0, 0, 0, 0.0, 1.0)
    assert findings({"a.weight": (2, nothing)}, [], 0.01) == []


def test_kinds_of_tensors():
    assert kind_of("head.fc.bias", 1) == "biases"
    assert kind_of("norm.weight", 1) == "norm weights"
    assert kind_of("blocks.0.ls1.gamma", 1) == "layer scales `gamma`"
    assert kind_of("cls_token", 3) == "embeddings and tokens"
    assert kind_of("conv.weight", 4) == "matrices and kernels"


class Silent:
    def started(self, *_):
        pass

    def stepped(self, *_):
        pass

    def scored(self, *_):
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "one"
    train(
        TrainOptions(
            command="rop",
            every=1,
            model="test_convnext",
            batch_size=32,
            lr=1e-3,
            steps=6,
            output=path,
        ),
        Silent(),
    )
    return read_run(path)


def test_a_run_is_read_back(run):
    assert run.summary["steps"] == 6
    assert run.steps["step"] == [1, 2, 3, 4, 5, 6]
    assert len(run.layer_names) == len(run.summary["layers"])


@pytest.mark.parametrize("name", [name for name, _, _ in figures.ROP_FIGURES])
def test_every_figure_is_drawn_from_the_files_alone(run, name, tmp_path):
    drawn = figures.draw_training(run)[name]
    axes = drawn.axes[0]
    assert axes.lines or axes.images
    assert run.config["model"] in drawn.get_suptitle()
    figures.save({name: drawn}, tmp_path / "figures")
    with Image.open(tmp_path / "figures" / f"{name}.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    if name == "rop_by_layer":
        assert axes.images[0].get_array().shape == (len(run.layer_names), 6)


def test_a_run_cut_short_is_readable(run, tmp_path):
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((run.path / "config.json").read_bytes())
    lines = (run.path / "steps.csv").read_text().splitlines()
    (cut / "steps.csv").write_text("\n".join(lines[:3]) + "\n" + lines[3][:7])
    read = read_run(cut)
    assert read.summary is None
    assert read.steps["step"] == [1, 2]
    assert list(figures.draw_training(read)) == ["rop_over_steps"]


def test_damaged_runs_are_named(tmp_path):
    with pytest.raises(InputError, match=r"is no run folder: it has no config\.json"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        read_run(tmp_path)


def test_json_has_no_nan():
    assert runs.dumps({"a": math.nan, "b": [math.inf, 1.0]}) == '{"a": null, "b": [null, 1.0]}'


def test_default_folders_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = runs.default_folder("rop", "hf-hub:a/b")
    assert "/" not in first.name
    first.mkdir(parents=True)
    assert runs.default_folder("rop", "hf-hub:a/b") != first
