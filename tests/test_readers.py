"""Files from strangers: a good result or one line that names the file, whatever they hold."""

import gzip
import json
import math
import os
import pickle
import shutil
import struct
import sys
import tracemalloc
import zipfile
from urllib.request import urlopen

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from wd_probe.cli import console as render

from tests.test_experiments import Silent, open_data, write_idx
from wd_probe import InputError, WdProbeWarning
from wd_probe.cache import cache_dir
from wd_probe.report import sweep as report_sweeps
from wd_probe.report.page import report
from wd_probe.runs import reading as files
from wd_probe.runs.folder import dumps
from wd_probe.runs.reading import read_run
from wd_probe.runs.schema import Contents
from wd_probe.runs.tensorboard import serve
from wd_probe.sweeps import cells as sweeps
from wd_probe.sweeps import grid as gridfile
from wd_probe.training import data, models
from wd_probe.training import scan as zeroshot
from wd_probe.training.options import TrainOptions
from wd_probe.training.train import train

QUICK = settings(max_examples=60, deadline=5000, suppress_health_check=list(HealthCheck))
SLOW = settings(QUICK, max_examples=12)
ESCAPE = "\x1b[31m[red]\x07\ud800\n<script>"


def outcome(read, *names):
    """What a reader gives; None where it refuses in one line that names the file."""
    try:
        return read()
    except InputError as error:
        told = str(error)
        assert told.isprintable(), ascii(told)
        assert len(told) < 600
        assert any(name in told for name in names), told
        return None


DAMAGES = st.sampled_from(["flip", "cut", "replace", "grow"])


@st.composite
def spoiled(draw, good):
    """Bytes flipped, cut short, replaced or grown."""
    where = st.integers(0, len(good))
    for _ in range(draw(st.integers(1, 3))):
        at, how = (
            min(draw(where), len(good)),
            draw(DAMAGES),
        )
        more = draw(st.binary(min_size=1, max_size=8))
        if how == "cut":
            good = good[:at]
        elif how == "grow":
            good = good[:at] + more * draw(st.sampled_from((1, 1000))) + good[at:]
        elif how == "replace":
            good = good[:at] + more + good[at + len(more) :]
        elif at < len(good):
            good = good[:at] + bytes([good[at] ^ (1 << draw(st.integers(0, 7)))]) + good[at + 1 :]
    return good


STRANGE = st.sampled_from(
    [None, True, -1, 0, 10**30, 2**63, 1e308, -1e300, 0.5, "", "x", ESCAPE, "$\\frac{$", [], {},
     [[]], [None], {"name": 1}, [[["deep"]]], "9" * 5000, math.nan, math.inf]
)  # fmt: skip


@st.composite
def mistyped(draw, value):
    """A JSON value with something else at a random place."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 4)) == 0:
        return draw(STRANGE)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(keys))
    changed = value.copy()
    if draw(st.integers(0, 5)) == 0:
        del changed[key]
    else:
        changed[key] = draw(mistyped(value[key]))
    return changed


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of three steps and a scan of it."""
    root = tmp_path_factory.mktemp("made")
    options = TrainOptions(
        command="rop", model="test_convnext", batch_size=32, lr=1e-3, steps=3, every=1,
        train_samples=96, output=root / "run",
    )  # fmt: skip
    train(options, Silent())
    scan = zeroshot.ZeroshotOptions(
        run=root / "run", num_samples=16, steps=2, by="kind", by_steps=1, output=root / "scan"
    )
    zeroshot.scan(scan, Listener())
    return root


class Listener:
    def __getattr__(self, _):
        return lambda *_: None


@pytest.fixture
def copy(made, tmp_path):
    def made_again(name):
        kept = shutil.ignore_patterns("figures", "events*", "*.safetensors")
        return shutil.copytree(made / name, tmp_path / name, ignore=kept)

    return made_again


READ = [
    *(("run", f"{n}.csv") for n in ("steps", "layers", "profile", "epochs")),
    *(("scan", f"{n}.csv") for n in ("curve", "parts", "distortion")),
    *((n, f"{kind}.json") for n in ("run", "scan") for kind in ("config", "summary")),
]


