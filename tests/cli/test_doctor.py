import json
import shutil

import pytest

from wd_probe.probe import checkup
from wd_probe.probe.kernel import cpu, plain
from wd_probe.probe.sums import RAW

HAS_COMPILER = shutil.which("cc") is not None


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(checkup, "WEIGHTS", 20_000)
    monkeypatch.setattr(checkup, "TIMED", 1 << 16)
    cpu.passes.cache_clear()
    yield
    monkeypatch.undo()
    cpu.passes.cache_clear()


def one_more(counted, column):
    """Counts one too many, or adds up a thousandth too much."""

    def count(*given):
        found = counted(*given)
        if column < 4:
            found[0, column] += 1
        else:
            found[:, column] *= 1.001
        return found

    return count


def test_a_machine_that_is_well(wdprobe):
    code, out, err = wdprobe("doctor", "--json")
    found = json.loads(out)
    assert (code, found["problems"], err) == (0, [], "")
    first = found["devices"][0]
    assert (first["device"], first["kernel"]) == ("cpu", "C" if HAS_COMPILER else "torch")
    told = {(one["dtype"], one["keep"]): one for one in first["agreement"]}
    assert len(told) == 5
    assert all(one["problem"] is None and one["weights"] == 20_000 for one in told.values())
    assert 0 < told["float32", "whole"]["error"] < 1e-6
    assert told["float64", "whole"]["error"] < 1e-12
    assert [one["what"] for one in first["pace"]] == list(checkup.WORDS)
    assert all(one["ms"] > 0 and one["of_floor"] > 0 for one in first["pace"])
    assert found["versions"]["torch"]
    assert set(found["optional"]) == {
        "triton", "ray", "lightning", "transformers", "accelerate", "wandb", "mlflow", "trackio",
    }  # fmt: skip
    assert (found["cache"]["mode"], found["cache"]["problem"]) == ("700", None)
    code, out, _ = wdprobe("doctor")
    assert code == 0
    assert "All is well" in out
    assert "wrong" not in out


@pytest.mark.parametrize("column", range(RAW.index("taken")), ids=RAW[: RAW.index("taken")])
@pytest.mark.parametrize("kept", ["whole", "signs"])
def test_a_kernel_that_counts_wrong(monkeypatch, column, kept):
    """The oracle sees every number that is off."""
    broken = {"whole": plain.Whole, "signs": plain.Signs}[kept]
    monkeypatch.setattr(cpu, "passes", lambda: None)
    monkeypatch.setattr(broken, "count", one_more(broken.count, column))
    agreement = checkup.checkup(checkup.devices()[0]).agreement
    expected = column < 4 or kept == "whole"  # sizes are unknown of signs
    wrong = [one.problem for one in agreement if one.keep == kept and one.problem]
    assert all(one.problem is None for one in agreement if one.keep != kept)
    assert len(wrong) == (expected and (4 if kept == "whole" else 1))
    assert all(problem.startswith(f"{RAW[column]} is ") for problem in wrong)


def test_what_is_wrong_is_named(wdprobe, monkeypatch):
    monkeypatch.setattr(plain.Signs, "count", one_more(plain.Signs.count, 1))
    monkeypatch.setenv("WD_PROBE_KERNEL", "0")
    code, out, _ = wdprobe("doctor")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("• ")]
    assert line.startswith("• cpu, float32, keep signs, by torch: opposing is ")
    assert " instead of " in line


def test_a_kernel_that_raises(wdprobe, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such instruction\nat all")

    monkeypatch.setattr(plain.Whole, "count", broken)
    code, out, _ = wdprobe("doctor", "--json")
    found = json.loads(out)
    assert code == 1
    assert "cpu, float64, keep whole, by torch: it fails: no such instruction" in found["problems"]


def test_without_a_compiler_torch_counts(wdprobe, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    code, out, _ = wdprobe("doctor")
    assert code == 0
    assert "float32 is counted by torch: there is no C compiler (no-such-compiler)" in out
    assert "compiler  none" in out


def test_a_compiler_that_does_not_work_is_wrong(wdprobe, monkeypatch):
    monkeypatch.setenv("CC", "false")
    code, out, _ = wdprobe("doctor")
    assert code == 1
    assert out.splitlines()[-1].startswith("• cpu: ")
    assert "makes nothing that can be loaded" in out


def test_a_cache_that_others_write_to_is_told(wdprobe, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "wd_probe" / "kernel"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    code, out, _ = wdprobe("doctor")
    assert code == 0
    assert "mode 777" in out
    assert f"every process compiles anew: {folder} is not this user's alone" in out


def test_processors_that_others_keep_busy_are_told(wdprobe, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (999.0, 0.0, 0.0))
    assert "999.0 processes want them: times tell little" in wdprobe("doctor")[1]
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 0.0, 0.0))
    assert "times tell little" not in wdprobe("doctor")[1]


def test_a_package_that_is_missing_is_wrong(wdprobe, monkeypatch):
    from wd_probe.probe import machine

    version = machine._version
    monkeypatch.setattr(
        machine, "_version", lambda name: None if name == "scipy" else version(name)
    )
    code, out, _ = wdprobe("doctor")
    assert code == 1
    assert "• scipy is not installed" in out
