from dataclasses import fields

import numpy as np
import torch

from wd_probe import Tally
from wd_probe.probe import formulas, kernel
from wd_probe.probe.kernel import gpu
from wd_probe.probe.sums import SUMS, WIDTH, settle


def test_everything_that_holds_sums_follows_the_table():
    assert [field.name for field in fields(Tally)] == [one.name for one in SUMS]
    theta = torch.ones(3)
    assert formulas.tally(theta, theta, 0.1).shape == (WIDTH,)
    assert formulas.tally_exact(theta, theta, theta).shape == (WIDTH,)
    assert kernel.Tallying([theta], [theta])([0.1]).shape == (1, WIDTH)
    assert gpu.WIDTH == WIDTH


def test_sizes_become_those_of_the_penalty():
    found = np.array([[10.0, 4, 3, 1, 0.5, 2]])
    settle(found, np.array([0.1]), np.array([True]))
    assert found.tolist() == [[10, 4, 3, 1, 0.05, 0.2]]


def test_what_cannot_oppose_does_not():
    """That the step alone flipped a weight's sign is told all the same."""
    found = np.array([[10.0, 4, 3, 1, 0.5, 2], [10, 4, 3, 1, 0.5, 2]])
    settle(found, np.array([1.0, 1.0]), np.array([False, True]))
    assert found.tolist() == [[10, 0, 3, 1, 0, 2], [10, 4, 3, 1, 0.5, 2]]


def test_where_nothing_is_taken_off_nothing_is_penalized():
    found = np.array([[10.0, 4, 3, 1, 0.5, 2]])
    settle(found, np.array([0.0]), np.array([True]))
    assert found.tolist() == [[0, 0, 0, 1, 0, 0]]
