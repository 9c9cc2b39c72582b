import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from tests.small import LR, RATE, adamw, batch, loss_of, small, train
from wd_probe import InputError, OpposingPenaltyProbe, WdProbeWarning, WeightDecay
from wd_probe.decay.methods import attached
from wd_probe.hooks import ForwardHooks, Missing, StepHooks, hooked, hooked_all


def test_the_outermost_hooks_run_around_all_others():
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
    optimizer.register_step_pre_hook(lambda *_: seen.append("late pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("late post"))
    ahead = ["before outer", "pre", "before inner", "late pre", "graded outer", "graded inner"]
    for _ in range(2):
        seen.clear()
        train(model, optimizer, 1)
        assert seen == [*ahead, "after inner", "after outer", "post", "late post"]
    for one in both:
        one.remove()
        one.remove()
    seen.clear()
    train(model, optimizer, 1)
    assert seen == ["pre", "late pre", "post", "late post"]


def test_a_step_that_a_hook_stops_leaves_nothing_for_the_next():
    model, seen = small(), []
    optimizer = adamw(model.parameters())
    StepHooks(optimizer, lambda _: None, lambda: None, graded=lambda: seen.append(1))
    stopping = [True]

    def stop(*_):
        if stopping.pop():
            raise ArithmeticError

    once = []
    optimizer.register_step_pre_hook(stop)
    once.append(optimizer.register_step_pre_hook(lambda *_: once.pop().remove() if once else None))
    with pytest.raises(ArithmeticError):
        optimizer.step()
    stopping += [False] * 2
    optimizer.step()
    optimizer.step()
    assert seen == [1, 1]


@pytest.mark.parametrize("name", ["_base_optimizer", "base_optimizer", "optimizer", "optim", "any"])
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


# --- what a step is given, and how it ends --------------------------------------------------------


def with_step(step):
    """SGD whose step takes what ``step`` takes, and gives what it gives."""

    class Taking(torch.optim.SGD):
        pass

    Taking.step = step
    return Taking


@torch.no_grad()
def take(optimizer, closure=None):
    """SGD's step."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.sub_(p.grad, alpha=group["lr"])
    return loss


def by_loss(self, loss):
    take(self)
    return loss


def by_options(self, options=None, *more, closure=None, scale=1.0):
    take(self, closure)
    return options, more, scale


def anything(self, *args, **kwargs):
    take(self, *(one for one in args if callable(one)), **kwargs)
    return args


def named(self, **kwargs):
    take(self, kwargs.get("closure"))
    return kwargs


def second(self, loss, closure=None):
    take(self, closure)
    return loss


def torchs(self, closure=None, extra=None):
    take(self, closure if callable(closure) else None)
    return closure, extra


class Module(nn.Linear):
    """Callable, and no closure."""


LOSS, MODULE = torch.zeros(()), Module(2, 2)
CALLS = {
    "a loss": (by_loss, (LOSS,), {}),
    "a loss by name": (by_loss, (), {"loss": LOSS}),
    "a module": (by_loss, (MODULE,), {}),
    "options": (by_options, ({"a": 1},), {}),
    "options, and more": (by_options, ({"a": 1}, 2, 3), {"scale": 2.0}),
    "none": (torchs, (None,), {}),
    "none by name": (torchs, (), {"closure": None}),
    "a loss where a closure goes": (torchs, (LOSS,), {}),
    "options where a closure goes": (torchs, ({"a": 1}, 2), {}),
    "anything": (anything, (LOSS, 1), {}),
    "names": (named, (), {"loss": LOSS}),
}


def attach(model, optimizer, what):
    if what == "probe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WdProbeWarning)
            return OpposingPenaltyProbe(model, optimizer, exact=True)
    return WeightDecay(model, optimizer, what, rate=0.5)


@pytest.mark.parametrize("what", ["probe", "l2", "wd", "rwd", "pwd"])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_closure_is_passed_on_untouched(name, what):
    step, args, kwargs = CALLS[name]
    model = small()
    optimizer = with_step(step)(model.parameters(), lr=0.1)
    kept = attach(model, optimizer, what)
    plain = with_step(step)([nn.Parameter(torch.zeros(2))], lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(batch(0)[0]).sum().backward()
    given, expected = optimizer.step(*args, **kwargs), plain.step(*args, **kwargs)
    for one, other in zip(leaves(given), leaves(expected), strict=True):
        assert one is other
    assert not any(map(torch.equal, before, model.parameters()))
    assert kept.optimizers == (optimizer,)


def leaves(given):
    """What was passed on, itself."""
    if isinstance(given, tuple):
        return [leaf for one in given for leaf in leaves(one)]
    return list(given.values()) if isinstance(given, dict) else [given]


class Counting:
    """A closure that is an object."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.calls = model, optimizer, 0

    def __call__(self):
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.model(batch(0, torch.float64)[0]).square().mean()
        loss.backward()
        return loss


WAYS = {
    "by place": (torchs, lambda o, c: o.step(c)),
    "by name": (torchs, lambda o, c: o.step(closure=c)),
    "anything": (anything, lambda o, c: o.step(c)),
    "keyword only": (by_options, lambda o, c: o.step({}, closure=c)),
    "second": (second, lambda o, c: o.step(LOSS, c)),
    "second by name": (second, lambda o, c: o.step(LOSS, closure=c)),
    "names": (named, lambda o, c: o.step(closure=c)),
}


@pytest.mark.parametrize("method", ["l1", "l2", "wd", "rwd", "pwd"])
@pytest.mark.parametrize("way", WAYS)
def test_closures_wherever_a_step_takes_them(way, method):
    step, call = WAYS[way]
    runs = []
    for closed in (True, False):
        model = small(torch.float64)
        optimizer = with_step(step)(model.parameters(), lr=0.1)
        WeightDecay(model, optimizer, method, rate=0.5)
        closure = Counting(model, optimizer)
        for _ in range(3):
            if closed:
                call(optimizer, closure)
            else:
                closure()
                call(optimizer, None)
        assert closure.calls == 3
        runs.append(list(model.parameters()))
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["l1", "l2"])
def test_a_closure_called_twice_sees_the_gradients_it_left(method):
    """One that accumulates: λθ is not in them."""
    seen = []

    class Twice(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for _ in range(2):
                with torch.enable_grad():
                    closure()
            return take(self)

    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Twice([p], lr=0.1)
    WeightDecay(nn.ParameterList([p]), optimizer, method, rate=0.5)
    p.grad = own = torch.zeros(2)

    def closure():
        assert p.grad is own
        p.grad += 1
        seen.append(p.grad.clone())

    optimizer.step(closure)
    assert torch.equal(torch.stack(seen), torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    assert p.grad is own
    penalty = torch.tensor([1.0, -2.0]) if method == "l2" else torch.tensor([1.0, -1.0])
    expected = torch.tensor([1.0, -2.0]) - 0.1 * (2 + 0.5 * penalty)
    torch.testing.assert_close(p.detach(), expected)


def test_an_inner_step_that_raises_and_is_caught():
    """As one that falls back on a plain step: it is one step all the same."""
    calls = []

    class Inner(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of order")

    class Outer(Inner):
        def step(self, closure=None):
            with pytest.raises(RuntimeError):
                super().step()
            return take(self)

    p = nn.Parameter(torch.ones(2))
    optimizer = Outer([p], lr=0.1)
    StepHooks(optimizer, lambda _: calls.append("before"), lambda: calls.append("after"))
    for _ in range(2):
        optimizer.step()
    assert calls == ["before", "after"] * 2


def test_a_step_that_stopped_is_told_once():
    calls = []
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    hooks = StepHooks(
        optimizer, lambda _: calls.append("before"), lambda: calls.append("after"),
        stopped=lambda returned: calls.append(returned),
    )  # fmt: skip
    optimizer.register_step_pre_hook(lambda *_: hooks.settle())  # while it is under way
    optimizer.step()
    hooks.settle()
    assert calls == ["before", "after"]

    def stop(*_):
        raise KeyboardInterrupt

    ahead = optimizer.register_step_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    ahead.remove()
    optimizer.step()
    assert calls[2:] == ["before", False, "before", "after"]
    behind = optimizer.register_step_post_hook(stop)
    optimizer._optimizer_step_post_hooks.move_to_end(behind.id, last=False)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    hooks.settle()
    hooks.settle()
    assert calls[6:] == ["before", True]


# --- optimizers that leave the step to another ----------------------------------------------------


class SharpnessAware(torch.optim.Optimizer):
    """As SAM's authors write it: climbs, and leaves the step to another optimizer."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for p in self.params()]).norm()
        for p in self.params():
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad, alpha=self.param_groups[0]["rho"] / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self.params():
            p.data = self.state[p]["old"]
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()

    def params(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


def sharp(model, optimizer, steps, by_closure=False):
    for step in range(steps):
        loss_of(model, step).backward()
        if by_closure:
            optimizer.step(lambda: loss_of(model, step).backward())  # noqa: B023
        else:
            optimizer.first_step()
            loss_of(model, step).backward()
            optimizer.second_step()


@pytest.mark.parametrize("by_closure", [False, True])
@pytest.mark.parametrize("method", ["l2", "wd", "rwd", "pwd"])
def test_sharpness_aware_steps_are_decayed_and_measured_at_the_one_that_steps(method, by_closure):
    model, twin = small(torch.float64), small(torch.float64)
    optimizer = SharpnessAware(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    decay = WeightDecay(model, optimizer, method, rate=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WdProbeWarning)
        probe = OpposingPenaltyProbe(model, optimizer)
    assert decay.optimizers == probe.optimizers == (optimizer.base_optimizer,)
    sharp(model, optimizer, 4, by_closure)
    assert [record.step for record in probe.records] == [1, 2, 3, 4]
    assert {record.penalized for record in probe.records} == {212}
    by_hand = SharpnessAware(twin.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    weights = list(twin.parameters())
    for step in range(4):
        if method == "pwd":  # once, ahead of the first of the two forward passes
            with torch.no_grad():
                torch._foreach_mul_(weights, 1 - 0.05)
        loss_of(twin, step).backward()
        by_hand.first_step()
        loss_of(twin, step).backward()
        with torch.no_grad():
            theta = [by_hand.state[p]["old"].clone() for p in weights]
            if method == "l2":
                torch._foreach_add_([p.grad for p in weights], theta, alpha=0.5)
            by_hand.second_step()
            if method == "wd":
                torch._foreach_add_(weights, theta, alpha=-0.05)
            if method == "rwd":
                torch._foreach_mul_(weights, 1 - 0.05)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_its_own_decay_is_found_at_the_one_that_steps():
    model = small()
    optimizer = SharpnessAware(model.parameters(), torch.optim.AdamW, lr=0.05, weight_decay=0.3)
    probe = OpposingPenaltyProbe(model, optimizer)
    sharp(model, optimizer, 3)
    assert [record.penalized for record in probe.records] == [212] * 3
    with pytest.raises(InputError, match="decays by itself"):
        WeightDecay(model, optimizer, "wd", rate=0.1)


class Plain:
    """A wrapper that is no optimizer, as Lightning's."""

    def __init__(self, optimizer):
        self._optimizer = optimizer


class Both(torch.optim.Optimizer):
    """One for matrices, and one for the rest."""

    def __init__(self, params):
        params = list(params)
        super().__init__(params, {})
        self.inner = [
            torch.optim.SGD([p for p in params if p.ndim > 1], lr=0.1),
            torch.optim.Adam([p for p in params if p.ndim < 2], lr=0.1),
        ]

    def step(self, closure=None):
        for one in self.inner:
            one.step()


def test_wrappers_of_several_kinds():
    accelerate = pytest.importorskip("accelerate")
    package = pytest.importorskip("pytorch_optimizer")
    model = small()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrapper in (
        accelerate.Accelerator().prepare_optimizer(inner),
        package.Lookahead(inner),
        package.OrthoGrad(inner),
        Plain(inner),
        Plain(package.Lookahead(inner)),
    ):
        assert hooked(wrapper) is inner
    both = Both(model.parameters())
    assert hooked_all(both) == tuple(both.inner)
    with pytest.raises(InputError, match=r"Both holds several that step \(SGD, Adam\)"):
        hooked(both)
    with WeightDecay(model, both, "wd", rate=0.5):
        probe = OpposingPenaltyProbe(model, both)
        train(model, both, 3)
    assert [record.penalized for record in probe.records] == [212] * 3


def test_an_optimizer_that_steps_more_than_it_leaves_to_another_is_hooked_itself():
    class Partly(torch.optim.SGD):
        def __init__(self, params):
            params = list(params)
            super().__init__(params, lr=0.1)
            self.helper = torch.optim.SGD(params[:1], lr=0.1)

    partly = Partly(small().parameters())
    assert hooked(partly) is partly


# --- steps that are never seen --------------------------------------------------------------------


def unseen(model, steps, every=1):
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        loss_of(model, step).backward()
        if step % every == every - 1:
            other.step()
            other.zero_grad()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("what", ["probe", "wd", "rwd", "l2", "pwd"])
def test_weights_that_move_without_a_step_are_told_once(what, every):
    model = small()
    idle = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = attach(model, idle, what)
    said = "R_op is not measured" if what == "probe" else f"{what} takes nothing off"
    match = rf"the weights move, and in \d+ backward passes no step\(\) of SGD was seen: {said}"
    with pytest.warns(WdProbeWarning, match=match) as told:
        unseen(model, 6 * every, every)
    assert len(told) == 1
    assert kept.optimizers == (idle,)


@pytest.mark.parametrize("read", [lambda probe: probe.records, lambda probe: probe.close()])
def test_two_steps_that_are_not_seen_are_told_when_the_probe_is_read(read):
    model = small()
    probe = OpposingPenaltyProbe(model, adamw(model.parameters()))
    unseen(model, 2)
    with pytest.warns(WdProbeWarning, match=r"no step\(\) of AdamW was seen"):
        read(probe)
    decay = WeightDecay(model, torch.optim.SGD(model.parameters()), "wd", rate=0.1)
    unseen(model, 2)
    with pytest.warns(WdProbeWarning, match="wd takes nothing off"):
        decay.detach()


def test_a_weight_without_dimensions_is_looked_at():
    net = nn.Module()
    net.scale = nn.Parameter(torch.tensor(1.5))
    idle = torch.optim.SGD(net.parameters(), lr=0.1)
    other = torch.optim.SGD(net.parameters(), lr=0.1)
    probe = OpposingPenaltyProbe(net, torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=RATE))
    decay = WeightDecay(net, idle, "wd", rate=0.1)

    def unseen_steps():
        for _ in range(6):
            net.scale.square().backward()
            other.step()

    with pytest.warns(WdProbeWarning, match="the weights move, and in") as told:
        unseen_steps()
    assert len(told) == 2
    assert not probe.records
    decay.detach()


@pytest.mark.parametrize(
    "values",
    [
        torch.arange(1.0, 13.0).view(6, 2)[:, 0],
        torch.arange(1.0, 25.0).view(4, 6).T,
        torch.ones(1).expand(5),
        torch.ones(8, dtype=torch.float64)[::3],
    ],
    ids=["every other", "transposed", "expanded", "every third"],
)
def test_weights_with_gaps_are_looked_at(values):
    net = nn.Module()
    net.scale = nn.Parameter(values)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=RATE, foreach=False)
    probe = OpposingPenaltyProbe(net, optimizer)
    for _ in range(3):
        net.scale.square().sum().backward()
    assert not probe.records

    def move():
        for _ in range(6):
            net.scale.square().sum().backward()
            net.scale.data = net.scale.data * 0.9

    with pytest.warns(WdProbeWarning, match="the weights move, and in"):
        move()


def test_a_weight_whose_numbers_cannot_be_read_trains_on(monkeypatch):
    model = small()
    optimizer = adamw(model.parameters())
    probe = OpposingPenaltyProbe(model, optimizer)
    monkeypatch.setattr(Missing, "_place", lambda _: 1 / 0)
    train(model, optimizer, 2)
    assert len(probe.records) == 2


def test_weights_that_move_for_other_reasons_are_not_told():
    """Loaded ahead of training, by SAM's climb, in a copy that trains elsewhere."""
    model = small()
    saved = copy.deepcopy(model.state_dict())
    optimizer = SharpnessAware(model.parameters(), torch.optim.AdamW, lr=0.05, weight_decay=0.3)
    probe = OpposingPenaltyProbe(model, optimizer)
    with torch.no_grad():
        next(model.parameters()).zero_()
    model.load_state_dict(saved)
    for _ in range(6):  # climbs at every one, to come back
        loss_of(model, 0).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.first_step()
        loss_of(model, 1).backward()
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p.data = optimizer.state[p]["old"]
                p.grad += g
    assert not probe.records
    unseen(copy.deepcopy(model), 6)
    optimizer.base_optimizer.step()
    assert len(probe.records) == 1
    unseen(model, 6)  # a step was seen
    pickle.loads(pickle.dumps(probe)).close()