@pytest.mark.parametrize("file", READ, ids="/".join)
def test_run_folders_with_spoiled_files(copy, file):
    folder, name = copy(file[0]), file[1]
    good = (folder / name).read_bytes()
    assert read_run(folder) is not None

    @settings(QUICK, max_examples=25)
    @given(spoiled(good))
    @example(good[: len(good) // 2])
    @example(b"\0" * 500)
    @example(b"\xff\xfe" * 50)
    @example(b"[" * 100_000)
    @example(b'"' + b"x," * 100_000)
    @example(b"step," * 400 + b"\n")
    def check(found):
        (folder / name).write_bytes(found)
        outcome(lambda: read_run(folder), name, "no run folder")

    check()


@pytest.mark.parametrize("file", [f for f in READ if "json" in f[1]], ids="/".join)
def test_run_folders_with_values_of_other_kinds(copy, file):
    folder, name = copy(file[0]), file[1]
    good = json.loads((folder / name).read_text())

    @given(mistyped(good))
    @settings(QUICK, max_examples=40)
    def check(found):
        (folder / name).write_text(json.dumps(found))
        run = outcome(lambda: read_run(folder), name)
        if run is not None:
            dumps(run.config).encode()
            assert str(run.config.get("model")).isprintable()

    check()


cells = st.one_of(
    st.sampled_from(["", "1", "0.5", "nan", "inf", "-inf", "1e308", "1e999", "x", "\0", '"',
                     '"a\nb"', "9" * 400, "1_0", "=1+1", "\x1b[2J", "é"]),
    st.floats().map(repr),
)  # fmt: skip


@QUICK
@given(
    st.lists(st.lists(cells, min_size=2, max_size=4), max_size=6), st.sampled_from(["\n", "\r\n"])
)
def test_tables_of_strange_cells(tmp_path_factory, rows, end):
    path = tmp_path_factory.getbasetemp() / "strange.csv"
    lines = ["step,rate,name", *(",".join(row) for row in rows)]
    path.write_text(end.join(lines) + end, newline="")
    found = outcome(lambda: files.read_columns(path), "strange.csv")
    if found is not None:
        assert list(found) == ["step", "rate"]
        assert len(found["step"]) == len(found["rate"]) <= 2 * len(rows)


def test_a_pipe_in_the_place_of_a_file(tmp_path):
    os.mkfifo(tmp_path / "summary.json")
    with pytest.raises(InputError, match=r"summary\.json is damaged: it is not a plain file"):
        files.read_json(tmp_path / "summary.json", Contents)


def test_files_too_large_are_refused_before_they_are_read(tmp_path):
    tracemalloc.start()
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"config\.json is larger than 32,768 KiB"):
        read_run(tmp_path)
    path.write_text("{}")
    for name, size in (("steps.csv", 1 << 40), ("layers.csv", 1 << 29)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
        assert outcome(lambda: read_run(tmp_path), name) is None
        (tmp_path / name).unlink()
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    (tmp_path / "steps.csv").write_text("step,rate\n1,2\n3,4")
    assert read_run(tmp_path).steps == {"step": [1], "rate": [2]}


def test_more_cells_than_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "TABLE_CELLS", 10)
    (tmp_path / "steps.csv").write_text("step,rate\n" + "1,2\n" * 6)
    with pytest.raises(InputError, match=r"steps\.csv has more than 10 cells; not read"):
        files.read_columns(tmp_path / "steps.csv")


# --- checkpoints ----------------------------------------------------------------------------------


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
            outcome(lambda: models.load_weights(model, path), name)

    check()


def test_what_does_not_fit_takes_no_memory(tmp_path, monkeypatch):
    save_file({"head.weight": torch.zeros(0, 2**40)}, tmp_path / "a.safetensors")
    built = []
    real = models._build
    monkeypatch.setattr(
        models, "_build", lambda *a: built.append(torch.get_default_device().type) or real(*a)
    )
    with pytest.raises(InputError, match=r"a\.safetensors is of another model"):
        models.create_model(
            "test_convnext", num_classes=10**9, img_size=32, checkpoint=tmp_path / "a.safetensors"
        )
    assert built == ["meta"]


# --- what a run's own config may ask for ----------------------------------------------------------

ASKED = {
    "hub": ({"model": "hf-hub:timm/a"}, "names hf-hub:timm/a, which timm would fetch"),
    "folder": ({"model": "local-dir:/etc"}, "names local-dir:/etc, which timm would fetch"),
    "no model": ({"model": ESCAPE}, "unknown model"),
    "data set": ({"dataset": "hfds/a/b"}, "names hfds/a/b, which timm would fetch"),
    "data folder": ({"data_dir": "/etc"}, "trained on images in /etc"),
    "size": ({"img_size": 10**9}, "classes of 1000000000×1000000000 images"),
    "classes": ({"num_classes": 10**12}, "is of another model: tensors 2 of another shape"),
    "no classes": ({"num_classes": 0}, "asks for 0 classes"),
    "larger model": ({"model": "vit_giant_patch14_224"}, "is of another model"),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKED)
def test_a_runs_config_is_not_followed_out_of_its_folder(made, copy, wdprobe, case, monkeypatch):
    folder, (change, told) = copy("run"), ASKED[case]
    shutil.copy(made / "run/model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    real = models.timm.create_model

    def on_meta(name, **options):
        assert ":" not in name
        assert torch.get_default_device().type == "meta"
        return real(name, **options)

    monkeypatch.setattr(models.timm, "create_model", on_meta)
    code, out, err = wdprobe("zeroshot", "--run", folder)
    assert (code, out) == (2, "")
    assert told in err
    assert err[:-1].isprintable()


def test_a_runs_data_folder_is_read_when_it_is_given(made, copy, tmp_path):
    folder = copy("run")
    shutil.copy(made / "run/model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    changed = config | {"data_dir": "/somewhere", "dataset": "torch/fashion_mnist"}
    (folder / "config.json").write_text(json.dumps(changed))
    (tmp_path / "idx").mkdir()
    idx_files(tmp_path / "idx")
    options = zeroshot.ZeroshotOptions(run=folder, data_dir=tmp_path / "idx", steps=2)
    assert zeroshot.prepare(options, Listener()).images == 20


# --- datasets and pictures ------------------------------------------------------------------------


def idx_files(folder):
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        pictures = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        write_idx(folder, f"{part}-images-idx3-ubyte", pictures)
        write_idx(folder, f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)


NAME = "t10k-images-idx3-ubyte.gz"
HEAD = struct.pack(">HBB3I", 0, 8, 3, 20, 28, 28)
IDX = {
    "bomb": gzip.compress(HEAD + bytes(200 << 20), 1),
    "promises more": gzip.compress(HEAD + bytes(100)),
    "promises all": gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 9)),
    "floats": gzip.compress(struct.pack(">HBB3I", 0, 13, 3, 20, 28, 28) + bytes(15680)),
    "cut": gzip.compress(HEAD + bytes(15680))[:-30],
    "no gzip": HEAD,
    "header cut": gzip.compress(HEAD[:6]),
    "empty": b"",
}


@pytest.mark.parametrize("case", IDX)
def test_damaged_idx_files(tmp_path, case):
    idx_files(tmp_path)
    (tmp_path / NAME).write_bytes(IDX[case])
    with pytest.raises(InputError, match=f"{NAME} is damaged: ") as told:
        open_data("torch/fashion_mnist", data_dir=tmp_path)
    assert str(told.value).isprintable()
    kept = list((cache_dir() / "idx").rglob("*.partial"))
    assert kept == []


def test_spoiled_pictures_are_left_out(tmp_path):
    kinds = {"a.png": "PNG", "b.jpg": "JPEG", "c.gif": "GIF", "d.tif": "TIFF", "e.webp": "WEBP",
             "f.bmp": "BMP", "g.ppm": "PPM"}  # fmt: skip
    good = {}
    for name, kind in kinds.items():
        Image.effect_noise((24, 20), 50).convert("RGB").save(tmp_path / name, kind)
        good[name] = (tmp_path / name).read_bytes()
    (tmp_path / "z.png").write_bytes(good["a.png"])

    @QUICK
    @given(
        st.sampled_from(sorted(kinds)).flatmap(lambda n: st.tuples(st.just(n), spoiled(good[n])))
    )
    def check(found):
        name, content = found
        (tmp_path / name).write_bytes(content)
        images, unreadable = data.load_images(tmp_path, 8)
        assert len(images) + len(unreadable) == len(kinds) + 1
        (tmp_path / name).write_bytes(good[name])

    check()


def test_bombs_programs_and_pipes_among_pictures(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("1", (1, 1_000_000)).save(tmp_path / "narrow.png")
    (tmp_path / "program.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file closefile\n%%EOF\n"
    )
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    Image.new("RGB", (9, 9)).save(tmp_path / "z.png")
    images, unreadable = data.load_images(tmp_path, 224)
    assert len(images) == 1
    assert unreadable == ["bomb.png", "narrow.png", "program.png"]


def test_digits_are_not_blown_up_without_end():
    with pytest.raises(InputError, match="digits at 1000000×1000000 need too much memory"):
        open_data("digits", img_size=10**6)


# --- grids and sweeps -----------------------------------------------------------------------------

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
    for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)
MERGED = "a: &a {k: v}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n"
    for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)
