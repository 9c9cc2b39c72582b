from pathlib import Path

import pytest

from wd_probe import InputError
from wd_probe.cache import cache_dir


def test_the_folder_on_linux(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_dir() == tmp_path / "cache/wd_probe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / "home/.cache/wd_probe"
    assert cache_dir().is_dir()


@pytest.mark.parametrize("home", [Path("~/.cache/wd_probe"), RuntimeError("no home")])
def test_without_a_home_folder_nothing_is_made(monkeypatch, tmp_path, home):
    """Older platformdirs hand out `~` as it is, newer ones raise."""

    def place(*_, **__):
        if isinstance(home, Exception):
            raise home
        return home

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wd_probe.cache.user_cache_path", place)
    with pytest.raises(InputError, match="no home folder to keep a cache in; set XDG_CACHE_HOME"):
        cache_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder(monkeypatch, tmp_path):
    (tmp_path / "wd_probe").write_text("")
    monkeypatch.setattr("wd_probe.cache.user_cache_path", lambda *_, **__: tmp_path / "wd_probe")
    with pytest.raises(InputError, match=r"wd_probe cannot be made \(File exists\); set XDG_CACHE"):
        cache_dir()


@pytest.mark.parametrize("relative", ["cache", "./cache", "~/cache"])
def test_a_relative_folder_is_ignored_as_the_standard_wants(monkeypatch, tmp_path, relative):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    assert cache_dir() == tmp_path / "home/.cache/wd_probe"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
