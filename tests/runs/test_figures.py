from wd_probe.runs import figures


def test_maps_mark_the_best_and_what_came_to_nothing():
    nan = float("nan")
    drawn = figures.lr_decay_map(
        {(0.1, 1.0): 0.5, (0.1, 2.0): nan, (0.2, 1.0): 0.75}, "map", best=(0.2, 1.0)
    )
    axes = drawn.axes[0]
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {
        ((0, 0), "75.0"), ((0, 1), "50.0"), ((1, 1), "×"),
    }  # fmt: skip
    assert axes.collections[0].get_offsets().tolist() == [[0, 0]]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0.2", "0.1"]
