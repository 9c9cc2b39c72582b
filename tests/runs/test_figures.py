import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.ticker import PercentFormatter
from PIL import Image

from wd_probe.runs import figures
from wd_probe.runs.reading import Run, read_run
from wd_probe.runs.schema import TABLES

OLD = Path(__file__).parents[1] / "data/first_layout"
NAN = math.nan
CONFIG = {
    "model": "convnext_tiny", "dataset": "digits", "opt": "adamw", "method": "lpwd", "lr": 0.001,
    "weight_decay": 0.05, "batch_size": 64, "source": "checkpoint a.pt", "by": "layer",
    "parts": ["stem", "head"],
}  # fmt: skip


def run(summary=None, names=("stem", "head"), config=CONFIG, **tables):
    tables = {name: tables.get(name, {}) for name in TABLES}
    return Run(Path("run"), config, summary, tuple(names), **tables)


def in_percent(axis):
    return isinstance(axis.get_major_formatter(), PercentFormatter)


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def points(line):
    return [tuple(map(float, pair)) for pair in line.get_xydata()]


# --- R_op -----------------------------------------------------------------------------------------


def test_opposing_rate_draws_share_of_weights_over_share_of_penalty():
    steps = {"step": [1, 2, 3, 4], "rate": [0.1, NAN, 0.3, 0.2], "mass": [0.01, NAN, 0.02, 0.04]}
    figure = figures.opposing_rate(run(steps=steps))
    upper, lower = figure.axes
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("share of weights", "share of Σ|P|")
    assert lower.get_xlabel() == "step"
    assert points(upper.lines[0]) == [(1, 0.1), (3, 0.3), (4, 0.2)]
    assert points(lower.lines[0]) == [(1, 0.01), (3, 0.02), (4, 0.04)]
    assert labels(upper) == ["each step", "smoothed"]
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["max 30 %", "max 4 %"]
    assert upper.texts[0].xy == (3, 0.3)
    assert upper.collections[0].get_offsets().tolist() == [[3, 0.3]]
    assert in_percent(upper.yaxis)
    assert upper.yaxis.get_major_formatter().xmax == 1
    assert upper.get_ylim()[0] == 0
    title = figure.get_suptitle()
    assert title.splitlines() == [
        "Opposing-penalty rate",
        "convnext_tiny on digits · adamw · lpwd · η 0.001 · λ 0.05 · batch 64",
    ]


def test_a_run_of_no_measured_step_and_of_one():
    nothing = figures.opposing_rate(run(steps={"step": [1], "rate": [NAN], "mass": [NAN]}))
    assert [len(line.get_xdata()) for line in nothing.axes[0].lines] == [0]
    assert not nothing.axes[0].texts
    one = figures.opposing_rate(run(steps={"step": [7], "rate": [0.5], "mass": [0.5]}))
    assert labels(one.axes[0]) == ["each step"]


def test_layer_heatmap_puts_each_value_at_its_layer_and_step():
    layers = {"step": [1, 1, 2, 2, 3], "index": [1, 2, 2, 1, 2], "rate": [0.1, 0.2, 0.4, NAN, 0.6]}
    figure = figures.layer_heatmap(run(layers=layers))
    axes, bar = figure.axes
    (image,) = axes.images
    assert image.get_array().filled(-1).tolist() == [[0.1, -1, -1], [0.2, 0.4, 0.6]]
    assert image.get_extent() == [0.5, 3.5, 2.5, 0.5]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1 stem", "2 head"]
    assert axes.get_ylabel() == "layer (1 = shallowest)"
    assert bar.get_ylabel() == "opposing penalties"
    assert image.get_clim()[0] == 0
    assert 0.5 < image.get_clim()[1] <= 0.6


def test_of_many_layers_some_are_named_and_one_extreme_does_not_set_the_colours():
    count = 1000
    layers = {"step": [1] * count, "index": list(range(1, count + 1)), "rate": [0.01] * count}
    layers["rate"][3] = 1.0
    names = [f"block {k}" for k in range(count)]
    figure = figures.layer_heatmap(run(layers=layers, names=names))
    shown = figure.axes[0].get_yticklabels()
    assert len(shown) == 40
    assert shown[1].get_text() == "26 block 25"
    assert figure.axes[0].images[0].get_clim()[1] == pytest.approx(0.01)


