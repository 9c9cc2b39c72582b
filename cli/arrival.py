"""Something is done as soon as whoever wants a module has loaded it."""

import importlib.abc
import importlib.util
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

from wd_probe.errors import first_line


def when_loaded(name: str, then: Callable[[], None]) -> None:
    """Call once a module is loaded, which may be now."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Arrival(name, then))


class _Arrival(importlib.abc.MetaPathFinder):
    """Calls ``then`` once a module has been loaded by whoever wants it."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """As others find it, with a loader that says when it is done."""
        if name != self._name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._then)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, which is a module's own by the time that the module runs."""

    def __init__(self, loader: importlib.abc.Loader, then: Callable[[], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        """As the other one does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        """As the other one does; what follows may fail, and the script goes on."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            self._then()
        except Exception as error:
            print(f"wdprobe: nothing is measured: {first_line(error)}", file=sys.stderr)
