import ctypes
import hashlib
import os
import subprocess

import pytest

from wd_probe import InputError, RunError
from wd_probe.cache import cache_dir
from wd_probe.probe.kernel import compiled
from wd_probe.probe.kernel.compiled import library

SOURCE = b"double twice(double x) { return 2 * x; }\n"
#: Leaves a mark as soon as it is loaded.
PLANTED = """
#include <stdio.h>
__attribute__((constructor)) static void mark(void) {{ fclose(fopen("{mark}", "w")); }}
double twice(double x) {{ return 0; }}
"""


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The library that the cache keeps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    twice(library(SOURCE, ["twice"]))
    (file,) = (tmp_path / "cache").rglob("*.so")
    return file


@pytest.fixture
def plant(tmp_path):
    """Put another library in a file's place; whether it was ever loaded."""
    mark = tmp_path / "mark"

    def plant(file, checksum=True):
        source = tmp_path / "planted.c"
        source.write_text(PLANTED.format(mark=mark))
        file.unlink(missing_ok=True)
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", file], check=True)
        file.chmod(0o600)
        if checksum:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            file.with_suffix(".sha256").write_text(digest)
        return mark.exists

    return plant


def twice(found):
    found.twice.restype, found.twice.argtypes = ctypes.c_double, [ctypes.c_double]
    assert found.twice(21.0) == 42.0


def test_it_is_compiled_once(kept, monkeypatch):
    assert kept.parent == cache_dir() / "kernel"
    assert [oct(path.stat().st_mode & 0o777) for path in (kept.parent, kept)] == ["0o700", "0o600"]
    monkeypatch.setattr(compiled.subprocess, "run", None)
    twice(library(SOURCE, ["twice"]))
    assert sorted(path.suffix for path in kept.parent.iterdir()) == [".sha256", ".so"]


@pytest.mark.parametrize("size", [0, 100, 4096, -1])
def test_a_damaged_file_is_compiled_again(kept, size):
    whole = kept.read_bytes()
    kept.unlink()  # it is mapped
    kept.write_bytes(whole[:size] if size else b"garbage")
    twice(library(SOURCE, ["twice"]))
    assert compiled._loaded(kept, ["twice"]) is not None


def test_a_file_without_its_checksum_is_compiled_again(kept, plant):
    loaded = plant(kept, checksum=False)
    twice(library(SOURCE, ["twice"]))
    kept.with_suffix(".sha256").unlink()
    twice(library(SOURCE, ["twice"]))
    assert not loaded()


def test_a_library_without_the_symbols_is_compiled_again(kept):
    kept.unlink()
    source = kept.with_suffix(".c")
    source.write_text("int other;")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", kept], check=True)
    kept.with_suffix(".sha256").write_text(hashlib.sha256(kept.read_bytes()).hexdigest())
    twice(library(SOURCE, ["twice"]))


def others_file(file, folder):
    return file


def others_folder(file, folder):
    return folder


@pytest.mark.parametrize("whose", [others_file, others_folder])
def test_what_belongs_to_somebody_else_is_not_loaded(kept, plant, monkeypatch, whose):
    loaded = plant(kept)
    owned, lstat = whose(kept, kept.parent), type(kept).lstat

    def others(path):
        found = lstat(path)
        if path != owned:
            return found
        return os.stat_result((*found[:4], os.geteuid() + 1, *found[5:]))

    monkeypatch.setattr(type(kept), "lstat", others)
    twice(library(SOURCE, ["twice"]))
    assert not loaded()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_what_others_can_write_to_is_not_loaded(kept, plant, mode):
    loaded = plant(kept)
    kept.parent.chmod(mode)
    twice(library(SOURCE, ["twice"]))
    assert not loaded()
    kept.parent.chmod(0o700)
    kept.chmod(0o666)
    twice(library(SOURCE, ["twice"]))
    assert not loaded()


def test_links_are_not_followed(kept, plant, tmp_path):
    elsewhere = tmp_path / kept.name
    loaded = plant(elsewhere)
    for suffix in (".so", ".sha256"):
        kept.with_suffix(suffix).unlink()
        kept.with_suffix(suffix).symlink_to(elsewhere.with_suffix(suffix))
    twice(library(SOURCE, ["twice"]))
    for path in kept.parent.iterdir():
        path.unlink()
    kept.parent.rmdir()
    kept.parent.symlink_to(tmp_path)
    plant(elsewhere)
    twice(library(SOURCE, ["twice"]))
    assert not loaded()


def test_without_a_cache_it_is_compiled_for_the_process(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    twice(library(SOURCE, ["twice"]))


@pytest.mark.parametrize(
    ("compiler", "error", "told"),
    [
        ("", InputError, "there is no C compiler"),
        ("no-such-compiler", InputError, r"there is no C compiler \(no-such-compiler\)"),
        ("false", RunError, "false makes nothing that can be loaded: it said nothing"),
    ],
)
def test_without_a_compiler_there_is_none(tmp_path, monkeypatch, compiler, error, told):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(error, match=told):
        library(SOURCE, ["twice"])


def test_a_source_that_does_not_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RunError, match=r"makes nothing that can be loaded: .*error"):
        library(b"this is no C", ["twice"])


ARM = "processor : 0\nFeatures\t: fp asimd{}\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"
X86 = "processor : 0\nmodel name\t: A CPU\nflags\t: sse2{}\n"


@pytest.mark.parametrize(("cpuinfo", "more"), [(ARM, " sve"), (X86, " avx512f")])
def test_the_key_knows_the_features_of_the_cpu(monkeypatch, cpuinfo, more):
    def key(text):
        monkeypatch.setattr(compiled.Path, "read_text", lambda *_: text)
        return compiled._key(SOURCE, "cc")

    plain, better = key(cpuinfo.format("")), key(cpuinfo.format(more))
    assert plain != better
    assert key(cpuinfo.format("") * 70) == plain
    assert key(cpuinfo.format("") * 70 + cpuinfo.format(more)) not in (plain, better)
