import math

import pytest
import timm
import timm.optim
import torch
from torch import nn

from wd_probe import InputError, WeightDecay, audit
from wd_probe.training.optimizers import build_optimizer
from wd_probe.training.survey import tiny_model


def line(report, part):
    """The one warning that says this."""
    (found,) = [warning for warning in report.warnings if part in warning]
    assert "\n" not in found
    return found


def test_the_report():
    net = tiny_model()
    net.conv.requires_grad_(False)
    groups = [
        {"params": [net.conv.weight, net.head.weight], "weight_decay": 0.5, "lr": 0.01},
        {"params": [net.norm.weight, net.norm.bias, net.head.bias, net.conv.bias]},
    ]
    report = audit(torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0), net)
    assert (report.optimizer, report.rule) == ("AdamW", "wd")
    assert report.factor == pytest.approx(0.005, rel=1e-3)
    assert [t.name for t in report.tensors] == [
        "head.weight",
        "norm.weight",
        "norm.bias",
        "head.bias",
    ]
    head = report.tensors[0]
    assert (head.group, head.shape, head.dtype, head.power) == (0, (10, 8), "float32", 1)
    assert (head.weight_decay, head.lr, head.expected, head.factor) == (0.5, 0.01, 0.005, 0.005)
    assert [t.rule for t in report.tensors] == ["wd", "none", "none", "none"]
    assert report.warnings == ()


def test_names_without_a_model():
    w = nn.Parameter(torch.randn(4, 4))
    assert audit(torch.optim.AdamW([w])).tensors[0].name == "param_groups[0]['params'][0]"
    assert audit(torch.optim.AdamW([("stem", w)])).tensors[0].name == "stem"


def test_mixed_and_nothing():
    net = tiny_model()
    mixed = audit(build_optimizer("sgdp", net), net)
    assert mixed.rule == "mixed"
    assert {(t.rule, len(t.shape)) for t in mixed.tensors} == {
        ("other", 4),
        ("other", 2),
        ("scaled", 1),
    }
    assert line(mixed, "times ηλ in").startswith("c is 10 times ηλ in 4 tensors (e.g. conv.bias)")
    nothing = audit(torch.optim.AdamW(net.parameters(), weight_decay=0))
    assert nothing.rule == "none"
    assert math.isnan(nothing.factor)
    assert nothing.warnings == ()


def test_an_attached_weight_decay_says_what_it_does():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with WeightDecay(net, optimizer, "lpwd", rate=0.3, parameters=["0.weight", "1.weight"]):
        report = audit(optimizer, net)
    assert report.rule == "lpwd"
    factors = {t.name: t.factor for t in report.tensors}
    assert factors == pytest.approx({"0.weight": 0.03, "0.bias": 0, "1.weight": 0.06, "1.bias": 0})
    assert [t.observed for t in report.tensors] == pytest.approx(list(factors.values()), rel=1e-4)
    with WeightDecay(net, optimizer, "wd", rate=0.3, convention="rate"):
        report = audit(optimizer, net)
    assert report.factor == pytest.approx(0.3)
    assert line(report, "c does not follow η")
    with WeightDecay(net, optimizer, "baseline"):
        assert audit(optimizer, net).rule == "none"
    with WeightDecay(net, optimizer, "l2", rate=0.3):
        report = audit(optimizer, net)
        assert report.rule == "l2"
        assert math.isnan(report.factor)
    bf16 = nn.Linear(64, 64).bfloat16()
    optimizer = torch.optim.SGD(bf16.parameters(), lr=0.1)
    with WeightDecay(bf16, optimizer, "wd", rate=0.01):
        assert "in bfloat16 a step takes off 0 instead of 0.001" in line(
            audit(optimizer, bf16), "rounding"
        )


def layered(net):
    net.group_matcher = lambda coarse=False: {"stem": r"conv|norm", "blocks": r"head"}
    return net


def adam(net, **options):
    return torch.optim.Adam(net.parameters(), weight_decay=0.01, **options)


