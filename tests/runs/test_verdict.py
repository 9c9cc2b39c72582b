"""The sentences, from numbers alone."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wd_probe.probe.records import Tally, pooled
from wd_probe.runs.states import Part, States
from wd_probe.runs.verdict import BatchNorms, Setting, verdict

WEIGHTS, STEPS = 1000, 100
NAN = math.nan
RUN = Setting(0.01, 1e-4, "wd", "adamw", 0.9, STEPS, 20)


def tally(c, remaining, balance, angle=0.01, weights=WEIGHTS, **more):
    """As of so many steps that all took c off, with Σx² = 1 at each."""
    known = {
        "penalized": weights * STEPS, "opposing": 0, "flipped": 0, "nonfinite": 0,
        "opposing_penalty": 0.0, "total_penalty": 1.0, "squared": STEPS, "along": 0.0,
        "moved": STEPS * math.tan(angle) ** 2, "growth": balance * 2 * c * STEPS,
        "taken": 2 * c * STEPS, "updated": STEPS * angle**2, "decayed": weights * STEPS,
        "shares": c * weights * STEPS, "squared_norm": 1.0, "left": remaining * weights,
        "held": weights,
    }  # fmt: skip
    return Tally(**known | more)


def part(name="conv.weight", kind="matrices and kernels", dtype="float32", **known):
    whole = tally(**{"c": 1e-6, "remaining": 0.9999, "balance": 1.0} | known)
    return Part(name, whole, whole, whole, kind, dtype)


def told(*parts, setting=RUN):
    run = part()
    whole = parts[0].whole if len(parts) == 1 else run.whole
    return verdict(States(replace(run, whole=whole, late=whole, last=whole), parts, parts), setting)


def test_idle_and_the_rate_that_would_act():
    setting = replace(RUN, steps=88, steps_per_epoch=22)
    assert told(part(remaining=(1 - 1e-6) ** 88, balance=3.0), setting=setting) == [
        "Decay did nothing in this run: it took 0.0088 % off (its timescale 1/(ηλ) is 1,000,000 "
        "steps, the run had 88). To act within such a run λ (`--weight-decay`) would have to be "
        "near 114 at this η; else train longer or leave it."
    ]
    # and at that rate it does: 1/(ηλ) is then the run's length
    assert pytest.approx(88, rel=0.01) == 1 / (1e-4 * 114)


def test_little_is_not_nothing():
    (line,) = told(part(c=4e-4, remaining=0.961), setting=replace(RUN, rate=4.0))
    assert line.startswith("Decay did little in this run: it took 3.9 % off")
    assert "near 100 at this η" in line


def test_one_step_names_no_rate():
    (line,) = told(part(remaining=1 - 1e-6), setting=replace(RUN, steps=1))
    assert "the run had 1). So short a run cannot tell more: train longer" in line
    assert "would have to be" not in line


def test_the_timescale_is_named_by_what_it_is():
    assert "1/λ is 200 steps" in told(part(c=0.005), setting=replace(RUN, rate=0.005, lr=0.1))[0]
    scheduled = told(part(c=3e-7), setting=RUN)[0]
    assert "its timescale 1/c is 3,330,000 steps" in scheduled
    assert "near 333; else" in scheduled, "η was not what it was set to"


def test_too_small_for_float32():
    setting = replace(RUN, rate=1e-5)
    lost = part(c=1e-9, remaining=1 - 1e-7)
    assert told(lost, setting=setting) == [
        "Decay did nothing in this run: c = 1e-09 is too small for float32, where (1 − c)θ rounds "
        "back to θ below 3e-08; raise λ (`--weight-decay`) or leave it."
    ]
    assert "rounds" not in told(replace(lost, dtype="float64"), setting=setting)[0]


def test_nothing_taken_off():
    nothing = part(c=0.0, remaining=1.0, balance=0.0, taken=0.0)
    assert told(nothing) == [
        "Nothing was taken off in this run, although λ is 0.01: `wdprobe audit --opt adamw` says "
        "why."
    ]
    assert told(nothing, setting=Setting()) == ["Nothing was taken off in this run."]


def test_weights_that_decay_has_taken_whole():
    whole = tally(0.2, 1e-30, 0.1)
    late = replace(whole, squared=0.0, along=0.0, moved=0.0, growth=0.0, taken=0.0)
    gone = Part("conv.weight", whole, late, late, "matrices and kernels", "float32")
    assert told(gone, setting=replace(RUN, lr=0.1, rate=2.0)) == [
        "Decay has shrunk the weights to nothing in its only layer (its timescale 1/(ηλ) is 5 "
        "steps, the run had 100): lower λ (`--weight-decay`)."
    ]


counts = st.integers(0, 1000)
sizes = st.sampled_from([0.0, 1e-300, 1e-30, 1e-4, 0.5, 1.0, 3.0, 1e30, NAN])


def consistent(numbers, amounts, growth, c, remaining, decayed, held):
    return Tally(
        *numbers, *amounts[:5], growth=growth * amounts[5], taken=amounts[5], updated=amounts[6],
        decayed=decayed, shares=c * decayed, left=remaining * held, held=held,
    )  # fmt: skip


tallies = st.builds(
    consistent,
    st.tuples(*[counts] * 4),
    st.tuples(*[sizes] * 7),
    st.sampled_from([-1e3, 0.0, 1e-9, 0.5, 1.0, 1e9]),
    st.sampled_from([0.0, 1e-12, 1e-3, 0.5, 1.0]),
    st.floats(0, 1),
    counts,
    st.integers(0, 3),
)
settings = st.builds(
    Setting,
    st.sampled_from([0.0, 1e-4, 3.0]),
    st.sampled_from([0.0, 1e-4, 1.0, NAN]),
    st.sampled_from(["wd", "l2", "cautious", "none", "pwd"]),
    st.just("adamw"),
    st.sampled_from([0.0, 0.9, NAN]),
    st.integers(1, 1000),
    st.sampled_from([NAN, 3.0]),
    st.booleans(),
    st.none()
    | st.builds(
        BatchNorms,
        st.integers(1, 200),
        st.sampled_from([1.0, 0.1, 1e-4]),
        st.sampled_from([frozenset(), frozenset("a")]),
    ),
)
kinds = st.sampled_from(["matrices and kernels", "biases", "norm weights"])
parts = st.builds(
    Part, st.just("a"), tallies, tallies, tallies, kinds, st.sampled_from(["float32", "bfloat16"])
)


@given(st.lists(parts, min_size=1, max_size=5), settings)
def test_whatever_was_measured_a_verdict_is_told_in_numbers(each, setting):
    run = Part("", *(pooled(tallies) for tallies in zip(*map(_tallies, each), strict=True)))
    states = States(run, tuple(each), tuple(each))
    for sentence in verdict(states, setting):
        assert not re.search(r"\b(nan|inf)\b", sentence), sentence
    states.json(setting.steps_per_epoch, setting.beta)


def _tallies(part):
    return part.whole, part.late, part.last


def shrinking(name, kind, share, last_c=0.01):
    """Weights whose size falls by a share a step, while decay takes c = 0.01 off, at last another.

    |y|² = (1 − share)²|x|², all of it along x.
    """
    held = part(
        name, kind, c=0.01, remaining=0.5, balance=0.1, along=-share * STEPS,
        moved=share**2 * STEPS,
    )  # fmt: skip
    return replace(held, last=replace(held.last, shares=last_c * WEIGHTS * STEPS))


def test_decay_that_outruns_batch_norm():
    """Of 20 layers each divides by sqrt(v/σ²) too much; σ² falls as kernel and norm do."""
    norms = BatchNorms(20, 0.1, frozenset({"bn.weight"}))
    setting = replace(RUN, in_code=True, batch_norms=norms)
    kernel = shrinking("conv.weight", "matrices and kernels", 2e-3)
    scale = shrinking("bn.weight", "norm weights", 1e-3)
    variance = running = 1.0
    for _ in range(400):
        variance *= ((1 - 2e-3) * (1 - 1e-3)) ** 2
        running = 0.9 * running + 0.1 * variance
    times = (running / variance) ** (20 / 2)
    line = told(kernel, scale, setting=setting)[-1]
    assert line == (
        "Decay outruns batch norm: in the 10 steps that its running statistics remember, weights "
        f"ahead of each of its 20 layers shrink by 2.96 %, so in evaluation outputs are some "
        f"{times:.2g} times too small, and scores may be too low. Take the statistics anew before "
        "you evaluate (`torch.optim.swa_utils.update_bn`), or let η fall to 0 first."
    )
    other = shrinking("layer_norm.weight", "norm weights", 0.04)
    assert told(kernel, scale, other, setting=setting)[-1] == line


def outruns(*parts, **known):
    norms = BatchNorms(**{"layers": 20, "momentum": 0.1, "weights": frozenset()} | known)
    lines = told(*parts, setting=replace(RUN, in_code=True, batch_norms=norms))
    return [line for line in lines if "outruns" in line]


def test_where_batch_norm_keeps_up_nothing_is_told():
    kernel = shrinking("conv.weight", "matrices and kernels", 3e-3)
    assert outruns(kernel)
    assert not outruns(kernel, layers=5)
    assert not outruns(kernel, momentum=0.5)
    assert not outruns(replace(kernel, last=replace(kernel.last, shares=0.0)))
    assert not outruns(shrinking("conv.weight", "matrices and kernels", 3e-3, last_c=1e-3))
    assert not outruns(shrinking("conv.weight", "matrices and kernels", -3e-3))  # that grow
    assert "outputs are by far too small" in outruns(kernel, momentum=1e-3)[0]
    lines = told(kernel, setting=replace(RUN, in_code=True))
    assert not any("outruns" in line for line in lines)


def test_balanced_and_the_angle_of_equilibrium():
    c = 0.01
    angle = math.sqrt(2 * c * 0.1 / 1.9)
    found = part(c=c, remaining=0.05, balance=0.97, angle=0.93 * angle)
    assert told(found) == [
        "Decay is in balance in its only layer: their size no longer depends on where they "
        "started, and λ (`--weight-decay`) now sets how fast they turn (angle per step 0.03, 93 % "
        "of what equilibrium predicts)."
    ]
    unknown = told(found, setting=replace(RUN, momentum=NAN))[0]
    assert unknown.endswith("(angle per step 0.03).")
    early = told(part(c=c, remaining=0.6, balance=1.1))[0]
    assert "no longer depends" not in early
    assert "60 % of what stood at the start is left" in early


def test_shrinking_and_how_far_balance_is():
    found = part(c=0.001, remaining=0.55, balance=0.06)
    setting = replace(RUN, rate=1.0, lr=1e-3, steps=600)
    (line,) = told(found, setting=setting)
    assert line.startswith(
        "Decay shrinks the weights in its only layer: 55 % of what stood at the start is left, and "
        "the steps give back 6 % of what it takes (its timescale 1/(ηλ) is 1,000 steps, the run "
        "had 600)."
    )
    # |x|² under a constant growth, step by step, until the balance is 0.8
    square, growth, steps = 1.0, 0.06 * 2 * 0.001, 0
    while growth / (2 * 0.001 * square) < 0.8:
        square, steps = square * (1 - 0.001) ** 2 + growth, steps + 1
    assert f"balance is about {float(f'{steps:.2g}'):,.15g} steps (100 epochs) away" in line
    nothing = told(part(c=0.001, remaining=0.55, balance=-0.2), setting=setting)[0]
    assert "the steps give nothing back" in nothing
    assert "away" not in nothing


def test_growing_and_the_rate_that_would_hold():
    setting = replace(RUN, rate=2.0, lr=1e-3)
    (line,) = told(part(c=0.002, remaining=0.8, balance=3.0), setting=setting)
    assert "the steps add 3 times what it takes off" in line
    assert line.endswith("λ (`--weight-decay`) would have to be near 6.")


def test_l2_is_told_with_what_momentum_carries_on():
    setting = replace(RUN, rule="l2", momentum=0.9)
    (idle,) = told(part(c=1e-5, remaining=0.999), setting=setting)
    assert "Decay did nothing" in idle
    assert "0.1 % off in their own steps, and about 0.996 %" in idle
    (acts,) = told(part(c=1e-4, remaining=0.98), setting=setting)
    assert "Decay acts in this run" in acts, "0.98¹⁰ is 0.82"
    assert "would have to be" not in idle + acts
    (shrinks,) = told(part(c=1e-3, remaining=0.9, balance=-5.0), setting=setting)
    assert "about 34.9 % with what momentum carries on" in shrinks
    assert "give" not in shrinks, "what momentum carries on is in G"
    (unknown,) = told(part(), setting=replace(RUN, rule="other"))
    assert unknown.endswith("To act it needs a larger λ (`--weight-decay`) or a longer run.")


def test_sizes_that_were_not_measured():
    found = part(c=0.02, remaining=0.4, balance=NAN, taken=NAN, squared=NAN, moved=NAN,
                 squared_norm=NAN, total_penalty=NAN)  # fmt: skip
    assert found.state is None
    assert told(found) == [
        "Decay took 60 % off (its timescale 1/c is 50 steps, the run had 100); whether the "
        "weights shrink, hold or grow was not measured, since their sizes were not kept: "
        "keep='whole' measures it."
    ]


def test_weights_that_are_not_finite():
    lost = part(c=0.01, remaining=0.4, balance=0.0, taken=0.0, squared=0.0, moved=0.0,
                nonfinite=WEIGHTS, penalized=0)  # fmt: skip
    assert told(lost) == ["The weights are not finite, so what decay did to them cannot be told."]


def test_opposing_penalties():
    def line(carried):
        return told(part(opposing=60, opposing_penalty=carried))[1:]

    assert line(9e-7) == [
        "Opposing penalties are harmless here: 0.06 % of the weights carry 0.00009 % of what is "
        "taken off."
    ]
    assert "matter little" in line(0.005)[0]
    assert "not harmless" in line(0.02)[0]
    assert "`--method rwd`" in line(0.02)[0]
    assert told(part(opposing=60, total_penalty=NAN))[1:] == []


def layers(*angles):
    return [part(f"layer{k}", angle=angle) for k, angle in enumerate(angles, 1)]


def test_layers_that_turn_apart():
    assert told(*layers(0.01, 0.011, 0.012, 0.0008))[1:] == [
        "`layer4` turns 13 times slower than the median layer."
    ]
    assert told(*layers(0.01, 0.1, 0.012, 0.01))[1:] == [
        "`layer2` turns 9 times faster than the median layer."
    ]
    assert told(*layers(0.01, 0.02, 0.03, 0.04))[1:] == []
    assert told(*layers(0.01, 0.0001, 0.01))[1:] == []


def test_biases_and_norms_where_that_shows():
    matrix = part(c=0.01, remaining=0.5)
    bias = part("conv.bias", "biases", c=0.01, remaining=0.5, weights=10)
    assert told(matrix, bias)[-1] == (
        "Biases and norms decay too, 50 % is taken off them: `--filter-bias-and-bn` leaves them "
        "out."
    )
    assert len(told(matrix)) == len(told(part(), part("b", "biases"))) == 1
    assert len(told(matrix, part("conv.bias", "biases", weights=0))) == 1


def test_decay_lost_to_rounding():
    coarse = part(dtype="bfloat16", c=0.0, remaining=1.0, penalized=0)
    assert told(coarse)[1] == (
        "In bfloat16 (1 − c)θ rounds back to θ: 100 % of the decays are lost there; keep the "
        "weights in float32 (`--amp` computes in less and does)."
    )
    assert len(told(coarse, setting=replace(RUN, lr=0.0))) == 1
    assert len(told(part(dtype="bfloat16"))) == 1


def test_a_run_goes_by_most_of_its_weights():
    small = [part(f"norm{k}", c=0.01, remaining=0.1, balance=0.1, weights=10) for k in range(3)]
    large = part("head", c=0.01, remaining=0.1, balance=1.0)
    whole = tally(c=0.01, remaining=0.1, balance=0.9, weights=1030)
    run = replace(large, whole=whole, late=whole, last=whole)
    line = verdict(States(run, (*small, large), (*small, large)), RUN)[0]
    assert line.startswith("Decay is in balance in 1 of 4 layers, 97 % of the weights:")


def test_in_a_loop_of_ones_own_code_is_named_in_the_place_of_options():
    idle = part(remaining=(1 - 1e-6) ** 88, balance=3.0)
    (line,) = told(idle, setting=replace(RUN, in_code=True))
    assert "To act within such a run λ (`weight_decay`) would have to be near" in line
    norms = part("bn.weight", "norm weights", c=0.01, remaining=0.5, balance=0.1)
    lines = told(
        part(c=0.01, remaining=0.5, balance=0.1), norms, setting=replace(RUN, in_code=True)
    )
    assert any(
        "a parameter group of theirs with `weight_decay=0` leaves them out" in s for s in lines
    )
    assert not any("`--" in sentence for sentence in (line, *lines))
