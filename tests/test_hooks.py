import copy
import pickle

import pytest
import torch

from tests.small import LR, RATE, adamw, loss_of, small, train
from wd_probe import InputError, OpposingPenaltyProbe, WeightDecay
from wd_probe.decay.methods import attached
from wd_probe.hooks import ForwardHooks, StepHooks, hooked


def test_the_outermost_hooks_run_before_and_after_all_others():
    model = small()
    optimizer = adamw(model.parameters())
    seen = []

    def hooks(name, **options):
        return StepHooks(
            optimizer,
            lambda has_closure: seen.append(f"before {name}"),
            lambda: seen.append(f"after {name}"),
            graded=lambda: seen.append(f"graded {name}"),
            **options,
        )

    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    both = hooks("inner"), hooks("outer", outermost=True)
    train(model, optimizer, 1)
    ahead = ["before outer", "graded outer", "pre", "before inner", "graded inner"]
    assert seen == [*ahead, "after inner", "post", "after outer"]
    for one in both:
        one.remove()
        one.remove()
    seen.clear()
    train(model, optimizer, 1)
    assert seen == ["pre", "post"]


@pytest.mark.parametrize("name", ["_base_optimizer", "base_optimizer", "optimizer"])
def test_a_wrapper_is_seen_through(name):
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            setattr(self, name, inner)

        def step(self, closure=None):
            getattr(self, name).step(closure)

    inner = adamw(small().parameters())
    assert hooked(Wrapper(inner)) is hooked(Wrapper(Wrapper(inner))) is inner
    with pytest.raises(InputError, match="Wrapper does not call torch's step hooks"):
        hooked(Wrapper("nothing"))


def test_forward_hooks_stay_on_the_model_and_on_what_the_loop_calls():
    model = small()
    calls = []
    hooks = ForwardHooks(model, lambda: calls.append(1))
    model.eval()(torch.ones(1, 8))
    assert not calls
    model.train()
    model[2](torch.ones(1, 16))
    assert [len(module._forward_pre_hooks) for module in model.modules()] == [1, 0, 0, 1]
    model(torch.ones(1, 8))
    assert [len(module._forward_pre_hooks) for module in model.modules()] == [1, 0, 0, 0]
    assert len(calls) == 2
    hooks.remove()
    hooks.remove()
    model(torch.ones(1, 8))
    assert len(calls) == 2


def test_a_subclass_that_calls_super_is_measured_and_decayed_once():
    class Louder(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = small()
    twin = copy.deepcopy(model)
    optimizer, plain = (
        kind(m.parameters(), lr=0.1, momentum=0.9)
        for kind, m in ((Louder, model), (torch.optim.SGD, twin))
    )
    WeightDecay(model, optimizer, "wd", rate=0.3)
    WeightDecay(twin, plain, "wd", rate=0.3)
    with OpposingPenaltyProbe(model, optimizer) as probe:
        train(model, optimizer, 4)
    train(twin, plain, 4)
    assert [r.step for r in probe.records] == [1, 2, 3, 4]
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("method", ["wd", "rwd", "lpwd", "l2"])
def test_methods_on_a_compiled_step(method):
    def run(compiled):
        torch._dynamo.reset()
        model = small()
        # One by one, torch 2.7 rounds otherwise where it is compiled.
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, foreach=True)
        WeightDecay(model, optimizer, method, rate=RATE)
        step_it = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for step in range(5):
            loss_of(model, step).backward()
            step_it()
            optimizer.zero_grad()
        return list(model.parameters())

    assert all(map(torch.equal, run(False), run(True)))


def test_deepcopy_of_an_optimizer_is_not_attached():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = WeightDecay(model, optimizer, "wd", rate=0.1)
    assert attached(optimizer) is decay
    assert attached(copy.deepcopy(optimizer)) is None
    decay.detach()
    assert attached(optimizer) is None


def test_a_notebook_that_runs_its_cell_twice():
    """The first probe goes with the name that held it, its hooks with it."""
    model = small()
    optimizer = adamw(model.parameters())
    for _ in range(5):
        probe = OpposingPenaltyProbe(model, optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert len(optimizer._optimizer_step_post_hooks) == 1
    train(model, optimizer, 2)
    assert [record.step for record in probe.records] == [1, 2]
    decay_free = small()
    other = torch.optim.SGD(decay_free.parameters(), lr=0.1)
    WeightDecay(decay_free, other, "wd", rate=0.1)
    with pytest.raises(InputError, match=r"has a WeightDecay already; detach\(\) that one first"):
        WeightDecay(decay_free, other, "wd", rate=0.1)


def test_copies_and_pickles_carry_no_probe():
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    copied_model, copied = copy.deepcopy((model, optimizer))
    unpickled_model, unpickled = pickle.loads(pickle.dumps((model, optimizer)))
    for net, one in ((copied_model, copied), (unpickled_model, unpickled)):
        train(net, one, 1)
    assert not probe.records
    train(model, optimizer, 1)
    assert len(probe.records) == 1
    assert all(map(torch.equal, model.parameters(), copied_model.parameters()))