def test_maps_of_uneven_steps_keep_the_largest_and_fill_what_is_between():
    steps = np.array([1.0, 2.0, 3.0, 4.0, 8.0])
    grid = np.array([[0.1, 0.2, 0.3, 0.4, 0.8]])
    even, where = figures._evenly(grid, steps)
    assert even.tolist() == [[0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.8]]
    assert where.tolist() == list(range(1, 9))
    steps = np.concatenate([np.arange(1, 2001), np.arange(2010, 100_000, 90)]).astype(float)
    grid = np.sin(steps)[None] ** 2
    even, where = figures._evenly(grid, steps)
    assert even.shape == (1, 1000)
    assert even.max() == grid.max()
    assert (where[0], where[-1]) == (1, steps[-1])
    same, unchanged = figures._evenly(grid[:, :2000], steps[:2000])
    assert same.shape == (1, 2000)
    assert unchanged is not steps


def test_decay_profile_draws_the_median_step_and_four_fifths_around_it():
    profile = {
        "step": [1, 1, 2, 2, 3, 3],
        "rate": [0.01, 0.1] * 3,
        "opposing": [1, 10, 2, 20, 60, 6],
        "penalized": [100] * 6,
    }
    figure = figures.decay_profile(run(profile=profile))
    (axes,) = figure.axes
    middle, own = axes.lines
    assert points(middle) == [(0.01, 0.02), (0.1, 0.1)]
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(np.quantile([0.01, 0.02, 0.6], 0.1))
    assert corners[:, 1].max() == pytest.approx(np.quantile([0.01, 0.02, 0.6], 0.9))
    assert set(own.get_xdata()) == {0.05}
    assert axes.texts[0].get_text() == " this run: 0.05"
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "weight decay λ"
    assert labels(axes) == ["80 % of steps", "median step"]
    with pytest.raises(ValueError, match="not the same decay rates at every step"):
        figures.decay_profile(run(profile={name: column[:-1] for name, column in profile.items()}))


def test_training_curves_draw_what_was_evaluated():
    epochs = {"epoch": [1, 2], "train_loss": [2.0, 1.0], "top1": [0.5, 0.75],
              "other_top1": [NAN, NAN], "val_top1": [0.25, NAN]}  # fmt: skip
    figure = figures.training_curves(run(epochs=epochs))
    upper, lower = figure.axes
    assert points(upper.lines[0]) == [(1, 2), (2, 1)]
    assert labels(lower) == ["test", "validation"]
    assert points(lower.lines[0]) == [(1, 0.5), (2, 0.75)]
    assert points(lower.lines[1])[0] == (1, 0.25)
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("training loss", "top-1")
    assert lower.get_xlabel() == "epoch"


def test_a_run_has_the_figures_that_it_has_numbers_for():
    steps = {"step": [1, 2], "rate": [0.1, 0.2], "mass": [0.1, 0.2]}
    layers = {"step": [1], "index": [1], "rate": [0.1]}
    profile = {"step": [1], "rate": [0.1], "opposing": [1], "penalized": [10]}
    epochs = {"epoch": [1, 2], "train_loss": [2.0, 1.0], "top1": [0.5, 0.75]}
    whole = run(steps=steps, layers=layers, profile=profile, epochs=epochs)
    assert list(figures.draw_training(whole)) == [
        "rop_over_steps", "rop_by_layer", "rop_by_decay_rate", "training",
    ]  # fmt: skip
    assert figures.draw_training(run(steps={"step": [1], "loss": [1.0]})) == {}
    one = {name: column[:1] for name, column in epochs.items()}
    assert list(figures.draw_training(run(steps=steps, epochs=one))) == ["rop_over_steps"]


