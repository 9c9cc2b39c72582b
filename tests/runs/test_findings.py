from wd_probe.probe.records import ProfileRecord, Tally
from wd_probe.runs.findings import findings, kind_of


def tally(penalized, opposing, flipped, taken=0.1, of=10.0):
    return Tally(penalized, opposing, flipped, 0, taken, of)


REST = tally(1_000_000, 1000, 900, 10.0, 1000.0)


def test_layer_scales_are_named_in_the_findings():
    scales = Tally(1000, 400, 400, 0, 0.1, 10.0)
    rest = Tally(1_000_000, 1000, 990, 0, 0.001, 1000.0)
    told = findings(
        {"blocks.0.gamma": (1, scales), "blocks.0.conv.weight": (4, rest)},
        [ProfileRecord(1, (0.001, 0.01, 0.1), (5, 6, 9), 1000)],
        0.01,
    )
    assert told[0] == (
        "The layer scales `gamma` oppose 400 times as often as the rest; "
        "they are usually left undecayed."
    )
    assert told[-1] == (
        "With the same updates R_op would have been 0.5 % under λ = 0.001 and 0.9 % under "
        "λ = 0.1; it is 0.6 % under this run's λ = 0.01 (1 step, the same for all three)."
    )
    nothing = Tally(10, 0, 0, 0, 0.0, 1.0)
    assert findings({"a.weight": (2, nothing)}, [], 0.01) == []


def test_kinds_of_tensors():
    assert kind_of("head.fc.bias", 1) == "biases"
    assert kind_of("norm.weight", 1) == "norm weights"
    assert kind_of("blocks.0.ls1.gamma", 1) == "layer scales `gamma`"
    assert kind_of("cls_token", 3) == "embeddings and tokens"
    assert kind_of("conv.weight", 4) == "matrices and kernels"


def test_the_two_kinds_that_oppose_most_are_named_and_no_matrix_is_to_be_left_undecayed():
    tensors = {
        "conv.weight": (4, REST),
        "a.bias": (1, tally(1000, 100, 90)),
        "norm.weight": (1, tally(1000, 50, 40)),
        "cls_token": (3, tally(1000, 60, 40)),
    }
    told = findings(tensors, [], 0.1)
    assert [line.split(" oppose")[0] for line in told] == [
        "The biases",
        "The embeddings and tokens",
    ]
    alone = {"conv.weight": (4, tally(1000, 400, 300)), "a.bias": (1, REST)}
    assert findings(alone, [], 0.1) == [
        "The matrices and kernels oppose 400 times as often as the rest."
    ]


def test_few_counts_and_small_differences_say_nothing():
    few = {"a.bias": (1, tally(100, 49, 10)), "conv.weight": (4, REST)}
    assert findings(few, [], 0.1) == []
    alike = {"a.bias": (1, tally(100_000, 390, 300)), "conv.weight": (4, REST)}
    assert findings(alike, [], 0.1) == []


def test_flipped_signs():
    told = findings({"conv.weight": (4, tally(10_000, 1000, 960, 0.1, 10.0))}, [], 0.1)
    assert told == [
        "96 % of the opposing weights had their sign flipped by the step alone: R_op follows the "
        "learning rate far more than the decay rate.",
    ]


def test_other_decay_rates_are_told_where_they_were_asked_on_both_sides():
    tensors = {"conv.weight": (4, tally(10, 1, 1))}

    def told(rates, penalized=100):
        profiles = [ProfileRecord(k, rates, tuple(range(k, k + len(rates))), penalized)
                    for k in (1, 3)]  # fmt: skip
        return findings(tensors, profiles, 0.1)

    assert told((0.01, 0.1, 1.0)) == [
        "With the same updates R_op would have been 2 % under λ = 0.01 and 4 % under λ = 1; it is "
        "3 % under this run's λ = 0.1 (2 steps, the same for all three)."
    ]
    assert told((0.1, 1.0)) == []
    assert told((0.01, 0.1)) == []
    assert told((0.01, 1.0), penalized=0) == []
    assert told((0.01, 1.0)) == [], "without this run's own there is nothing to set them against"


def test_rates_are_found_at_every_step_whatever_else_it_was_asked():
    """As in a resumed run whose first steps were asked 3 · 0.1 and 0.3."""
    tensors = {"conv.weight": (4, tally(10, 1, 1))}
    profiles = [
        ProfileRecord(1, (0.03, 0.3, 0.30000000000000004, 3.0), (1, 2, 2, 4), 100),
        ProfileRecord(2, (0.03, 0.3, 3.0), (1, 4, 6), 100),
    ]
    (line,) = findings(tensors, profiles, 0.3)
    assert line == (
        "With the same updates R_op would have been 1 % under λ = 0.03 and 5 % under λ = 3; it is "
        "3 % under this run's λ = 0.3 (2 steps, the same for all three)."
    )


def test_where_nothing_opposes_under_any_rate_none_is_told():
    tensors = {"conv.weight": (4, tally(100, 0, 0))}
    assert findings(tensors, [ProfileRecord(1, (0.01, 0.1, 1.0), (0, 0, 0), 100)], 0.1) == []