def adamw(net, **options):
    return torch.optim.AdamW(net.parameters(), **options)


class Forgetful(torch.optim.SGD):
    """Takes a weight_decay and never applies it."""

    def step(self, closure=None):
        kept = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        super().step(closure)
        for group, rate in zip(self.param_groups, kept, strict=True):
            group["weight_decay"] = rate


WARNED = {
    "without effect": (
        lambda net: Forgetful(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5),
        "weight_decay=0.5 changes nothing in 6 tensors (e.g. conv.weight): Forgetful does not "
        "apply it there; attach wd_probe.WeightDecay",
    ),
    "l2 in adam": (
        adam,
        "L2 inside an adaptive step: in Adam weights with large gradients hardly decay; take a "
        "decoupled optimizer (AdamW for Adam) or attach wd_probe.WeightDecay",
    ),
    "float32": (
        lambda net: adamw(net, lr=1e-5, weight_decay=1e-3),
        "rounding changes the decay of 6 tensors (e.g. conv.weight): in float32 a step takes off "
        "0 instead of 1e-08; keep weights in a wider dtype",
    ),
    "too strong": (
        lambda net: adamw(net, lr=0.5, weight_decay=3.0),
        "c = 1.5 in 6 tensors (e.g. conv.weight): a step takes off the whole weight or more; lower "
        "weight_decay or the learning rate",
    ),
    "η²": (
        lambda net: build_optimizer("adamc", net),
        "c follows η²: a schedule that halves the learning rate quarters the decay; choose "
        "weight_decay for it, or the uncorrected optimizer",
    ),
    "first step": (
        lambda net: build_optimizer("adoptw", net),
        "the first step takes nothing off: decay in Adopt begins with the second",
    ),
    "by the gradient": (
        lambda net: build_optimizer("adamp", net),
        "a step takes off 0.01 to 1 times ηλθ in 2 tensors (e.g. conv.weight): no closed rule; "
        "attach wd_probe.WeightDecay for one",
    ),
    "norms": (
        adamw,
        "norms and biases decay: 4 tensors (e.g. conv.bias); give them a group with weight_decay=0",
    ),
    "wrapper": (
        lambda net: build_optimizer("lookahead_adamw", net),
        "Lookahead is audited at the AdamW that it wraps; what Lookahead itself does to the "
        "weights comes on top",
    ),
    "not held": (
        lambda net: torch.optim.AdamW([net.conv.weight]),
        "5 trainable parameters of the model (e.g. conv.bias) not in the optimizer: neither "
        "trained nor decayed; hand it all of model.parameters()",
    ),
    "layer decay": (
        lambda net: build_optimizer("torch.optim.AdamW", layered(net), layer_decay=0.5),
        "layer_decay has no effect yet: lr_scale is ",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_warnings(name):
    make, text = WARNED[name]
    torch.manual_seed(1)
    net = tiny_model()
    optimizer = make(net)
    report = audit(optimizer, net)
    assert line(report, text)
    quiet = audit(torch.optim.AdamW([net.head.weight, net.conv.weight]))
    assert quiet.warnings == ()


def test_l2_is_no_fault_where_the_step_is_not_adaptive():
    net = tiny_model()
    for optimizer in (
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        torch.optim.ASGD(net.parameters(), weight_decay=0.1),
    ):
        report = audit(optimizer, net)
        assert report.rule == "l2"
        assert not any("adaptive" in warning for warning in report.warnings)
    for optimizer in (torch.optim.RAdam, torch.optim.Adagrad, torch.optim.RMSprop):
        assert line(audit(optimizer(net.parameters(), weight_decay=0.1)), "adaptive")


def test_the_models_own_wishes_and_schedules():
    class Wishing(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.mix = nn.Parameter(torch.ones(2, 2)), nn.Linear(2, 2)

        def no_weight_decay(self):
            return {"token"}

    net = Wishing()
    assert line(audit(adamw(net), net), "no_weight_decay() would spare 1 tensor (e.g. token)")
    spared = build_optimizer("adamw", net, filter_bias_and_bn=True)
    assert audit(spared, net).warnings == ()
    scaled = build_optimizer("adamw", layered(tiny_model()), layer_decay=0.5)
    assert line(audit(scaled), "layer_decay has no effect yet")
    for group in scaled.param_groups:
        group["lr"] *= group["lr_scale"]
    assert not any("layer_decay" in warning for warning in audit(scaled).warnings)


def test_hooks_that_never_fire():
    class Detached(torch.optim.Optimizer):
        def __init__(self, params):
            self.param_groups = [{"params": params, "lr": 0.1, "weight_decay": 0.1}]
            self.defaults, self.state = {}, {}

        def step(self, closure=None):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(0.1 * p.grad + 0.01 * p * (self.param_groups[0]["weight_decay"] * 10))

    report = audit(Detached([nn.Parameter(torch.randn(4, 4))]))
    assert line(report, "Detached does not call torch's step hooks")
    assert report.rule == "scaled"


def test_the_audit_disturbs_nothing():
    net = timm.create_model("test_vit", num_classes=3)
    optimizer = timm.optim.create_optimizer_v2(net, "adamw", lr=0.1, weight_decay=0.1)
    net(torch.randn(2, 3, 160, 160)).sum().backward()
    optimizer.step()
    before = [t.clone() for t in (*net.parameters(), *(p.grad for p in net.parameters()))]
    state, drawn = repr(optimizer.state_dict()), torch.get_rng_state()
    audit(optimizer, net)
    after = (*net.parameters(), *(p.grad for p in net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert repr(optimizer.state_dict()) == state
    assert torch.equal(torch.get_rng_state(), drawn)


def test_learning_rates_that_are_none():
    net = tiny_model()
    for lr in (-0.1, math.nan):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        optimizer.param_groups[0]["lr"] = lr
        report = audit(optimizer, net)
        assert report.rule == "wd"
        assert line(report, f"the learning rate of 6 tensors (e.g. conv.weight) is {lr:g}")
    for rate in (0.0, 0.1):
        own_pace = torch.optim.AdamW(net.parameters(), weight_decay=rate)
        own_pace.param_groups[0]["lr"] = None
        assert audit(own_pace, net).rule == ("other" if rate else "none")


def test_a_model_without_numbers_is_audited_and_one_without_shapes_is_not():
    with torch.device("meta"):
        net = tiny_model()
        report = audit(torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.01), net)
    assert (report.rule, {t.factor for t in report.tensors}) == ("wd", {0.1 * 0.01})
    assert math.isnan(report.factor)
    lazy = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(InputError, match=r"^0\.weight has no shape yet: run a batch through the l"):
        audit(torch.optim.AdamW(lazy.parameters()), lazy)


def test_attached_to_complex_weights_and_to_an_optimizer_of_its_own_pace():
    net = nn.ParameterList([torch.full((3,), 1 + 2j)])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with WeightDecay(net, optimizer, "wd", rate=0.5):
        assert audit(optimizer, net).factor == pytest.approx(0.05)
    optimizer.param_groups[0]["lr"] = None
    with WeightDecay(net, optimizer, "l2", rate=0.5):
        assert audit(optimizer, net).rule == "l2"


def test_no_optimizer():
    with pytest.raises(InputError, match=r"a torch\.optim\.Optimizer is needed, got Linear"):
        audit(nn.Linear(2, 2))
    with pytest.raises(InputError, match="LBFGS moves the weights several times in one step"):
        audit(torch.optim.LBFGS(nn.Linear(2, 2).parameters()))


def test_a_report_is_printed_as_a_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    net = tiny_model()
    report = audit(torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.01), net)
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert lines[0] == "AdamW · wd: decoupled: ηλθ is taken off beside the step"
    assert "0 4 conv.bias wd 0.001 0.001 1" in lines
    assert lines[-1] == f"• {report.warnings[-1]}"
    assert "such as" in report._repr_html_()
    assert repr(report).startswith("AuditReport(optimizer='AdamW'")
