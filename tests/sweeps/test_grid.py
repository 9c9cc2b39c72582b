import itertools
import json
import os

import pytest
import yaml
from hypothesis import given

from tests.strangers import ESCAPE, QUICK, mistyped, outcome, spoiled
from tests.sweeps.conftest import stamps
from wd_probe.sweeps.grid import Plan, claimed, read_grid


def test_a_plan_is_the_same_from_text_numbers_and_order():
    plans = [
        Plan.of({"method": "wd", "lr": lr, "seeds": 2})
        for lr in (["1e-3", "0.01"], [0.01, 0.001], (0.001, 0.01, 0.001))
    ]
    assert len({plan.key() for plan in plans}) == 1
    assert Plan.of({"method": "wd", "lr": [0.01], "seeds": 2}).key() != plans[0].key()
    folders = [
        Plan.of({"dataset": d, "data_dir": p}).key()
        for d in ("folder", "torch/cifar10")
        for p in ("a", "b")
    ]
    assert folders[0] != folders[1]
    assert folders[2] == folders[3]


def test_cells_stand_in_one_order_however_a_grid_is_written():
    values = {"method": ["wd", "rwd"], "lr": [0.1, 0.01], "batch_size": [8, 16], "seeds": 2}
    found = [
        (o.method, o.lr, o.batch_size, o.seed)
        for o in (cell.options for cell in Plan.of(values).cells(False))
    ]
    assert found == list(itertools.product(("wd", "rwd"), (0.1, 0.01), (8, 16), (0, 1)))
    for order in itertools.permutations(values):
        assert Plan.of({name: values[name] for name in order}).cells(False) == Plan.of(
            values
        ).cells(False)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["grid.toml", "grid.yaml"])
def test_a_grid_from_a_file_gives_way_to_the_command_line(wdprobe, tmp_path, name):
    text = {
        "grid.toml": 'method = ["wd", "rwd"]\nlr = [1e-3, 1]\nsteps = 2\nbatch-size = [8, 16]\n',
        "grid.yaml": "method: [wd, rwd]\nlr: [1e-3, 1]\nsteps: 2\nbatch_size: [8, 16]\n",
    }[name]
    (tmp_path / name).write_text(text)
    code, out, err = wdprobe("sweep", name, "--method", "pwd", "--seeds", 3, "--json")
    assert code == 0, err
    result = json.loads(out)
    found = {(c["method"], c["lr"], c["batch_size"], c["seed"]) for c in result["cells"]}
    assert found == {("pwd", lr, b, s) for lr in (1e-3, 1.0) for b in (8, 16) for s in (0, 1, 2)}
    assert {c["opt"] for c in result["cells"]} == {"adam"}
    assert [b["batch_size"] for b in result["best"]] == [8, 16]
    record = json.loads((tmp_path / result["run"] / "sweep.json").read_text())
    assert record["axes"]["lr"] == [0.001, 1.0]
    assert record["options"]["steps"] == 2


@pytest.mark.usefixtures("quick")
def test_another_grids_folder_is_refused(wdprobe, tmp_path):
    assert wdprobe("sweep", "--lr", "1e-3,1e-2", "--output", "s")[0] == 0
    before = stamps(tmp_path)
    code, out, err = wdprobe("sweep", "--lr", "1e-3", "--seeds", 2, "--output", "s")
    assert (code, out) == (2, "")
    assert (
        "error: s holds another grid: lr is 0.001, 0.01 there and 0.001 here; "
        "seed is 0 there and 0, 1 here; choose another --output" in err
    )
    assert stamps(tmp_path) == before
    assert wdprobe("sweep", "--lr", "1e-2,1e-3,1e-2", "--device", "cpu", "--output", "s")[0] == 0
    (tmp_path / "s/sweep.json").write_text("{")
    code, _, err = wdprobe("sweep", "--lr", "1e-3,1e-2", "--output", "s")
    assert code == 2
    assert "s/sweep.json is damaged" in err


@pytest.mark.usefixtures("quick")
def test_two_processes_do_not_write_to_one_folder(wdprobe, tmp_path):
    plan = Plan.of({"method": "lpwd", "opt": "adam"})
    with claimed(tmp_path / "s", plan, plan.cells(False)):
        code, _, err = wdprobe("sweep", "--output", "s")
        assert code == 2
        assert f"another sweep is writing to s; let it end first (process {os.getpid()} on " in err
    assert not (tmp_path / "s/.lock").exists()
    assert wdprobe("sweep", "--output", "s")[0] == 0


# --- files of strangers ---------------------------------------------------------------------------

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
    found = outcome(lambda: read_grid(tmp_path / name), name)
    if found is not None:
        assert outcome(lambda: Plan.of(found), "--lr", "unknown method") is None
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
        read = outcome(lambda: read_grid(path), name)
        if read is not None:
            outcome(lambda: Plan.of(read).cells(False), "")

    check()


def test_spoiled_records_of_a_sweep(tmp_path):
    plan = Plan.of({"method": "lpwd", "lr": [0.1, 0.01]})
    cells = plan.cells(False)

    def claim():
        with claimed(tmp_path, plan, cells):
            pass

    claim()
    good = json.loads((tmp_path / "sweep.json").read_text())

    @QUICK
    @given(mistyped(good))
    def check(found):
        (tmp_path / "sweep.json").write_text(json.dumps(found))
        outcome(claim, tmp_path.name)

    check()
