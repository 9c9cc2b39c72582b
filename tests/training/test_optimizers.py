"""Optimizers by name; and the probe's closed forms against its exact mode on all that run here."""

import inspect
import re
import warnings
from dataclasses import replace

import pytest
import torch

from tests.small import Silent, small, train
from wd_probe import InputError, OpposingPenaltyProbe, audit
from wd_probe.layering import decayed_parameters
from wd_probe.sweeps.grid import grid
from wd_probe.training.models import create_model
from wd_probe.training.optimizers import build_optimizer
from wd_probe.training.options import TrainOptions
from wd_probe.training.resume import options_of
from wd_probe.training.survey import known_optimizers, tiny_model
from wd_probe.training.train import train as train_model


class Matrices(torch.optim.SGD):
    """Refuses all but matrices, as torch's Muon does."""

    def __init__(self, params, lr=0.1, weight_decay=0.1):
        params = list(params)
        if any(p.ndim != 2 for p in params):
            raise ValueError("matrices only")
        super().__init__(params, lr=lr, weight_decay=weight_decay)


class Plain(torch.optim.SGD):
    """Has neither weight decay nor momentum."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)


class Rateless(torch.optim.SGD):
    """Hides its learning rate."""

    def __init__(self, params, lr=0.1, weight_decay=0.1):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        del self.param_groups[0]["lr"]


L2 = pytest.mark.filterwarnings("ignore:SGD, parameter group 0. its weight_decay is L2")
HERE = "tests.training.test_optimizers"


def options(opt, **chosen):
    defaults = {"model": "test_convnext", "batch_size": 32, "train_samples": 96, "steps": 3,
                "command": "rop", "every": 1, "weight_decay": 0.1, "device": "cpu"}  # fmt: skip
    return TrainOptions(opt=opt, **defaults | chosen)


@L2
@pytest.mark.parametrize(
    ("path", "name", "kwargs"),
    [
        ("torch.optim.SGD", "momentum", ""),
        ("torch.optim.SGD", "sgd", "nesterov=True"),
        ("torch.optim.AdamW", "adamw", ""),
        ("timm.optim.Lion", "lion", ""),
    ],
)
def test_a_class_trains_as_timms_name_for_it(tmp_path, path, name, kwargs):
    one, other = (
        train_model(options(opt, opt_kwargs=more, output=tmp_path / opt), Silent())
        for opt, more in ((path, kwargs), (name, ""))
    )
    assert one["optimizer"] == path
    assert one["rate"]["mean"] > 0
    for file in ("model.safetensors", "steps.csv", "layers.csv", "tensors.csv"):
        assert (tmp_path / path / file).read_bytes() == (tmp_path / name / file).read_bytes()
    assert {key: one[key] for key in ("rate", "mass", "lr", "method", "top1")} == {
        key: other[key] for key in ("rate", "mass", "lr", "method", "top1")
    }


def test_options_momentum_and_spared_tensors_reach_a_class():
    model = tiny_model()
    given = {"lr": 0.5, "weight_decay": 0.25, "filter_bias_and_bn": True}
    for name in ("torch.optim.SGD", "momentum"):
        optimizer = build_optimizer(name, model, momentum=0.75, options={"maximize": True}, **given)
        assert {(g["lr"], g["momentum"], g["maximize"]) for g in optimizer.param_groups} == {
            (0.5, 0.75, True)
        }
        decayed, spared = optimizer.param_groups
        assert (decayed["weight_decay"], spared["weight_decay"]) == (0.25, 0)
        assert [p.ndim for p in decayed["params"]] == [4, 2]
        assert [p.ndim for p in spared["params"]] == [1, 1, 1, 1]
    (group,) = build_optimizer("torch.optim.SGD", model).param_groups
    assert group["momentum"] == 0  # torch's own


@pytest.mark.parametrize("name", ["adamw", "torch.optim.AdamW"])
def test_every_tensor_decays_unless_asked_otherwise(name):
    """timm alone would spare a vision transformer's own list, in some of its versions."""
    model = create_model("test_vit", num_classes=10, img_size=32)
    assert model.no_weight_decay()
    found = audit(build_optimizer(name, model, weight_decay=0.1), model)
    assert all(tensor.decays for tensor in found.tensors)
    spared = audit(build_optimizer(name, model, weight_decay=0.1, filter_bias_and_bn=True), model)
    decayed = {tensor.name for tensor in spared.tensors if tensor.decays}
    assert decayed == set(decayed_parameters(model, filter_bias_and_bn=True))
    assert not {"pos_embed", "cls_token"} & decayed


def test_no_group_is_left_without_tensors_where_timm_has_parted_them_before(tmp_path):
    model = create_model("test_vit", num_classes=10, img_size=32)  # has a list of its own
    built = build_optimizer("adamw", model, filter_bias_and_bn=True)
    assert all(group["params"] for group in built.param_groups)
    options = TrainOptions(
        command="rop", model="test_vit", filter_bias_and_bn=True, steps=1, batch_size=8, every=1,
        device="cpu", output=tmp_path / "run",
    )  # fmt: skip
    assert train_model(options, Silent())["method"] == "wd"


