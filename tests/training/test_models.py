import argparse
import json
import os
import pickle
import struct
import sys
import zipfile

import pytest
import timm
import torch
from hypothesis import given
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from torch.optim.swa_utils import AveragedModel

from tests.strangers import ESCAPE, QUICK, outcome, spoiled
from wd_probe import InputError, WdProbeWarning
from wd_probe.training import models


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("test_convnext", num_classes=10).state_dict()
    ema = {key: value + 1 for key, value in state.items()}
    return state, ema, tmp_path


def loaded(path, name="test_convnext"):
    model = models.create_model(name, num_classes=10, img_size=32, checkpoint=path)
    return model.state_dict()


def same(one, other, tolerance=0.0):
    return all(torch.allclose(one[key], other[key], atol=tolerance, rtol=tolerance) for key in one)


def test_checkpoints_people_really_have(checkpoint):
    state, ema, folder = checkpoint
    kept = {"arch": "test_convnext", "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save({**kept, "state_dict": state, "state_dict_ema": ema}, folder / "model_best.pth.tar")
    assert same(loaded(folder / "model_best.pth.tar"), ema)
    assert models.read_weights(folder / "model_best.pth.tar")[1] == "state_dict_ema"
    torch.save({f"module._orig_mod.{k}": v for k, v in state.items()}, folder / "ddp.pt")
    assert same(loaded(folder / "ddp.pt"), state)
    save_file({k: v.half() for k, v in state.items()}, str(folder / "half.safetensors"))
    half = loaded(folder / "half.safetensors")
    assert {v.dtype for v in half.values()} == {torch.float32}
    assert same(half, state, 1e-2)
    (folder / "hub").mkdir()
    save_file(state, str(folder / "hub/model.safetensors"))
    assert same(loaded(folder / "hub"), state)


def test_older_key_layouts_go_through_timms_own_filter(tmp_path):
    """The layout of the original ConvNeXt repository."""
    model = timm.create_model("convnext_atto", num_classes=10)
    old = {}
    for key, value in model.state_dict().items():
        key = key.replace("stem.", "downsample_layers.0.").replace("conv_dw", "dwconv")
        key = key.replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        key = key.replace("head.norm", "norm").replace("head.fc", "head")
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = f"downsample_layers.{stage}.{key.split('.downsample.')[1]}"
        key = key.replace(".blocks.", ".")
        old[key] = value.reshape(value.shape[:2]) if "pwconv" in key and value.ndim == 4 else value
    torch.save({"model": old}, tmp_path / "old.pth")
    assert same(loaded(tmp_path / "old.pth", "convnext_atto"), model.state_dict())


def crafted(header, body=b"", length=None):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + body


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SAFETENSORS = {
    "long header": crafted(b"{}", length=2**60),
    "overlap": crafted({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12)),
    "same bytes": crafted({"a": F32, "b": F32}, bytes(8)),
    "beyond the end": crafted({"a": F32 | {"shape": [200], "data_offsets": [0, 800]}}, bytes(8)),
    "huge shape": crafted({"a": F32 | {"shape": [2**40, 2**40]}}, bytes(8)),
    "unknown dtype": crafted({"a": F32 | {"dtype": "X9"}}, bytes(8)),
    "negative": crafted({"a": F32 | {"shape": [-2]}}, bytes(8)),
    "no tensors": crafted({}),
    "not json": crafted(b"\xff" * 9),
    "deep": crafted(b"[" * 100_000),
    "complex": crafted({"a": F32 | {"dtype": "C64", "shape": [1]}}, bytes(8)),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_crafted_safetensors(tmp_path, case):
    (tmp_path / "a.safetensors").write_bytes(SAFETENSORS[case])
    assert outcome(lambda: models.read_weights(tmp_path / "a.safetensors"), "a.safetensors") is None


class Code:
    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


class Expanded:
    """A tensor of 2^50 elements over one number."""

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (
            torch.zeros(1).untyped_storage(), 0, (2**25, 2**25), (0, 0), False, {},
        )  # fmt: skip


MARKER = "ran"


def _packed(path):
    """A torch file whose 64 MiB of zeros take 64 KiB."""
    torch.save({"a": torch.zeros(1 << 24)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {info: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in parts.items():
            archive.writestr(info.filename, content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20


def _nested(path):
    held = torch.zeros(1)
    for _ in range(5000):
        held = [held]
    sys.setrecursionlimit(40_000)
    try:
        torch.save({"a": held}, path)
    finally:
        sys.setrecursionlimit(1000)


PICKLES = {
    "code": lambda p: torch.save({"a": Code()}, p),
    "code, old format": lambda p: torch.save(Code(), p, _use_new_zipfile_serialization=False),
    "plain pickle": lambda p: p.write_bytes(pickle.dumps({"model": Code()})),
    "expanded": lambda p: torch.save({"a": torch.zeros(1).expand(2**25, 2**25)}, p),
    "packed": _packed,
    "sparse": lambda p: torch.save({"a": torch.eye(2).to_sparse()}, p),
    "meta": lambda p: torch.save({"a": torch.empty(2**40, device="meta")}, p),
    "complex": lambda p: torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, p),
    "keys": lambda p: torch.save({1: torch.zeros(1), ESCAPE[:9]: torch.zeros(1)}, p),
    "a list": lambda p: torch.save([torch.zeros(1)], p),
    "a function": lambda p: p.write_bytes(pickle.dumps(print)),
    "empty": lambda p: p.write_bytes(b""),
    "a script": lambda p: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(p)),
}


@pytest.mark.filterwarnings("ignore:.*TorchScript.*:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", PICKLES)
def test_crafted_pickles(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    PICKLES[case](tmp_path / "a.pt")
    assert outcome(lambda: models.read_weights(tmp_path / "a.pt"), "a.pt") is None
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("name", ["a.safetensors", "new.pt", "old.pt"])
def test_spoiled_checkpoints(tmp_path, name):
    state = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.ones(3)}
    path = tmp_path / name
    if name == "a.safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "new.pt")
    good = path.read_bytes()
    assert set(models.read_weights(path)[0]) == set(state)

    @QUICK
    @given(spoiled(good))
    def check(found):
        path.write_bytes(found)
        read = outcome(lambda: models.read_weights(path), name)
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3)})
        if read is not None:
            outcome(lambda: model.load_state_dict(models._fitting(model, path, False)[0]), name)

    check()


def test_what_does_not_fit_takes_no_memory(tmp_path, monkeypatch):
    save_file({"head.weight": torch.zeros(0, 2**40)}, tmp_path / "a.safetensors")
    built = []
    real = models._build
    monkeypatch.setattr(
        models, "_build", lambda *a: built.append(torch.empty(0).device.type) or real(*a)
    )
    with pytest.raises(InputError, match=r"a\.safetensors is of another model"):
        models.create_model(
            "test_convnext", num_classes=10**9, img_size=32, checkpoint=tmp_path / "a.safetensors"
        )
    assert built == ["meta"]


def test_a_timm_that_reads_numbers_as_it_builds(checkpoint, monkeypatch):
    """As it did before 1.0.31 for the rates of stochastic depth of one family or another."""
    state, _, folder = checkpoint
    save_file(state, folder / "w.safetensors")
    build = timm.create_model

    def reading(*arguments, **options):
        torch.linspace(0, 0.1, 3).tolist()
        return build(*arguments, **options)

    known = {"img_size": 32, "weight_decay": 0.1, "scale": "max2", "filter_bias_and_bn": False}
    described = models.describe_layers("test_convnext", **known)
    monkeypatch.setattr(timm, "create_model", reading)
    assert same(state, loaded(folder / "w.safetensors"))
    assert repr(models.describe_layers("test_convnext", **known)) == repr(described)


# --- forms that checkpoints come in ---------------------------------------------------------------


def lightning(model):
    """A module that holds the model, a loss with weights and a second small network."""
    module = torch.nn.Module()
    module.criterion = torch.nn.Linear(10, 10)
    module.model, module.teacher = model, torch.nn.Linear(3, 3)
    return {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.6"}


FORMS = {
    "empty average": lambda model: {"state_dict_ema": {}, "state_dict": model.state_dict()},
    "no average": lambda model: {"state_dict_ema": None, "model": model.state_dict()},
    "lightning": lightning,
    "averaged": lambda model: AveragedModel(model).state_dict(),
    "averaged, under an entry": lambda model: {"state_dict": AveragedModel(model).state_dict()},
    "compiled inside of lightning": lambda model: lightning(torch.compile(model)),
    "two prefixes": lambda model: {f"net.module.{k}": v for k, v in model.state_dict().items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_what_held_the_model_leaves_no_trace(tmp_path, form):
    model = timm.create_model("test_convnext", num_classes=10)
    torch.save(FORMS[form](model), tmp_path / "a.ckpt")
    assert same(loaded(tmp_path / "a.ckpt"), model.state_dict())


def test_a_child_that_is_called_module_stays(tmp_path):
    class Held(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    model = Held()
    assert models.under_names_of(model, model.state_dict()).keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["a.safetensors", "a.SAFETENSORS", "a.bin", "a.pth", "a"])
def test_safetensors_by_any_name(checkpoint, name):
    state, _, folder = checkpoint
    save_file(state, str(folder / name))
    assert same(loaded(folder / name), state)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors.pt"])
def test_torch_files_by_any_name(checkpoint, name):
    state, _, folder = checkpoint
    torch.save(state, folder / name)
    assert same(loaded(folder / name), state)


def sizes(options):
    return {name: options[name] for name in ("img_size", "num_classes")}


@register_model
def small_beit(pretrained=False, **options):
    return Beit(
        patch_size=16, embed_dim=48, depth=1, num_heads=2, use_abs_pos_emb=False,
        use_rel_pos_bias=True, **sizes(options),
    )  # fmt: skip


@register_model
def small_swin(pretrained=False, **options):
    return SwinTransformer(
        patch_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 2), window_size=4,
        **sizes(options),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "there", "here"),
    [("test_vit", 160, 96), ("test_vit", 96, 160), ("deit_tiny_patch16_224", 224, 64),
     ("small_beit", 96, 64), ("small_swin", 64, 32)],
)  # fmt: skip
def test_position_tables_of_another_image_size_are_resized(tmp_path, name, there, here):
    model = timm.create_model(name, num_classes=10, img_size=there)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    found = models.create_model(name, num_classes=10, img_size=here, checkpoint=tmp_path / "a.pt")
    own, got = model.state_dict(), found.state_dict()
    kept = [key for key in own if own[key].shape == got[key].shape and "index" not in key]
    assert len(kept) >= len(own) - 6
    assert all(torch.equal(own[key], got[key]) for key in kept)


# --- fine-tuning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["1000 classes", "headless"])
def test_a_head_of_another_size_starts_anew(tmp_path, case):
    model = timm.create_model("test_convnext", num_classes=1000 if case[0] == "1" else 0)
    save_file(model.state_dict(), str(tmp_path / "a.safetensors"))
    with pytest.warns(WdProbeWarning, match=(
        r"the head head\.fc starts anew: that of .*a\.safetensors does not fit 10 classes"
    )):  # fmt: skip
        found = models.create_model(
            "test_convnext", num_classes=10, img_size=32,
            checkpoint=tmp_path / "a.safetensors", reset_head=True,
        )  # fmt: skip
    own, got = model.state_dict(), found.state_dict()
    assert got["head.fc.weight"].shape == (10, own["head.norm.weight"].numel())
    body = [key for key in got if not key.startswith("head.fc")]
    assert all(torch.equal(own[key], got[key]) for key in body)


def test_a_head_that_fits_is_taken_and_everything_else_must_fit(tmp_path):
    model = timm.create_model("test_convnext", num_classes=10)
    state = model.state_dict()
    options = {"num_classes": 10, "img_size": 32, "checkpoint": tmp_path / "a.safetensors"}
    save_file(state, str(tmp_path / "a.safetensors"))
    found = models.create_model("test_convnext", reset_head=True, **options)
    assert same(found.state_dict(), state)
    first = next(iter(state))
    save_file({k: v for k, v in state.items() if k != first}, str(tmp_path / "a.safetensors"))
    with pytest.raises(InputError, match=f"of another model: tensors 1 missing .{first}"):
        models.create_model("test_convnext", reset_head=True, **options)
    bent = {**state, first: torch.zeros(1)}
    save_file(bent, str(tmp_path / "a.safetensors"))
    with pytest.raises(InputError, match=f"1 of another shape .{first} is .1,. there"):
        models.create_model("test_convnext", reset_head=True, **options)


@pytest.mark.filterwarnings("always::wd_probe.WdProbeWarning")
@pytest.mark.parametrize("command", ["rop", "train", "sweep", "reproduce"])
def test_fine_tuning_from_a_local_checkpoint(wdprobe, tmp_path, command):
    model = timm.create_model("test_efficientnet", num_classes=1000)
    save_file(model.state_dict(), str(tmp_path / "lite0.safetensors"))
    common = ["--model", "test_efficientnet", "--checkpoint", tmp_path / "lite0.safetensors"]
    short = ["--batch-size", 32, "--output", "out", "--json"]
    more = {
        "rop": ["--steps", 1], "train": ["--steps", 1], "sweep": ["--steps", 1],
        "reproduce": ["--dataset", "digits", "--opt", "adam", "--lr", "0.001", "--weight-decay",
                      "0.01", "--seeds", 1, "--epochs", 1, "--train-samples", 64],
    }[command]  # fmt: skip
    name = ["table3"] if command == "reproduce" else []
    code, out, err = wdprobe(command, *name, *common, *short, *more)
    assert code == 0, err
    assert "warning: the head classifier starts anew" in err
    json.loads(out)
