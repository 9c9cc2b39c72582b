import math

import numpy as np
import pytest

from wd_probe import Layer, StepRecord, Tally
from wd_probe.layering import Layers
from wd_probe.probe.records import pooled, since
from wd_probe.probe.sums import AT, WIDTH

NAMES = ("a.weight", "a.bias", "b.weight")
LAYERS = Layers([Layer(1, "a", NAMES[:2]), Layer(2, "b", NAMES[2:])], "registration")
COUNTS = [[10.0, 4, 3, 1, 0.5, 2], [2, 1, 0, 0, 0.5, 1], [0, 0, 0, 2, 0, 0]]
VALUES = np.pad(np.array(COUNTS), ((0, 0), (0, WIDTH - 6)))


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


def test_weights_that_are_no_numbers_have_no_norm():
    assert math.isnan(record().layers[1].norm)
    assert Tally(0, 0, 0, 2, 0.0, 0.0, squared_norm=4.0).norm == 2.0


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


def test_ratios_are_of_sums():
    """Theory facts 21 and 22, of x = (3, 4) that turns by a right angle and grows by a half."""
    turned = Tally(2, 0, 0, 0, 0.0, 1.0, squared=25, along=-25, moved=81.25, growth=3, taken=2)
    assert turned.balance == 1.5
    assert turned.angular_update == pytest.approx(math.pi / 2)
    assert Tally(2, 0, 0, 0, 0.0, 1.0, squared=4, updated=1).relative_update == 0.5
    for along, angle in ((0, 0.0), (-8, math.pi)):
        moved = along**2 / 4
        found = Tally(1, 0, 0, 0, 0.0, 1.0, squared=4, along=along, moved=moved)
        assert found.angular_update == pytest.approx(angle)
    tiny = Tally(1, 0, 0, 0, 0.0, 1.0, squared=1.0, along=0.0, moved=1e-20)
    assert tiny.angular_update == pytest.approx(1e-10, rel=1e-6)
    decayed = Tally(2, 0, 0, 0, 0.0, 1.0, decayed=30, shares=0.3, left=5.0, held=10)
    assert (decayed.timescale, decayed.remaining) == (100, 0.5)


def test_what_was_not_measured_is_not_a_number():
    nothing = Tally(0, 0, 0, 0, 0.0, 0.0)
    assert math.isnan(nothing.balance)
    assert math.isnan(nothing.relative_update)
    assert math.isnan(nothing.angular_update)
    assert (nothing.remaining, nothing.timescale, nothing.norm) == (1, math.inf, 0)


def test_tallies_are_pooled_and_what_lasts_is_the_present():
    first, second, _ = record().tensors.values()
    assert pooled([first, second]) == Tally(12, 5, 3, 1, 1.0, 3.0)
    assert pooled([]) == Tally(0, 0, 0, 0, 0.0, 0.0)
    then, now = np.full(WIDTH, 2.0), np.full(WIDTH, 5.0)
    found = since(now, then)
    assert found[AT["opposing"]] == 3
    assert [found[AT[name]] for name in ("squared_norm", "left", "held")] == [5, 5, 5]


def test_a_record_has_the_ledger_of_its_total():
    values = np.full((3, WIDTH), 2.0)
    found = record(values=values)
    for name in ("growth", "taken", "balance", "norm", "relative_update", "angular_update",
                 "remaining", "timescale"):  # fmt: skip
        assert getattr(found, name) == getattr(found.total, name)


def test_a_record_is_printed_as_a_table():
    lines = [" ".join(line.split()) for line in str(record(step=1200)).splitlines()]
    assert lines[0] == "Step 1,200 · 12 penalized weights"
    for line in (
        "R_op, share of weights 41.7 %",
        "R_op by size, share of Σ|P| 33.3 %",
        "balance –",
        "weights that are not finite 3",
        "Layers that oppose most, of 2 (registration)",
    ):
        assert line in lines
    assert lines[-1].startswith("1 a 41.7 % 33.3 % ██")
    assert repr(record(step=7)).startswith("StepRecord(step=7, ")