GRIDS = {
    "g.yaml": [LAUGHS, MERGED, "lr: " + "[" * 9_000,
               "!!python/object/apply:os.system ['touch ran']",
               "seeds: 1000000000000", "seed: 0x" + "f" * 9_000, "seed: " + "9" * 5000,
               "? [a]\n: 1",
               "seeds: " + ":59" * 5_000, "lr: {a: [1]}", f"method: {json.dumps(ESCAPE[:9])}",
               json.dumps({ESCAPE[:9]: 1}), "lr: [[1]]", "- 1", "", "\0", "x" * 100_000],
    "g.toml": ["lr = " + "[" * 9_000, ".".join("a" * 4_000) + " = 1", "seeds = 1000000000000",
               "seed = 0x" + "f" * 9_000, "seed = " + "9" * 5000, 'method = "\\u001b[31m"',
               "lr = nan", "lr = 1979-05-27", "a = 1\na = 2", "\0"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(n, t) for n in GRIDS for t in GRIDS[n]])
def test_crafted_grids(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    found = outcome(lambda: gridfile.read_grid(tmp_path / name), name)
    if found is not None:
        assert outcome(lambda: gridfile.Plan.of(found), "--lr", "unknown method") is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["g.toml", "g.yaml"])
def test_spoiled_grids(tmp_path, name):
    values = {"method": ["wd", "lpwd"], "lr": [0.001, 0.01], "seeds": 2, "model": "test_convnext"}
    text = yaml.safe_dump(values)
    if name == "g.toml":
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    path = tmp_path / name

    @QUICK
    @given(spoiled(text.encode()))
    def check(found):
        path.write_bytes(found)
        read = outcome(lambda: gridfile.read_grid(path), name)
        if read is not None:
            outcome(lambda: gridfile.Plan.of(read).cells(False), "")

    check()


