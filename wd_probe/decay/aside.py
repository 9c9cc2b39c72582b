"""Steps taken aside: nobody's random numbers move on for them, and nobody's hooks are called."""

import functools
import random
import sys
import threading
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_module

#: What torch keeps the hooks of an optimizer in.
HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# A scheduler's patch of "step" would step the original.
NOT_COPIED = {"step", *HOOKS}

_NUMPYS = (np.random.Generator, np.random.BitGenerator)
_KINDS = (torch.Generator, random.Random, np.random.RandomState, *_NUMPYS)
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
#: What their code draws from is global, or handed to it.
_WITHOUT_OWN = {"torch", "numpy", "builtins", *sys.stdlib_module_names} - {"__main__"}


@contextmanager
def aside(generators: Iterable[Any]) -> Iterator[None]:
    """Leave random states as they were, call no global hooks, warn of nothing, compile nothing.

    Args:
        generators: those to keep beside the global ones; see :func:`generators_of`.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # for so few numbers, waking others takes longer than the work
        stack.enter_context(random_kept(generators))
        stack.enter_context(unhooked())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


# --- random numbers ---------------------------------------------------------------------------


@contextmanager
def random_kept(generators: Iterable[Any]) -> Iterator[None]:
    """The global random numbers, and these generators', go on as if none had been drawn."""
    started = torch.cuda.is_initialized()
    kept = [(one, _state(one)) for one in (*_global_generators(), *generators)]
    try:
        yield
    finally:
        for one, state in kept:
            _set_state(one, state)
        if torch.cuda.is_initialized() and not started:
            for one in torch.cuda.default_generators:
                one.manual_seed(one.initial_seed())


def _global_generators() -> Iterator[Any]:
    yield random.getstate.__self__  # type: ignore[attr-defined]
    yield np.random.get_state.__self__  # type: ignore[attr-defined]
    yield torch.default_generator
    if torch.cuda.is_initialized():
        yield from torch.cuda.default_generators
    if torch.backends.mps.is_available():
        yield torch.mps._get_default_mps_generator()


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return None if isinstance(generator, random.SystemRandom) else generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return getattr(generator, "bit_generator", generator).state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif not isinstance(generator, random.Random):
        getattr(generator, "bit_generator", generator).state = state
    elif state is not None:
        generator.setstate(state)


def generators_of(holder: Any) -> list[Any]:
    """The random generators that an object and the code of its class can reach.

    In its attributes, in what they hold, in closures, and in the modules whose names its code uses.
    """
    found: list[Any] = []
    seen: dict[int, Any] = {}
    ahead: list[Any] = [holder]
    while ahead:
        item = ahead.pop()
        if isinstance(item, _ATOMS) or id(item) in seen:
            continue
        seen[id(item)] = item  # kept, so that no other object takes its number
        if isinstance(item, _KINDS):
            found.append(item)
        elif not isinstance(item, torch.Tensor | np.ndarray):
            ahead += _within(item)
    return found


def _within(item: Any) -> Iterable[Any]:
    """What one object holds, or can call by name."""
    if isinstance(item, Mapping):
        return item.values()
    if isinstance(item, list | tuple | set | frozenset | deque):
        return item
    if isinstance(item, types.FunctionType):
        return _used_by(item)
    if isinstance(item, functools.partial):
        return (item.func, *item.args, *item.keywords.values())
    if isinstance(item, types.MethodType):
        return (item.__func__, item.__self__)
    if isinstance(item, types.BuiltinMethodType):
        return () if isinstance(item.__self__, types.ModuleType) else (item.__self__,)
    if isinstance(item, staticmethod | classmethod):
        return (item.__func__,)
    if isinstance(item, property):
        return (item.fget, item.fset)
    if isinstance(item, Optimizer):
        own = (value for name, value in vars(item).items() if name not in NOT_COPIED)
        return (*own, type(item))
    if isinstance(item, types.ModuleType):
        return () if _is_without_own(item) else tuple(vars(item).values())
    if isinstance(item, type):
        return () if _is_without_own(item) else (*vars(item).values(), *item.__bases__)
    slots = (getattr(item, name, None) for name in getattr(type(item), "__slots__", ()))
    return (*getattr(item, "__dict__", {}).values(), *slots, type(item))


def _used_by(function: types.FunctionType) -> Iterator[Any]:
    """What a function closes over, and the globals that its code names."""
    yield getattr(function, "__wrapped__", None)
    if _is_without_own(function):
        return
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    names = set(_names(function.__code__))
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if not isinstance(value, types.ModuleType):
            yield value
        elif not _is_without_own(value):
            yield from (vars(value)[used] for used in names & vars(value).keys())


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _is_without_own(item: Any) -> bool:
    home = item.__name__ if isinstance(item, types.ModuleType) else item.__module__
    return str(home).partition(".")[0] in _WITHOUT_OWN


# --- hooks ------------------------------------------------------------------------------------


class _Here(threading.local):
    """How deep this thread is in steps of its own."""

    depth = 0


class _Elsewhere:
    """A hook that is called for the steps of other threads alone."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *arguments: Any) -> Any:
        return None if _here.depth else self.hook(*arguments)


_here = _Here()
_masking = threading.Lock()
_masked = 0  # by so many threads


@contextmanager
def unhooked() -> Iterator[None]:
    """Hooks on the steps of all optimizers are not called for what this thread steps inside."""
    global _masked
    with _masking:
        _masked += 1
        _mask()
    depth = _here.depth
    try:
        _here.depth = depth + 1
        yield
    finally:
        _here.depth = depth
        with _masking:
            _masked -= 1
            if not _masked:
                _unmask()


def _hook_tables() -> Iterator[dict[int, Any]]:
    yield optimizer_module._global_optimizer_pre_hooks
    yield optimizer_module._global_optimizer_post_hooks


def _mask() -> None:
    for hooks in _hook_tables():
        for number, hook in list(hooks.items()):
            if not isinstance(hook, _Elsewhere):
                hooks[number] = _Elsewhere(hook)


def _unmask() -> None:
    for hooks in _hook_tables():
        for number, hook in list(hooks.items()):
            if isinstance(hook, _Elsewhere):
                hooks[number] = hook.hook
