import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex

from tests.runs.test_figures import labels, points, run
from wd_probe.probe.dynamics import equilibrium_angle
from wd_probe.runs import decay_figures, figures
from wd_probe.runs.style import SERIES

NAN = math.nan
STEPS = 8


def ledger(**changed):
    """Two layers over eight steps: the first shrinks, the second holds; c is 1/10 and 1/40."""
    step = np.repeat(np.arange(1, STEPS + 1), 2)
    index = np.tile([1, 2], STEPS)
    first = index == 1
    columns = {
        "step": step, "index": index, "rate": 0 * step, "growth": np.where(first, 1.0, 4.0),
        "taken": 4.0 + 0 * step, "balance": np.where(first, 0.25, 1.0),
        "norm": np.where(first, (100 - 3.0 * step) ** 0.5, 5.0),
        "angular_update": np.where(first, 0.01, 0.02) * (1 + 0.01 * step),
        "timescale": np.where(first, 10.0, 40.0),
        "remaining": (1 - np.where(first, 0.1, 0.025)) ** step,
    }  # fmt: skip
    return {name: list(map(float, column)) for name, column in (columns | changed).items()}


SUMMARY = {
    "dynamics": {"momentum": 0.9},
    "layers": [{"index": 1, "state": "shrinking"}, {"index": 2, "state": "balanced"}],
}
DECAY = ["balance_by_layer", "angle_by_layer", "remaining", "norm_by_layer"]