def test_spoiled_records_of_a_sweep(tmp_path):
    plan = gridfile.Plan.of({"method": "lpwd", "lr": [0.1, 0.01]})
    cells = plan.cells(False)
    gridfile.Claim(tmp_path, plan, cells).close()
    good = json.loads((tmp_path / "sweep.json").read_text())

    @QUICK
    @given(mistyped(good))
    def check(found):
        (tmp_path / "sweep.json").write_text(json.dumps(found))
        claim = outcome(lambda: gridfile.Claim(tmp_path, plan, cells), tmp_path.name)
        if claim is not None:
            claim.close()

    check()


def test_spoiled_cells_are_begun_anew_or_named(made, tmp_path):
    options = TrainOptions(command="rop", model="test_convnext", every=1, lr=1e-3)
    (cell,) = sweeps.grid(options, {})
    own = tmp_path / "cells" / cell.name
    own.mkdir(parents=True)
    config, summary = (
        json.loads((made / f"run/{n}.json").read_text()) for n in ("config", "summary")
    )
    (own / "config.json").write_text(json.dumps(config))
    (own / "summary.json").write_text(json.dumps(summary | {"run": "/etc"}))
    assert sweeps._finished(tmp_path, cell)["run"] == str(own)

    @QUICK
    @given(mistyped(config), mistyped(summary))
    def check(config, summary):
        (own / "config.json").write_text(json.dumps(config))
        (own / "summary.json").write_text(json.dumps(summary))
        done = sweeps._finished(tmp_path, cell)
        if done is not None:
            sweeps.rows([cell], [done])
            sweeps.settings([cell], [done])[0].values("rate", "mean")
        found = report_sweeps.read_sweep(tmp_path)
        assert all(text.isprintable() for _, text in found.without.values())
        report_sweeps.groups(found)

    check()


