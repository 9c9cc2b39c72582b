"""Attaching, auditing and exact measuring step copies; nobody's random numbers or hooks notice."""

import functools
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tests.small import small, train
from wd_probe import OpposingPenaltyProbe, WdProbeWarning, WeightDecay, audit
from wd_probe.decay.aside import generators_of, random_kept, unhooked
from wd_probe.decay.undecayed import undecayed

_OF_THE_MODULE = np.random.default_rng(1)


def _drawn_by_a_function():
    return _OF_THE_MODULE.random()


class Helper:
    def __init__(self, rng):
        self.rng = rng

    def draw(self):
        return self.rng.random()


class Noisy(torch.optim.AdamW):
    """Draws when it is made, and in every step, from ``draw``."""

    def __init__(self, params, draw=None, lr=0.01, weight_decay=0.1, **more):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.draw = draw
        for name, value in more.items():
            self.defaults[name] = value
            for group in self.param_groups:
                group[name] = value
        self.masks = {  # only the class itself makes them
            p: self.noise(group) for group in self.param_groups for p in group["params"]
        }

    def noise(self, group):
        return float(self.draw())

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = p.grad + 0.01 * self.noise(group) * self.masks[p]
        return super().step(closure)


class FromItsClass(Noisy):
    rng = random.Random(3)

    def noise(self, group):
        return self.rng.random()


class FromItsGroup(Noisy):
    def noise(self, group):
        return float(torch.rand((), generator=group["generator"]))


class FromItsModule(Noisy):
    def noise(self, group):
        return _drawn_by_a_function()


_closed_over, _shared = np.random.RandomState(4), np.random.default_rng(5)

DRAWS = {
    "torch": lambda ps: Noisy(ps, lambda: torch.rand(())),
    "numpy": lambda ps: Noisy(ps, np.random.random),
    "python": lambda ps: Noisy(ps, random.random),
    "bound method": lambda ps: Noisy(ps, _shared.random),
    "partial": lambda ps: Noisy(ps, functools.partial(random.Random(2).uniform, 0, 1)),
    "closure": lambda ps, rng=_closed_over: Noisy(ps, lambda: rng.random_sample()),
    "helper": lambda ps: Noisy(ps, Helper(random.Random(6)).draw),
    "class": lambda ps: FromItsClass(ps),
    "group": lambda ps: FromItsGroup(ps, generator=torch.Generator().manual_seed(7)),
    "module": lambda ps: FromItsModule(ps),
}


def states(optimizer):
    """Of every generator that could be drawn from, as text."""
    own = [
        one.get_state().tolist()
        if isinstance(one, torch.Generator)
        else one.getstate()
        if isinstance(one, random.Random)
        else one.get_state()
        if isinstance(one, np.random.RandomState)
        else one.bit_generator.state
        for one in generators_of(optimizer)
    ]
    return repr(
        (
            own,
            random.getstate(),
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
            np.random.get_state()[2],
        )
    )


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_those_of_a_run_without_a_probe(name):
    model = small()
    optimizer = DRAWS[name](model.parameters())
    found = len(generators_of(optimizer))
    assert found == (name != "torch")
    before = states(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WdProbeWarning)
        audit(optimizer, model)
        probe = OpposingPenaltyProbe(model, optimizer, exact=True)
    assert states(optimizer) == before
    train(model, optimizer, 1)
    after = states(optimizer)
    assert after != before
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    undecayed(optimizer)
    assert states(optimizer) == after
    assert len(probe.records) == 1


@pytest.mark.parametrize("method", ["wd", "l2", "rwd"])
@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_those_of_a_run_without_a_method(name, method):
    model = small()
    optimizer = DRAWS[name](model.parameters())
    optimizer.param_groups[0]["weight_decay"] = optimizer.defaults["weight_decay"] = 0.0
    before = states(optimizer)
    WeightDecay(model, optimizer, method, rate=0.1)
    assert states(optimizer) == before


# pytorch_optimizer steps a schedule in its own way, and torch before 2.9 warns of it.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler", "ignore:The epoch parameter")
def test_spam_trains_as_without_a_probe():
    """Its constructor draws masks, and its doubles are made by its constructor."""
    spam = pytest.importorskip("pytorch_optimizer").SPAM
    plain, probed = small(), small()
    with torch.random.fork_rng():
        one = spam(plain.parameters(), lr=0.01, weight_decay=0.1, density=0.5, update_proj_gap=2)
        for _ in range(4):
            train(plain, one, 1)
            drawn = torch.rand(3)
    other = spam(probed.parameters(), lr=0.01, weight_decay=0.1, density=0.5, update_proj_gap=2)
    OpposingPenaltyProbe(probed, other)
    for _ in range(4):
        train(probed, other, 1)
        again = torch.rand(3)
    assert torch.equal(drawn, again)
    assert all(map(torch.equal, plain.parameters(), probed.parameters()))


def test_a_generator_without_a_state_is_passed_over():
    with random_kept([random.SystemRandom(), np.random.PCG64(1)]):
        random.random()


# --- hooks ----------------------------------------------------------------------------------------


@pytest.fixture
def calls():
    """How often hooks on all optimizers have been called, before and after steps."""
    found = [0, 0]

    def count(at):
        def hook(*_):
            found[at] += 1

        return hook

    handles = [
        register_optimizer_step_pre_hook(count(0)),
        register_optimizer_step_post_hook(count(1)),
    ]
    yield found
    for handle in handles:
        handle.remove()


def test_hooks_on_all_optimizers_are_called_for_the_users_steps_alone(calls):
    model = small()
    adam = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    audit(adam, model)
    with pytest.warns(WdProbeWarning, match="measured against a copy"):
        OpposingPenaltyProbe(model, adam, exact=True)
    assert calls == [0, 0]
    train(model, adam, 3)
    assert calls == [3, 3]
    free = small()
    sgd = torch.optim.SGD(free.parameters(), lr=0.1)
    WeightDecay(free, sgd, "wd", rate=0.1)
    assert calls == [3, 3]
    train(free, sgd, 1)
    assert calls == [4, 4]


def test_hooks_are_back_after_a_copy_that_fails(calls):
    class Broken(torch.optim.AdamW):
        def step(self, closure=None):
            raise RuntimeError("out of order")

    model = small()
    broken = Broken(model.parameters())
    audit(broken)
    next(model.parameters()).grad = torch.zeros(16, 8)
    with pytest.raises(RuntimeError, match="out of order"):
        undecayed(broken)
    assert calls == [0, 0]
    with pytest.raises(KeyboardInterrupt), unhooked(), unhooked():
        raise KeyboardInterrupt
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    assert calls == [1, 1]


def test_hooks_of_other_threads_are_called(calls):
    def step():
        p = nn.Parameter(torch.zeros(2))
        p.grad = torch.zeros(2)
        torch.optim.SGD([p], lr=0.1).step()

    with unhooked():
        step()
        other = threading.Thread(target=step)
        other.start()
        other.join()
        assert calls == [1, 1]
        more = register_optimizer_step_pre_hook(lambda *_: calls.append("more"))
    step()
    more.remove()
    step()
    assert calls == [3, 3, "more"]
