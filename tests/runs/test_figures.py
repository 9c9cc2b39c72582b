import numpy as np

from wd_probe.runs import figures


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
