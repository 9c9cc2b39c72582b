import math

from wd_probe.runs.decay_tables import LAYER_COLUMNS, in_all, layer_table

STATISTICS = {"mean": 0.5, "last": None}
SUMMARY = {
    "method": "wd",
    "steps": 88,
    "dynamics": {"remaining": 0.75, "timescale_steps": 100.0, "timescale_epochs": 2.0,
                 "balance": STATISTICS, "angular_update": STATISTICS},
    "layers": [{"state": "idle"}, {"state": None}],
}  # fmt: skip


def test_in_all_it_is_told_beside_the_length_of_the_run():
    assert in_all(SUMMARY) == {
        "taken off": "25 % of what stood at the start",
        "timescale 1/c": "100 steps, 2 epochs",
        "the run": "88 steps, 1.76 epochs",
        "balance": "0.5 over all steps, – at the last",
        "angle per step": "0.5 over all steps, – at the last",
        "layers": "1 idle · 0 shrinking · 0 balanced · 0 growing",
    }


def test_what_a_file_has_no_number_for_is_a_dash():
    unknown = {"remaining": None, "timescale_steps": None, "timescale_epochs": None}
    told = in_all(SUMMARY | {"method": "l2", "dynamics": SUMMARY["dynamics"] | unknown})
    assert told["taken off"] == "– of what stood at the start, by each penalty's own step"
    assert told["timescale 1/c"] == "none: nothing is taken off"
    assert told["the run"] == "88 steps"


def test_the_layer_furthest_from_balance_is_first_and_undecayed_ones_are_left_out():
    layers = [
        {"index": k, "name": f"l{k}", "state": state, "balance": balance, "remaining": 0.5,
         "angular_update": None, "norm": 2.0}
        for k, (state, balance) in enumerate(
            [("balanced", 1.2), ("growing", 3.0), ("shrinking", 0.1), ("idle", math.nan),
             (None, None), ("balanced", 1.0)]
        )
    ]  # fmt: skip
    rows = layer_table(layers)
    assert [row[1] for row in rows] == ["l3", "l2", "l1", "l0", "l5"]
    assert dict(zip(LAYER_COLUMNS, rows[1], strict=True)) == {
        "layer": "2", "name": "l2", "state": "shrinking", "balance": "0.1", "taken off": "50 %",
        "angle": "–", "norm": "2",
    }  # fmt: skip