def test_a_method_that_never_opposes_shows_its_flips_and_the_literal_reading():
    steps = {"step": [1, 2, 3], "rate": [0.0] * 3, "mass": [0.0] * 3, "flip_rate": [0.1, NAN, 0.3],
             "literal_rate": [0.1, NAN, 0.2]}  # fmt: skip
    layers = {"step": [1, 1], "index": [1, 2], "rate": [0.0, 0.0], "flip_rate": [0.1, 0.2]}
    profile = {"step": [1], "rate": [0.1], "opposing": [0], "penalized": [10]}
    drawn = figures.draw_training(run(steps=steps, layers=layers, profile=profile))
    assert list(drawn) == ["flips_over_steps", "flips_by_layer"]
    upper, lower = drawn["flips_over_steps"].axes
    assert points(upper.lines[0]) == [(1, 0.1), (3, 0.3)]
    assert points(lower.lines[0]) == [(1, 0.1), (3, 0.2)]
    assert [axes.texts[0].get_text() for axes in (upper, lower)] == ["max 30 %", "max 20 %"]
    (image,) = drawn["flips_by_layer"].axes[0].images
    assert image.get_array().tolist() == [[0.1], [0.2]]
    without = {name: column for name, column in steps.items() if name != "literal_rate"}
    (alone,) = figures.draw_training(run(steps=without))["flips_over_steps"].axes
    assert alone.get_xlabel() == "step"


def test_a_figure_that_would_say_nothing_is_not_drawn():
    steps = {"step": [1, 2], "rate": [0.0, NAN], "mass": [0.0, NAN], "flip_rate": [0.0, NAN]}
    layers = {"step": [1], "index": [1], "rate": [0.0], "flip_rate": [0.0]}
    assert figures.draw_training(run(steps=steps, layers=layers)) == {}
    bent = {"index": [1], "scale": [0.5], "distortion": [0.0]}
    assert list(figures.draw_zeroshot([run(curve=CURVE, distortion=bent)])) == ["zeroshot"]


def test_a_profile_asked_twice_about_a_rate_but_for_its_last_bit_has_it_once():
    twice = {"rate": [0.3, 0.1 * 3, 3.0], "step": [1] * 3, "opposing": [1, 1, 2]}
    later = {"rate": [0.3, 3.0], "step": [2] * 2, "opposing": [3, 4]}
    profile = {name: twice[name] + later[name] for name in twice} | {"penalized": [100] * 5}
    middle = figures.decay_profile(run(profile=profile)).axes[0].lines[0]
    assert points(middle) == [(0.3, 0.02), (3.0, pytest.approx(0.03))]


# --- zero-shot decay ------------------------------------------------------------------------------

CURVE = {"step": [0, 1, 2], "scale": [1.0, 0.5, 0.0], "top1": [0.9, NAN, 0.1],
         "agreement": [1.0, 0.5, 0.0]}  # fmt: skip


def test_zero_shot_draws_the_metric_against_what_is_taken_off():
    figure = figures.zero_shot([run({"half_life": 0.4}, curve=CURVE)])
    (axes,) = figure.axes
    curve, life = axes.lines
    assert curve.get_xdata().tolist() == [0, 0.5, 1]
    assert np.array_equal(curve.get_ydata(), [0.9, NAN, 0.1], equal_nan=True), "a gap, not a bridge"
    assert set(life.get_xdata()) == {0.6}
    assert labels(axes) == ["convnext_tiny · half-life 0.400, 60.0 % taken off"]
    assert axes.get_ylabel() == "top-1"
    assert axes.get_xlim() == (0, 1)
    assert in_percent(axes.yaxis)
    assert in_percent(axes.xaxis)


def test_scans_without_labels_show_agreement_and_several_have_a_line_each():
    unlabelled = CURVE | {"top1": [NAN] * 3}
    both = [run(None, curve=CURVE), run({"half_life": None}, curve=unlabelled)]
    (axes,) = figures.zero_shot(both).axes
    assert axes.get_ylabel() == "agreement with the undecayed model / top-1"
    assert axes.lines[1].get_ydata().tolist() == [1.0, 0.5, 0.0]
    assert [to_hex(line.get_color()) for line in axes.lines] == list(figures.SERIES[:2])
    assert labels(axes) == ["convnext_tiny", "convnext_tiny"]


