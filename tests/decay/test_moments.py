"""When decay falls, and that it falls once for every step, wherever one may stop."""

import copy
import sys

import pytest
import torch
from torch import nn

from wd_probe import WeightDecay
from wd_probe.decay.methods import METHODS
from wd_probe.decay.updates import Updates

LR, RATE = 0.1, 0.5
_TRACED = ("/wd_probe/", "/torch/optim/optimizer.py", "/torch/optim/sgd.py", __file__)


class Stopped:
    """Runs a call, and raises KeyboardInterrupt in its line number ``at``, as Ctrl-C would."""

    def __init__(self, at=None):
        self.at, self.lines = at, 0

    def __call__(self, call):
        """Whether it was stopped."""

        def trace(frame, event, _):
            if not any(part in frame.f_code.co_filename for part in _TRACED):
                return None
            if event == "line":
                self.lines += 1
                if self.lines == self.at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
            torch.set_grad_enabled(True)  # torch itself may leave it off
        return False


class Reading(torch.optim.Optimizer):
    """Its step reads the weights: θ' = θ − η|θ|g."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.abs() * p.grad, alpha=group["lr"])
        return loss


class Silent(torch.optim.Optimizer):
    """SGD that leaves no trace in the versions of the weights."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.sub_(p.grad, alpha=group["lr"])


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=LR),
    "adam": lambda ps: torch.optim.Adam(ps, lr=LR),
    "fused": lambda ps: torch.optim.Adam(ps, lr=LR, fused=True),
    "reading": lambda ps: Reading(ps, lr=LR),
    "silent": lambda ps: Silent(ps, lr=LR),
}


class Linearly(nn.Module):
    """Two tensors whose gradients are always the same."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Module(), nn.Module()
        self.one.p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
        self.other.p = nn.Parameter(torch.tensor([[0.5], [-0.25]], dtype=torch.float64))

    def forward(self):
        pulled = self.one.p * torch.tensor([0.3, 0.1, -0.7])
        return pulled.sum() + (self.other.p * 0.9).sum()


@pytest.fixture(autouse=True)
def _tried_once(monkeypatch):
    updates = Updates()
    monkeypatch.setattr("wd_probe.decay.methods.Updates", lambda: updates)


def made(opt, method):
    model = Linearly()
    optimizer = OPTIMIZERS[opt](model.parameters())
    return model, optimizer, WeightDecay(model, optimizer, method, rate=RATE)


def backward(model, times=1):
    for _ in range(times):
        model().backward()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def lines(call):
    count = Stopped()
    assert not count(call)
    return count.lines


SOME = [
    *((method, "sgd") for method in METHODS),
    *((method, opt) for method in ("wd", "rwd") for opt in ("adam", "fused", "reading", "silent")),
]


#: Every fifth line, others for each method; all of them where there is time.
STRIDES = pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])


def chosen(count, stride, method, opt):
    first = 1 + sum(map(ord, method + opt)) % stride
    return range(first, count + 1, stride)


@STRIDES
@pytest.mark.parametrize(("method", "opt"), SOME)
def test_a_step_stopped_anywhere_and_taken_again_from_what_was_saved(method, opt, stride):
    """As if it had not been stopped, with gradients accumulated before and after."""

    def start():
        model, optimizer, decay = made(opt, method)
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        backward(model)
        return model, optimizer, decay

    def finish(model, optimizer):
        backward(model)  # on top of what the stopped step has left
        optimizer.step()
        optimizer.zero_grad()
        backward(model)
        optimizer.step()

    model, optimizer, _ = start()
    finish(model, optimizer)
    expected = weights(model)
    model, optimizer, _ = start()
    count = lines(optimizer.step)
    assert count > 20
    for at in chosen(count, stride, method, opt):
        model, optimizer, decay = start()
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), decay.state_dict()))
        if Stopped(at)(optimizer.step):
            for part, state in zip((model, optimizer, decay), saved, strict=True):
                part.load_state_dict(state)
            finish(model, optimizer)
            for name, p in weights(model).items():
                torch.testing.assert_close(p, expected[name], rtol=1e-12, atol=0, msg=f"line {at}")
    assert at > count - stride


@pytest.mark.parametrize(
    ("method", "opt"), [one for one in SOME if one[1] in ("sgd", "reading", "silent")]
)
@pytest.mark.parametrize("accumulate", [False, True])
@STRIDES
def test_a_loop_stopped_anywhere_that_goes_on(method, opt, accumulate, stride):
    """Every tensor has as many decays as updates: the step was taken, or was not."""

    def start():
        model, optimizer, _ = made(opt, method)
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        return model, optimizer

    def turn(model, optimizer):
        backward(model)
        optimizer.step()

    def go_on(model, optimizer):
        if not accumulate:
            optimizer.zero_grad()
        turn(model, optimizer)

    taken, left_out = [], []
    model, optimizer = start()
    turn(model, optimizer)
    go_on(model, optimizer)
    taken = weights(model)
    model, optimizer = start()
    if accumulate:
        backward(model)
    turn(model, optimizer)
    left_out = weights(model)
    model, optimizer = start()
    count = lines(lambda: turn(model, optimizer))
    seen = set()
    for at in chosen(count, stride, method, opt):
        model, optimizer = start()
        turned = Stopped(at)(lambda: turn(model, optimizer))  # noqa: B023
        if not turned:
            continue
        if accumulate and any(p.grad is None for p in model.parameters()):
            continue  # stopped ahead of its backward pass
        go_on(model, optimizer)
        for name, p in weights(model).items():
            # λθ is taken back out of a sum of gradients at the θ that stands there
            atol = 6e-3 if accumulate and method == "l2" else 1e-12
            near = [torch.allclose(p, end[name], rtol=0, atol=atol) for end in (taken, left_out)]
            assert any(near), (at, name, p, taken[name], left_out[name])
            seen.add(near[0])
    assert seen == {True, False}
