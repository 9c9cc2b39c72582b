import warnings

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg

from wd_probe.report.values import svg
from wd_probe.runs import figures, letters, style


def drawn():
    figure = style.new_figure("層 of a model")
    axes = figure.subplots()
    axes.plot([1, 2], label="층")
    axes.legend()
    style.layer_rows(axes, ["conv", "층"])
    return figure


@pytest.fixture(autouse=True)
def no_warnings():
    letters._fonts.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    letters._fonts.cache_clear()


@pytest.mark.figures
def test_a_letter_that_no_font_has_is_told_by_its_number(tmp_path, monkeypatch):
    ours = [one for one in font_manager.fontManager.ttflist if one.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", ours)
    figure = drawn()
    figures.save({"one": figure}, tmp_path / "figures")
    (axes,) = figure.axes
    assert figure.get_suptitle() == r"\u5c64 of a model"
    assert [one.get_text() for one in axes.get_yticklabels()] == ["1 conv", r"2 \uce35"]
    assert axes.get_legend().get_texts()[0].get_text() == r"\uce35"


@pytest.mark.figures
def test_another_font_has_what_ours_lacks(tmp_path, monkeypatch):
    has = letters._letters
    other = next(one for one in font_manager.fontManager.ttflist if one.name == "DejaVu Serif")
    monkeypatch.setattr(
        letters, "_letters", lambda path, of: of if path == other.fname else has(path, of)
    )
    figure = drawn()
    letters.show_letters(figure)
    assert figure.get_suptitle() == "層 of a model"
    labels = figure.axes[0].get_yticklabels()
    assert {tuple(one.get_fontfamily()) for one in labels} == {("DejaVu Sans", "DejaVu Serif")}


@pytest.mark.figures
def test_figures_in_letters_that_ours_has_are_as_they_were():
    plain, looked_through = (style.new_figure("η of naïve ŵ · ½") for _ in range(2))
    pictures = []
    for figure in (plain, looked_through):
        figure.subplots().set_yscale("log")
        if figure is looked_through:
            letters.show_letters(figure)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba()))
    assert (pictures[0] == pictures[1]).all()


def test_a_page_leaves_them_to_the_browser():
    assert "2 층" in svg(drawn(), "one")