def test_balance_is_a_map_around_1_whose_ends_are_clipped_and_nothing_taken_is_grey():
    taken, growth = np.full(16, 4.0), np.tile([1.0, 4.0], STEPS)
    growth[0], growth[2], taken[4] = -9.0, 1e9, 0.0  # the first layer's first three steps
    figure = decay_figures.balance_by_layer(run(layers=ledger(growth=growth, taken=taken)))
    axes, bar = figure.axes
    (image,) = axes.images
    shown = image.get_array()
    assert shown[0, :4].filled(-1).tolist() == [0.1, 10, -1, 0.25]
    assert shown[1].tolist() == [1.0] * STEPS
    assert to_hex(image.cmap(image.norm(1.0))) == to_hex(image.cmap(0.5))
    assert to_hex(image.cmap.get_bad()) == "#a9a9a9"
    figure.canvas.draw()
    ticks = [text.get_text() for text in bar.get_yticklabels()]
    assert ticks == ["0.1", "0.2", "0.5", "1", "2", "5", "10"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1 stem", "2 head"]


def test_balance_of_a_stretch_is_the_ratio_of_sums():
    count = 400
    growth = np.tile([0.0, 2.0], count // 2)
    layers = {"step": np.arange(count) + 1.0, "index": [1.0] * count, "growth": growth,
              "taken": np.tile([3.0, 1.0], count // 2)}  # fmt: skip
    (image,) = decay_figures.balance_by_layer(run(layers=layers, names=["a"])).axes[0].images
    assert image.get_extent()[:2] == [0.5, 400.5]
    assert np.array_equal(image.get_array(), np.full((1, 40), 0.5)), "not the mean of 0 and 2"


def test_angle_is_that_of_late_steps_beside_the_line_of_equilibrium():
    figure = decay_figures.angle_by_layer(run(SUMMARY, layers=ledger()))
    (axes,) = figure.axes
    balanced, other, line = axes.lines
    assert points(balanced) == [(pytest.approx(0.02 * 1.07), 2)]
    assert points(other) == [(pytest.approx(0.01 * 1.07), 1)]
    assert other.get_markerfacecolor() == "none"
    expected = [equilibrium_angle(c, 0.9) for c in (0.1, 0.1, 0.025, 0.025)]
    assert line.get_xdata() == pytest.approx(expected)
    assert line.get_ydata().tolist() == [0.5, 1.5, 1.5, 2.5]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["in balance", "not in balance", "equilibrium, β = 0.9"]


def test_no_equilibrium_is_drawn_where_momentum_or_decay_is_not_known():
    unknown = SUMMARY | {"dynamics": {"momentum": None}}
    (axes,) = decay_figures.angle_by_layer(run(unknown, layers=ledger())).axes
    assert len(axes.lines) == 2
    undecayed = ledger(timescale=np.tile([10.0, math.inf], STEPS))
    (axes,) = decay_figures.angle_by_layer(run(SUMMARY, layers=undecayed)).axes
    assert np.isnan(axes.lines[-1].get_xdata()).tolist() == [False, False, True, True]


def test_what_is_left_is_a_line_a_layer_or_one_where_all_are_alike():
    figure = decay_figures.remaining(run(layers=ledger()))
    axes, bar = figure.axes
    first, second, idle = axes.lines
    assert points(first)[-1] == (8, pytest.approx(0.9**8))
    assert points(second)[-1] == (8, pytest.approx(0.975**8))
    assert first.get_color() != second.get_color()
    assert set(idle.get_ydata()) == {0.95}
    assert labels(axes) == ["idle above 95 %"]
    assert [text.get_text() for text in bar.get_yticklabels()] == ["1 stem", "2 head"]
    alike = ledger(remaining=0.9 ** np.repeat(np.arange(1, STEPS + 1), 2))
    (axes,) = decay_figures.remaining(run(layers=alike)).axes
    assert len(axes.lines) == 2
    assert axes.texts[0].get_text() == "43 % "


def test_norms_begin_at_1_beside_what_decay_alone_would_leave():
    alike = ledger(remaining=0.9 ** np.repeat(np.arange(1, STEPS + 1), 2))
    axes = decay_figures.norm_by_layer(run(layers=alike)).axes[0]
    first, second, alone = axes.lines
    assert points(first)[-1] == (8, pytest.approx(math.sqrt(76 / 100)))
    assert points(second)[0] == (1, 1)
    assert labels(axes) == ["decay alone"]
    assert points(alone)[0] == (1, 0.9)
    axes = decay_figures.norm_by_layer(run(layers=ledger())).axes[0]
    assert len(axes.lines) == 2, "layers that decay apart have no line in common"
    assert axes.get_yscale() == "linear"
    far = ledger(norm=np.tile([0.1, 5.0], STEPS))
    assert decay_figures.norm_by_layer(run(layers=far)).axes[0].get_yscale() == "log"


def test_of_many_layers_the_lines_go_from_one_colour_to_another():
    names = [f"block {k}" for k in range(50)]
    layers = {"step": [1.0] * 50 + [2.0] * 50, "index": [*map(float, range(1, 51))] * 2,
              "norm": [1.0] * 100, "growth": [0.0] * 100, "taken": [0.0] * 100,
              "remaining": [1.0] * 100}  # fmt: skip
    axes, bar = decay_figures.norm_by_layer(run(layers=layers, names=names)).axes
    assert to_hex(axes.lines[0].get_color()) == SERIES[0]
    assert to_hex(axes.lines[49].get_color()) == SERIES[4]
    assert len(bar.get_yticklabels()) == 13


def test_a_figure_that_would_say_nothing_is_not_drawn():
    whole = run(SUMMARY, layers=ledger())
    assert list(figures.draw_training(whole)) == DECAY
    idle = run(layers=ledger(remaining=np.full(16, 0.9999)))
    assert list(decay_figures.draw_decay(idle)) == ["angle_by_layer", "norm_by_layer"]
    signs = {name: np.full(16, NAN) for name in ("balance", "angular_update", "growth", "taken")}
    kept = run(layers=ledger(norm=np.zeros(16), **signs))
    assert list(decay_figures.draw_decay(kept)) == ["remaining"]
    one = run(layers={name: column[:2] for name, column in ledger().items()})
    assert decay_figures.draw_decay(one) == {}
    older = run(layers={name: ledger()[name] for name in ("step", "index", "rate")})
    assert decay_figures.draw_decay(older) == {}


def test_a_run_that_diverged_or_has_no_summary_is_drawn():
    norm = np.tile([4.0, 5.0], STEPS)
    norm[-2:] = NAN, math.inf
    angles = np.where(np.arange(16) > 9, NAN, 0.01)
    layers = ledger(norm=norm, angular_update=angles, growth=norm, taken=norm)
    drawn = decay_figures.draw_decay(run(layers=layers))
    assert list(drawn) == DECAY
    for figure in drawn.values():
        figure.canvas.draw()
    unfinished = replace(run(SUMMARY, layers=ledger()), summary=None)
    figure = decay_figures.angle_by_layer(unfinished)
    (dots,) = figure.axes[0].lines
    assert to_hex(dots.get_markerfacecolor()) == SERIES[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["median"]
