import numpy as np
import pytest

from tests.runs.test_figures import CONFIG, run
from wd_probe.runs import style


def test_smoothing_keeps_a_level_and_the_length():
    assert style.smooth(np.full(100, 0.25)).tolist() == [0.25] * 100
    few = np.array([1.0, 2.0, 4.0])
    assert style.smooth(few).tolist() == few.tolist()
    line = np.arange(60.0)
    assert style.smooth(line)[5:-5] == pytest.approx(line[5:-5])


@pytest.mark.parametrize(
    ("values", "scale", "ticks"),
    [
        ([0, 0.004], "linear", {"0 %", "0.05 %", "0.1 %", "0.4 %"}),
        ([0, 1], "linear", {"0 %", "100 %"}),
        ([0, 3e-9], "linear", {"0 %", "1.0e−07 %"}),
        ([0.9725, 0.9735], "linear", {"97.260 %", "97.300 %"}),
        ([2e-6, 0.02], "log", {"0.001 %", "1 %"}),
    ],
)
def test_ticks_are_per_cent_as_people_write_it(values, scale, ticks):
    figure = style.new_figure("")
    axes = style.dress(figure.subplots(), "share")
    axes.plot(values)
    axes.set_yscale(scale)
    axes.yaxis.set_major_formatter(style.InPercent())
    figure.canvas.draw()
    assert ticks <= {label.get_text() for label in axes.get_yticklabels()}


def test_names_are_short_and_no_formula():
    assert style.short(r"$\frac{1}$") == r"\$\frac{1}\$"
    assert style.short("x" * 41) == "x" * 39 + "…"
    strange = run(config=CONFIG | {"model": "$" * 60, "method": "own"})
    told = style.title_of(strange)
    assert told.startswith(r"\$" * 39 + "… on digits · adamw · η 0.001")


def test_rows_are_named_as_many_as_can_be_read():
    for count, most, named in ((3, 40, 3), (40, 40, 40), (41, 40, 21), (60, 14, 12)):
        axes = style.new_figure("").subplots()
        style.layer_rows(axes, [f"block {k}" for k in range(count)], most)
        shown = axes.get_yticklabels()
        assert len(shown) == named
        assert shown[1].get_text() == f"{axes.get_yticks()[1]} block {axes.get_yticks()[1] - 1}"
