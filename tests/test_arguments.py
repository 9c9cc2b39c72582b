"""Whatever is wrong with an argument, the message names it."""

import math
import re

import pytest
import torch
from torch import nn

import wd_probe
from tests.small import small
from wd_probe import InputError, OpposingPenaltyProbe, ScanPoint, WeightDecay

MODEL = small()
ADAMW = torch.optim.AdamW(MODEL.parameters())
SGD = torch.optim.SGD(MODEL.parameters(), lr=0.1)
IMAGES = [torch.ones(2, 8)]


def evaluate(_):
    return {"top1": 1.0}


CURVE = [ScanPoint(0, 1.0, {"top1": 1.0}), ScanPoint(1, 0.0, {"top1": 0.0})]
GOOD = {
    OpposingPenaltyProbe: {"model": MODEL, "optimizer": ADAMW},
    WeightDecay: {"model": MODEL, "optimizer": SGD, "method": "lpwd"},
    wd_probe.audit: {"optimizer": ADAMW},
    wd_probe.layers: {"model": MODEL},
    wd_probe.layerwise_rates: {"n": 3, "rate": 0.1},
    wd_probe.zero_shot_decay: {"model": MODEL, "evaluate": evaluate, "steps": 1},
    wd_probe.half_life: {"model": MODEL, "evaluate": evaluate, "curve": CURVE},
    wd_probe.feature_distortion: {"model": MODEL, "batches": IMAGES, "scales": [0.5]},
}
COUNT = [0, -3, 1.5, "2", None, math.nan]
RATE = [-1, math.nan, math.inf, "0.1", None, torch.ones(2)]
MODELS = [None, [MODEL], "net", 3]
OPTIMIZERS = [None, "adamw", [], [ADAMW, "sgd"], MODEL]
GROUPS = [3, "0", (), [("0.weight", "0.bias")]]
NAMES = [3, "0.weight", ["head"], [MODEL[0].weight]]
BAD = {
    OpposingPenaltyProbe: {
        "model": MODELS,
        "optimizer": [*OPTIMIZERS, [ADAMW, ADAMW], SGD.__class__(nn.Linear(2, 2).parameters())],
        "every": COUNT,
        "profile": [0.1, None, [0.1, -1], [math.nan], ["0.1"]],
        "profile_every": COUNT,
        "groups": GROUPS,
        "exact": ["yes", 2],
        "reading": ["free", None, 3],
        "parameters": [["0.weight"], 3, {"0.weight": 3}],
        "keep": ["some", None, 3],
        "history": [1, *COUNT],
    },
    WeightDecay: {
        "model": MODELS,
        "optimizer": [*OPTIMIZERS, [SGD, SGD]],
        "method": ["decay", None, 3],
        "rate": RATE,
        "scale": ["steep", "", 3],
        "convention": ["eta", None],
        "parameters": NAMES,
        "groups": GROUPS,
    },
    wd_probe.audit: {"optimizer": [None, "adamw", MODEL], "model": MODELS[1:]},
    wd_probe.layers: {"model": MODELS},
    wd_probe.layerwise_rates: {"n": COUNT, "rate": RATE, "scale": ["steep", None, 3]},
    wd_probe.zero_shot_decay: {
        "model": MODELS,
        "evaluate": [None, 3, lambda _: 0.5],
        "steps": COUNT,
        "parameters": NAMES,
        "on_point": [3, "print"],
    },
    wd_probe.half_life: {
        "model": MODELS,
        "evaluate": [None, 3],
        "curve": [[], None, 3, [0.5]],
        "metric": ["loss", None, 3],
        "chance": [math.nan, math.inf, "0.1", None],
        "tolerance": RATE,
        "parameters": NAMES,
    },
    wd_probe.feature_distortion: {
        "model": MODELS,
        "batches": [[], None, 3],
        "scales": [[], None, 0.5, [math.nan], ["0.5"]],
        "groups": GROUPS,
    },
}
CASES = [
    pytest.param(call, name, value, id=f"{call.__name__}-{name}-{number}")
    for call, arguments in BAD.items()
    for name, values in arguments.items()
    for number, value in enumerate(values)
]


@pytest.mark.parametrize(("call", "name", "value"), CASES)
def test_the_message_names_the_argument(call, name, value):
    with pytest.raises(InputError, match=rf"\b{re.escape(name)}s?\b") as told:
        call(**GOOD[call] | {name: value})
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 250


@pytest.mark.parametrize("call", GOOD)
def test_without_it_nothing_is_wrong(call):
    found = call(**GOOD[call])
    if isinstance(found, WeightDecay):
        found.detach()


def test_what_is_echoed_is_cut():
    with pytest.raises(InputError, match=r"rate must be .*\.\.\.$") as told:
        wd_probe.layerwise_rates(3, "1" * 5000)
    assert len(str(told.value)) < 150
    with pytest.raises(InputError, match="a number of very many digits"):
        wd_probe.layerwise_rates(3, 10**5000)
    with pytest.raises(InputError, match=r"unknown method 'x+\.\.\.; choose from baseline"):
        WeightDecay(MODEL, SGD, "x" * 5000)