def test_part_map_has_a_row_a_part_and_falling_scales():
    parts = {"index": [1, 2, 1, 2], "scale": [0.5, 0.5, 0.9, 0.9], "top1": [0.1, 0.2, 0.3, NAN],
             "agreement": [1.0] * 4}  # fmt: skip
    figure = figures.part_map(run(parts=parts))
    axes, bar = figure.axes
    (image,) = axes.images
    assert image.get_array().filled(-1).tolist() == [[0.3, 0.1], [-1, 0.2]]
    assert image.get_clim() == (0, 1)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["stem", "head"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.9", "0.5"]
    assert bar.get_ylabel() == "top-1"
    title = figure.get_suptitle()
    assert title == "One layer decayed at a time\nconvnext_tiny · checkpoint a.pt"
    unlabelled = figures.part_map(run(parts=parts | {"top1": [NAN] * 4}))
    assert unlabelled.axes[1].get_ylabel() == "agreement"


def test_distortion_map_reaches_to_its_largest_value():
    distortion = {"index": [1, 2], "scale": [0.9, 0.9], "distortion": [0.25, NAN]}
    figure = figures.distortion_map(run(distortion=distortion))
    (image,) = figure.axes[0].images
    assert image.get_array().filled(-1).tolist() == [[0.25], [-1]]
    assert image.get_clim() == (0, 0.25)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["1 stem", "2 head"]
    assert figure.axes[1].get_ylabel() == "1 − cos²"


def test_maps_of_one_scan_alone():
    parts = {"index": [1], "scale": [0.5], "top1": [0.1], "agreement": [1.0]}
    distortion = {"index": [1], "scale": [0.9], "distortion": [0.25]}
    whole = run(curve=CURVE, parts=parts, distortion=distortion)
    assert list(figures.draw_zeroshot([whole])) == ["zeroshot", "zeroshot_by_part", "distortion"]
    assert list(figures.draw_zeroshot([whole, whole])) == ["zeroshot"]
    assert list(figures.draw_zeroshot([run(curve=CURVE)])) == ["zeroshot"]


def test_tables_that_would_leave_most_of_a_map_empty_are_refused():
    count = 5000
    layers = {"step": list(range(count)), "index": list(range(1, count + 1)), "rate": [0.1] * count}
    with pytest.raises(ValueError, match="5000 values make no grid of 5000 × 5000"):
        figures.layer_heatmap(run(layers=layers, names=["x"] * count))


# --- several runs ---------------------------------------------------------------------------------


def test_overlay_has_a_line_for_each_run_with_the_column():
    epochs = {"epoch": [1, 2, 3], "top1": [0.5, NAN, 0.75]}
    runs = {"a": run(epochs=epochs), "b": run(epochs={"epoch": [1]}), "c": run(epochs=epochs)}
    figure = figures.overlay(runs, "epochs", "top1", "Top-1", "top-1", share=True)
    (axes,) = figure.axes
    assert labels(axes) == ["a", "c"]
    assert points(axes.lines[0]) == [(1, 0.5), (3, 0.75)]
    assert to_hex(axes.lines[1].get_color()) == figures.SERIES[2], "a run keeps its colour"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "top-1")
    assert in_percent(axes.yaxis)
    steps = {"step": list(range(1, 101)), "loss": [1.0] * 100}
    plain = figures.overlay({"a": run(steps=steps)}, "steps", "loss", "Loss", "loss", share=False)
    assert plain.axes[0].lines[0].get_ydata().tolist() == [1.0] * 100
    assert not in_percent(plain.axes[0].yaxis)


def test_colours_return_with_other_dashes():
    many = {f"{k}": run(epochs={"epoch": [1], "top1": [0.5]}) for k in range(7)}
    lines = figures.overlay(many, "epochs", "top1", "", "", share=True).axes[0].lines
    assert lines[0].get_color() == lines[6].get_color()
    assert lines[0].get_linestyle() == "-"
    assert lines[6].get_linestyle() == "--"


