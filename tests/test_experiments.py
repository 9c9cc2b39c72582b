import numpy as np
import pytest
from PIL import Image

from tests.small import Silent
from wd_probe import InputError
from wd_probe.runs import figures
from wd_probe.runs.reading import read_run
from wd_probe.training.options import TrainOptions
from wd_probe.training.train import train


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
