import math

import pytest

from wd_probe.wording import decimal, half_life_cells, half_life_told, percent

SHARES = {
    0: "0 %",
    1: "100 %",
    0.0032: "0.32 %",
    0.00320499: "0.32 %",
    0.97: "97 %",
    0.1234567: "12.3 %",
    0.09996: "10 %",
    12.34: "1230 %",
    9.07e-7: "0.000091 %",
    9e-7: "0.00009 %",
    1e-7: "0.00001 %",
    9.99e-8: "0.00001 %",
    9.9e-8: "9.9e-06 %",
    9e-9: "9.0e-07 %",
    0.99986: "99.99 %",
    0.9999968: "99.9997 %",
    0.99999999999: "100 %",
    -0.0032: "-0.32 %",
    math.nan: "–",
    math.inf: "–",
    None: "–",
}


@pytest.mark.parametrize(("share", "text"), SHARES.items())
def test_per_cent_as_people_write_it(share, text):
    assert percent(share) == text


def test_per_cent_of_a_fixed_form():
    assert percent(0.9441, 1) == "94.4 %"
    assert percent(1, 1) == "100.0 %"
    assert percent(0.0031, unit="") == "0.31"
    assert percent(math.nan, 1) == "–"


def test_a_half_life_is_also_what_is_taken_off():
    assert half_life_told(0.97) == "0.970, 3.0 % taken off"
    assert half_life_cells(0.9712, 4) == ("0.9712", "2.88 %")
    assert half_life_cells(None) == half_life_cells(math.nan) == ("–", "–")


@pytest.mark.parametrize("number", [0.1 * 3, 1 - 0.9, 0.05 * 0.1, 0.07 * 10, 1 - 3 / 100, 1e-300])
def test_decimals_have_no_binary_tail(number):
    assert len(repr(decimal(number))) <= 6
    assert decimal(number) == pytest.approx(number, rel=1e-12)


def test_what_is_no_number_stays_so():
    assert math.isnan(decimal(math.nan))
    assert decimal(math.inf) == math.inf