def test_grid_map_writes_each_cell_and_rings_the_best():
    values = {(0.1, 1.0): 0.5, (0.1, 2.0): 0.75, (0.01, 1.0): NAN}
    figure = figures.lr_decay_map(values, "Top-1", best=(0.1, 2.0))
    axes, bar = figure.axes
    (image,) = axes.images
    assert image.get_array().filled(-1).tolist() == [[0.5, 0.75], [-1, -1]]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "50.0", (1, 0): "75.0", (0, 1): "×"}
    assert axes.collections[0].get_offsets().tolist() == [[1, 0]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0.1", "0.01"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("weight decay λ", "learning rate η")
    assert image.get_clim() == (0.5, 0.75)
    assert bar.get_ylabel() == "top-1"


def test_grid_maps_share_their_axes_and_colours():
    maps = {"wd": {(0.1, 1.0): 0.5}, "pwd": {(0.1, 2.0): 0.9}}
    figure = figures.lr_decay_maps(maps, "Top-1", digits=2)
    left, right, _ = figure.axes
    assert (left.get_title(), right.get_title()) == ("wd", "pwd")
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0.5, 0.9)
    assert [text.get_text() for text in left.texts] == ["50.00"]
    assert [text.get_text() for text in right.texts] == ["90.00"]
    assert right.texts[0].get_position() == (1, 0)
    assert right.get_ylabel() == ""
    fixed = figures.lr_decay_maps(maps, "Top-1", limits=(0, 1))
    assert fixed.axes[0].images[0].get_clim() == (0, 1)


def test_methods_by_decay_rate_and_one_without_a_rate_is_level():
    curves = {"lpwd": [(2.0, 0.75), (1.0, 0.5)], "baseline": [(0.0, 0.25)]}
    figure = figures.top1_by_decay_rate(curves, "Top-1", marks={"lpwd": 2.0})
    (axes,) = figure.axes
    line, marked, level = axes.lines
    assert points(line) == [(1, 0.5), (2, 0.75)]
    assert points(marked) == [(2, 0.75)]
    assert set(level.get_ydata()) == {0.25}
    assert axes.get_xscale() == "log"
    assert labels(axes) == ["lpwd", "baseline"]
    unmarked = figures.top1_by_decay_rate(curves, "Top-1").axes[0]
    assert points(unmarked.lines[1]) == []


def test_opposing_beside_top1_has_a_point_a_setting_and_a_colour_a_method():
    figure = figures.opposing_beside_top1({"wd": [(0.01, 0.5), (0.02, 0.75)], "rwd": []}, "Both")
    (axes,) = figure.axes
    (dots,) = axes.collections
    assert dots.get_offsets().tolist() == [[0.01, 0.5], [0.02, 0.75]]
    assert to_hex(dots.get_facecolor()[0]) == figures.SERIES[0]
    assert labels(axes) == ["wd"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("mean R_op", "top-1")


# --- names and files ------------------------------------------------------------------------------


def test_figures_are_saved_as_pictures(tmp_path):
    drawn = figures.draw_zeroshot([run(curve=CURVE)])
    figures.save(drawn, tmp_path / "figures")
    figures.save(drawn, tmp_path / "figures")
    with Image.open(tmp_path / "figures/zeroshot.png") as picture:
        assert picture.size == (1050, 570)
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize("name", [name for name, *_ in figures.ROP_FIGURES])
def test_every_figure_is_drawn_from_the_files_alone(name, tmp_path):
    run = read_run(OLD / "rop")
    drawn = figures.draw_training(run)[name]
    axes = drawn.axes[0]
    assert axes.lines or axes.images
    assert run.config["model"] in drawn.get_suptitle()
    figures.save({name: drawn}, tmp_path / "figures")
    with Image.open(tmp_path / "figures" / f"{name}.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    if name == "rop_by_layer":
        assert axes.images[0].get_array().shape == (len(run.layer_names), 11)
