import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
from torch import nn
from wd_probe.cli import main as cli

import wd_probe
from wd_probe import InputError, WeightDecay, audit
from wd_probe.training.optimizers import build_optimizer
from wd_probe.training.survey import survey, tiny_model

ROOT = Path(__file__).parents[2]


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


def test_no_optimizer():
    with pytest.raises(InputError, match=r"a torch\.optim\.Optimizer is needed, got Linear"):
        audit(nn.Linear(2, 2))
    with pytest.raises(InputError, match="LBFGS moves the weights several times in one step"):
        audit(torch.optim.LBFGS(nn.Linear(2, 2).parameters()))


# --- the command line ---------------------------------------------------------------------------


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["wdprobe", "audit", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_json(monkeypatch, capsys):
    arguments = ("--opt", "nadamw", "--lr", "0.5", "--weight-decay", "0.1", "--json")
    assert run(monkeypatch, *arguments, "--opt-kwargs", "betas=(0.8, 0.9)") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["command"], result["optimizer"], result["rule"]) == ("audit", "NAdamW", "wd")
    assert result["factor"] == pytest.approx(0.05, rel=1e-3)
    assert {t["name"] for t in result["tensors"]} == set(dict(tiny_model().named_parameters()))
    assert len(result["warnings"]) == 1


@pytest.mark.parametrize("width", ["80", "160"])
def test_tables(monkeypatch, capsys, width):
    from wd_probe.cli import console as render

    monkeypatch.setattr(render.out, "_width", int(width))
    arguments = ("--opt", "adamw", "--model", "test_vit", "--layer-decay", "0.5")
    assert run(monkeypatch, *arguments, "--img-size", "160") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= int(width)
    assert "layer_decay has no effect yet" in shown
    assert re.search(r"0\.001 +1$", shown, re.MULTILINE)
    names = ("sgd", "bnbadam", "adamp") if sys.platform != "linux" else ("sgd", "fusedsgd", "adamp")
    monkeypatch.setattr("wd_probe.training.survey.known_optimizers", lambda: names)
    assert run(monkeypatch, "--all") == 0
    shown = capsys.readouterr().out
    assert "2 of 3 optimizers audited" in shown
    assert "other (2-d, 4-d), wd (1-d)" in " ".join(shown.split())
    assert "fusedsgd: " in shown


BAD = {
    "neither": ([], "give either --opt NAME or --all"),
    "both": (["--opt", "sgd", "--all"], "give either --opt NAME or --all"),
    "unknown": (["--opt", "adamv"], "unknown optimizer 'adamv'; did you mean "),
    "unknown class": (["--opt", "torch.optim.Adamm"], "torch.optim has no 'Adamm'; did you mean "),
    "unknown module": (["--opt", "nowhere.Adam"], "unknown optimizer 'nowhere.Adam': No module"),
    "no optimizer": (["--opt", "torch.nn.Linear"], "torch.nn.Linear is no torch.optim.Optimizer"),
    "lbfgs": (["--opt", "torch.optim.LBFGS"], "LBFGS moves the weights several times in one step"),
    "no pair": (["--opt", "sgd", "--opt-kwargs", "x"], "--opt-kwargs wants key=value, got 'x'"),
    "bad option": (
        ["--opt", "torch.optim.SGD", "--opt-kwargs", "x=1"],
        "torch.optim.SGD cannot be built here: TypeError: SGD.__init__() got an unexpected",
    ),
    "bad model": (["--opt", "sgd", "--model", "resnot18"], "unknown model 'resnot18'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, monkeypatch, capsys):
    arguments, message = BAD[name]
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("wdprobe: error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_dotted_name_needs_no_timm():
    code = (
        "import sys\n"
        "from wd_probe.training.survey import audit_by_name\n"
        "print(audit_by_name('torch.optim.AdamW')['rule'], 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "wd False\n"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["timm", "torch", "pytorch_optimizer"])
def test_the_tables_of_the_docs(package):
    pytest.importorskip(package)
    page = (ROOT / "docs" / "optimizers.md").read_text()
    command = [sys.executable, "docs/examples/optimizers.py", package]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    title = done.stdout.partition(":")[0]
    if title not in page:
        pytest.skip(f"the page is about another version than {title}")
    for row in done.stdout.strip().splitlines():
        assert row in page


def test_surveys_name_what_cannot_be_built():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {
            row.name: row for row in survey(["adamw", "torch.optim.LBFGS", "torch.optim.Rprop"])
        }
    assert (found["adamw"].rule, found["adamw"].multiple) == ("wd", "1")
    assert "no single û" in found["torch.optim.LBFGS"].error
    assert found["torch.optim.Rprop"].remarks == ("it has no weight_decay",)
    assert callable(wd_probe.audit)