def test_a_cell_that_points_elsewhere_is_not_written_through(tmp_path):
    (cell,) = sweeps.grid(TrainOptions(model="no_such_model"), {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/summary.json").write_text("kept")
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / cell.name).symlink_to(tmp_path / "mine")
    assert sweeps.run_cell(cell, tmp_path / "cells")["status"] == "failed"
    assert (tmp_path / "mine/summary.json").read_text() == "kept"
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["summary.json"]


def test_a_page_is_not_written_through_a_link(copy, tmp_path):
    folder = copy("run")
    (tmp_path / "mine").write_text("kept")
    for name in ("report.html", "report.html.partial", f"report.html.{os.getpid()}.partial"):
        (folder / name).symlink_to(tmp_path / "mine")
    report([folder])
    assert (tmp_path / "mine").read_text() == "kept"
    assert "<title>" in (folder / "report.html").read_text()


# --- pages and terminals --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Glyph", "ignore:.*identical low and high")
@pytest.mark.parametrize("name", ["run", "scan"])
def test_pages_of_spoiled_runs(made, copy, tmp_path, name):
    folder = copy(name)
    good = {n: (folder / n).read_text() for kind, n in READ if kind == name}
    values = {n: json.loads(good[n]) for n in good if "json" in n}

    @SLOW
    @given(st.data())
    def check(drawn):
        for n in good:
            (folder / n).write_text(good[n])
        n = drawn.draw(st.sampled_from(sorted(good)))
        if n in values:
            (folder / n).write_text(json.dumps(drawn.draw(mistyped(values[n]))))
        else:
            (folder / n).write_bytes(drawn.draw(spoiled(good[n].encode())))
        with pytest.MonkeyPatch.context() as patch:
            told = []
            patch.setattr("warnings.warn", lambda message, *_, **__: told.append(str(message)))
            outcome(lambda: report([folder], tmp_path / "page.html"), name)
        assert all(line.isprintable() for line in told)

    check()


def test_tables_that_make_no_grid_take_no_memory(copy, tmp_path):
    folder = copy("run")
    config = json.loads((folder / "config.json").read_text())
    config["layers"] = [{"index": k, "name": f"{k}"} for k in range(1, 20_001)]
    (folder / "config.json").write_text(json.dumps(config))
    rows = "".join(f"{k},{k},0.1\n" for k in range(1, 20_001))
    (folder / "layers.csv").write_text("step,index,rate\n" + rows)
    with pytest.raises(InputError, match="20000 values make no grid of 20000 × 20000"):
        report([folder], tmp_path / "page.html")


def test_names_are_text_on_a_terminal_too(capsys, tmp_path, monkeypatch):
    console = render._Console(force_terminal=True, width=200, highlight=False)
    console.print("a\x1b]0;title\x07b\x9b31m[bold]c[/] \u202e", markup=True)
    shown = capsys.readouterr().out
    assert "a\\x1b]0;titleb\\x9b31m" in shown
    assert "\x1b[1mc" in shown
    assert "\\u202e" in shown
    monkeypatch.setattr(render, "err", render._Console(stderr=True, width=200))
    monkeypatch.setattr("warnings.showwarning", None)
    render.show_warnings()
    sys.modules["warnings"].showwarning(WdProbeWarning("x\x1b[2J\n[red]y"), WdProbeWarning, "", 0)
    assert capsys.readouterr().err == "wdprobe: warning: x\\x1b[2J\\n[red]y\n"


def test_the_dashboard_reads_event_files_only(tmp_path):
    """TensorBoard's projector would read any file that a folder's projector_config.pbtxt names."""
    (tmp_path / "projector_config.pbtxt").write_text(
        'embeddings { tensor_name: "a" metadata_path: "/etc/hostname" }'
    )
    with urlopen(f"{serve(tmp_path, 0)}data/plugins_listing") as answer:
        assert {"scalars", "images", "hparams"} <= (listed := json.load(answer)).keys()
    assert "projector" not in listed


def test_a_folder_with_a_strange_name(wdprobe, tmp_path):
    folder = tmp_path / os.fsdecode(b"a\x1b[2J\n\xff[red]")
    folder.mkdir()
    (folder / "config.json").write_text("[]")
    for arguments in (["report", folder], ["zeroshot", "--run", folder]):
        code, out, err = wdprobe(*arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert "\\x1b[2J\\n\\udcff[red]/config.json is damaged" in err


def test_a_run_too_long_to_be_drawn_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "TABLE_CELLS", 5)
    options = TrainOptions(model="test_convnext", batch_size=32, steps=2, output=tmp_path / "run")
    with pytest.warns(WdProbeWarning, match=r"no figures are drawn: .*steps\.csv has more than 5"):
        assert train(options, Silent())["status"] == "finished"
