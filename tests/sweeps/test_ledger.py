import pytest

from wd_probe.sweeps.ledger import Ledger


def test_a_ledger_that_cannot_be_written_holds_nothing_up(tmp_path):
    with pytest.warns(UserWarning, match="is not written"):
        ledger = Ledger(tmp_path / "nowhere" / "cells.csv", [{"a": 1}])
    ledger.update(0, {"a": 2})  # says no more
