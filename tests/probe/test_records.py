import math

import numpy as np
import pytest

from wd_probe import Layer, StepRecord, Tally
from wd_probe.layering import Layers

NAMES = ("a.weight", "a.bias", "b.weight")
LAYERS = Layers([Layer(1, "a", NAMES[:2]), Layer(2, "b", NAMES[2:])], "registration")
VALUES = np.array([[10.0, 4, 3, 1, 0.5, 2], [2, 1, 0, 0, 0.5, 1], [0, 0, 0, 2, 0, 0]])


def record(step=1, values=VALUES):
    return StepRecord(step, values, NAMES, LAYERS)


def test_tensors_layers_and_totals_are_sums_of_the_same_numbers():
    found = record()
    assert found.tensors["a.bias"] == Tally(2, 1, 0, 0, 0.5, 1.0)
    first, second = found.layers
    assert (first.index, first.name, first.penalized, first.opposing) == (1, "a", 12, 5)
    assert (second.index, second.name, second.nonfinite) == (2, "b", 2)
    assert found.total == Tally(12, 5, 3, 3, 1.0, 3.0)
    assert all(isinstance(getattr(found.total, name), int) for name in ("penalized", "nonfinite"))


def test_shares_of_weights_and_of_penalty():
    found = record()
    assert (found.rate, found.mass, found.flip_rate) == (5 / 12, 1 / 3, 3 / 12)
    assert (found.penalized, found.nonfinite) == (12, 3)
    nothing = found.layers[1]
    assert all(math.isnan(share) for share in (nothing.rate, nothing.mass, nothing.flip_rate))


def test_parameters_in_no_layer_count_in_tensors_and_totals_alone():
    found = StepRecord(1, VALUES, NAMES, Layers(LAYERS[:1], "registration"))
    assert [layer.name for layer in found.layers] == ["a"]
    assert found.nonfinite == 3


@pytest.mark.parametrize(
    "other", [record(step=2), record(values=VALUES + 1), StepRecord(1, VALUES, NAMES, LAYERS[:1])]
)
def test_records_are_equal_if_their_numbers_are(other):
    assert record() == record(values=VALUES.copy())
    assert hash(record()) == hash(record(values=VALUES.copy()))
    assert record() != other
    assert record() != 3


def test_what_a_record_says_of_itself():
    assert repr(record()) == (
        "StepRecord(step=1, rate=0.416667, mass=0.333333, flip_rate=0.25, penalized=12, "
        "nonfinite=3)"
    )
    assert repr(record(values=VALUES * 0)) == (
        "StepRecord(step=1, rate=nan, mass=nan, flip_rate=nan, penalized=0)"
    )