@pytest.mark.parametrize("opt", ["torch.optim.SGD", "momentum", "SGD", "timm.optim.SGDP"])
def test_sgd_by_any_name_takes_the_papers_rate(opt):
    assert TrainOptions(opt=opt).learning_rate == 0.01
    assert TrainOptions(opt=opt, lr=0.5).learning_rate == 0.5
    assert TrainOptions(opt="torch.optim.Adam").learning_rate == 1e-4


BAD = {
    "name": ("adammw", {}, "unknown optimizer 'adammw'; did you mean adamw"),
    "nothing near": ("qqq", {}, "unknown optimizer 'qqq'; `wdprobe audit --all` names them all"),
    "module": ("nowhere.Adam", {}, "unknown optimizer 'nowhere.Adam': No module named 'nowhere'"),
    "class": ("torch.optim.SDG", {}, "torch.optim has no 'SDG'; did you mean SGD"),
    "function": (
        "torch.nn.functional.relu",
        {},
        "torch.nn.functional.relu is no torch.optim.Optimizer",
    ),
    "options": ("adamw", {"options": {"speed": 9}}, "adamw cannot be built here: TypeError: "),
    "of a class": (
        "torch.optim.SGD",
        {"options": {"speed": 9}},
        "torch.optim.SGD cannot be built here: TypeError: ",
    ),
    "momentum": (
        f"{HERE}.Plain",
        {"weight_decay": 0.0, "options": {"momentum": 1}},
        "Plain cannot be built here: TypeError: ",
    ),
    "given twice": (
        "sgd",
        {"momentum": 0.5, "options": {"momentum": 1}},
        "--opt-kwargs momentum=... is given by --momentum",
    ),
    "no decay": (
        f"{HERE}.Plain",
        {},
        "Plain has no weight_decay; give 0 for it, or a --method that decays",
    ),
    "matrices": (
        f"{HERE}.Matrices",
        {},
        "Matrices cannot be built here: ValueError: matrices only",
    ),
    "no rate": (f"{HERE}.Rateless", {}, "Rateless keeps no lr in its parameter groups"),
    "closure": ("torch.optim.LBFGS", {"weight_decay": 0.0}, "LBFGS"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_built_is_told_in_one_line(case):
    name, chosen, message = BAD[case]
    with pytest.raises(InputError, match=re.escape(message)) as told:
        build_optimizer(name, tiny_model(), **chosen)
    assert "\n" not in str(told.value)


def test_an_audit_makes_do_with_what_a_class_takes():
    model = tiny_model()
    built = build_optimizer(f"{HERE}.Matrices", model, partly=True)
    assert [p.ndim for p in built.param_groups[0]["params"]] == [2]
    assert "weight_decay" in built.param_groups[0]
    assert len(build_optimizer(f"{HERE}.Plain", model, partly=True).param_groups[0]["params"]) == 6


@L2
def test_cells_of_classes_are_folders_that_are_resumed(tmp_path):
    """Names are safe; a cell stopped halfway ends as one that never was."""

    class Stopping(Silent):
        def stepped(self, step, record):
            if step.step == 2:
                raise KeyboardInterrupt

    chosen = {"opt": ["torch.optim.SGD", "timm.optim.Lion"]}
    cells = grid(options("adam", steps=4, recovery_interval=1), chosen)
    for cell in cells:
        assert re.fullmatch(r"[\w.-]+", cell.name)
        assert cell.options.opt in cell.name
        whole, cut = tmp_path / "whole" / cell.name, tmp_path / "cut" / cell.name
        train_model(replace(cell.options, output=whole), Silent())
        assert train_model(replace(cell.options, output=cut), Stopping())["status"] == "interrupted"
        resumed = options_of(cut, "rop")
        assert resumed.hparams()["opt"] == cell.options.opt
        assert train_model(resumed, Silent(), resume=True)["status"] == "finished"
        for file in ("model.safetensors", "steps.csv", "layers.csv"):
            assert (whole / file).read_bytes() == (cut / file).read_bytes()


def third_party():
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    return sorted(
        f"pytorch_optimizer.{name}"
        for name, kind in vars(pytorch_optimizer).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    )


def both_ways(name):
    """What the probe counts as it is and in its exact mode; None where the optimizer cannot run."""
    model = small(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            optimizer = build_optimizer(name, model, lr=0.05, weight_decay=0.3, partly=True)
            probes = [OpposingPenaltyProbe(model, optimizer, exact=exact) for exact in (None, True)]
            train(model, optimizer, 5)
        except Exception:  # it wants a closure, a graph behind the gradient, or groups of its own
            return None
    closed, exact = ([(r.penalized, r.total.opposing) for r in p.records] for p in probes)
    return closed, exact


@pytest.mark.slow
@pytest.mark.parametrize("collection", ["timm and torch", "pytorch_optimizer"])
def test_r_op_agrees_with_the_exact_mode_on_all_that_run(collection):
    names = third_party() if collection == "pytorch_optimizer" else known_optimizers()
    found = {name: both_ways(name) for name in names}
    ran = {name: counts for name, counts in found.items() if counts is not None}
    print(f"{collection}: {len(ran)} of {len(found)} run here")
    assert len(ran) > 60
    assert {name: counts for name, counts in ran.items() if counts[0] != counts[1]} == {}
    assert sum(sum(opposing for _, opposing in counts[0]) > 0 for counts in ran.values()) > 20
