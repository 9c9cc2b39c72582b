"""Being called around every step of an optimizer, and ahead of a model's forward passes."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from types import FrameType
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim import optimizer as optimizer_module

from .arguments import check_type
from .errors import InputError
from .sharding import local

#: It steps another over its part of the weights, and hands the others' parts round afterwards.
_STEPS_ITSELF = {"ZeroRedundancyOptimizer"}

_LOOKED_AT, _MOVES = 16, 3  # numbers of a weight; places that it was seen at

#: The numbers of the hooks that come first of all after a step, and of those ahead of one.
_FIRST: set[int] = set()
_AHEAD: set[int] = set()

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def hooked(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps, and whose hooks fire: itself, or the one that it holds.

    Raises:
        InputError: it is no optimizer, or its hooks would never fire, or it holds several that
            step, or it is LBFGS, which moves the weights many times in one step.
    """
    found = _followed(optimizer)
    if len(found) > 1:
        name = type(optimizer).__name__
        raise InputError(f"{name} holds several that step ({classes(found)}): give one of them")
    return found[0]


def hooked_all(optimizers: Optimizer | Iterable[Optimizer]) -> tuple[Optimizer, ...]:
    """As :func:`hooked`, of one optimizer or several, each of which may hold several.

    Raises:
        InputError: as there; or there is none, or one is given twice.
    """
    if not isinstance(optimizers, Iterable):
        return _followed(optimizers)
    given = optimizers.values() if isinstance(optimizers, Mapping) else optimizers
    found = tuple(inner for optimizer in given for inner in _followed(optimizer))
    if not found:
        raise InputError("the list of optimizers is empty")
    if len(set(found)) < len(found):
        raise InputError("an optimizer is given twice")
    return found


def classes(optimizers: Sequence[Optimizer]) -> str:
    """What they are called, of the first three."""
    names = [type(one).__name__ for one in optimizers[:3]]
    return ", ".join([*names, "..."] if len(optimizers) > 3 else names)


def _followed(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """Those that step: SAM, Lookahead, accelerate's and their like leave it to one they hold."""
    held = _held(optimizer)
    if not held:
        check_type(optimizer, "optimizer", Optimizer, "a torch.optim.Optimizer")
    if isinstance(optimizer, LBFGS):
        raise InputError("LBFGS moves the weights several times in one step: it has no single û")
    # torch marks a step as hooked in Optimizer.__init__, which some wrappers never call.
    fires = getattr(getattr(type(optimizer), "step", None), "hooked", False)
    inner = {p for one in held for p in _parameters(one)}
    leaves_it = held and inner >= _parameters(optimizer)
    if fires and not (leaves_it and type(optimizer).__name__ not in _STEPS_ITSELF):
        return (optimizer,)
    if held:
        return tuple({found: None for one in held for found in _followed(one)})
    raise InputError(
        f"{type(optimizer).__name__} does not call torch's step hooks (does its __init__ call "
        "super().__init__?); attach to the optimizer it wraps"
    )


def _held(wrapper: Any) -> list[Optimizer]:
    """The optimizers among its attributes, and in lists and dicts there."""
    found: dict[Optimizer, None] = {}
    for value in getattr(wrapper, "__dict__", {}).values():
        several = value.values() if isinstance(value, dict) else value
        for one in several if isinstance(several, list | tuple | ValuesView) else (value,):
            if isinstance(one, Optimizer) and one is not wrapper:
                found[one] = None
    return list(found)


def _parameters(optimizer: Any) -> set[Tensor]:
    groups = getattr(optimizer, "param_groups", ())
    return {p for group in groups for p in group["params"]}


class StepHooks:
    """Calls ``before``, ``graded`` and ``after`` around every outermost ``optimizer.step()``.

    ``before(has_closure)`` comes first, ``graded()`` once the gradient is there as the optimizer
    will see it (when every other hook has seen to it, or after every call of the closure, each of
    which ``ungraded()`` precedes), ``after()`` when the optimizer has done its work, ahead of what
    other hooks do to the weights. A subclass that calls ``super().step()`` fires torch's hooks
    twice, and a step that raises fires the first and not the second; both are told apart by whether
    the earlier call is still on the stack. A step that has not come to its end is told to
    ``stopped(returned)`` ahead of the next one, or when `settle` is called: ``returned`` is whether
    the optimizer itself had done its work. A compiled step calls ``graded()`` when other hooks are
    still to see to the gradient, and ``early()`` then.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[bool], None],
        after: Callable[[], None],
        *,
        graded: Callable[[], None] | None = None,
        ungraded: Callable[[], None] | None = None,
        early: Callable[[], None] | None = None,
        stopped: Callable[[bool], None] | None = None,
        outermost: bool = False,
    ) -> None:
        """Attach; ``outermost`` is around those that are not: before them, and after them."""
        self._before, self._graded, self._after = before, graded, after
        self._ungraded, self._early, self._stopped = ungraded, early, stopped
        self._closure = _closure_name(type(optimizer).step)
        self._frame: FrameType | None = None
        self._depth = 0
        pre = optimizer.register_step_pre_hook(untraced(self._pre))
        post = optimizer.register_step_post_hook(untraced(self._post))
        self._handles = (pre, post)
        _AHEAD.add(pre.id)
        pres, posts = (handle.hooks_dict_ref() for handle in self._handles)
        assert pres is not None
        assert posts is not None
        posts.move_to_end(post.id, last=False)
        if not outermost:
            _FIRST.add(post.id)
            return
        pres.move_to_end(pre.id, last=False)
        for inner in [number for number in reversed(posts) if number in _FIRST]:
            posts.move_to_end(inner, last=False)

    def _pre(
        self,
        optimizer: Optimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        is_traced: bool = False,
    ) -> _Arguments | None:
        caller = _stepping(sys._getframe(1))
        if self._frame is not None and _on_stack(self._frame, caller):
            self._depth += 1
            return None
        self.settle()
        self._frame, self._depth = caller, 1
        place = self._closure_place(args, kwargs)
        self._before(place is not None)
        graded = self._graded
        if graded is None:
            return None
        if place is None:
            self._when_ready(graded, caller, is_traced)
            return None
        if isinstance(place, str):
            return args, {**kwargs, place: self._then_graded(kwargs[place], graded)}
        closure = self._then_graded(args[place], graded)
        return (*args[:place], closure, *args[place + 1 :]), kwargs

    def _when_ready(self, graded: Callable[[], None], step: FrameType, is_traced: bool) -> None:
        """Call it when the last of the hooks ahead of a step has run."""
        hooks = self._handles[0].hooks_dict_ref()
        assert hooks is not None
        last = next(reversed(hooks))
        hook = hooks[last]
        if isinstance(hook, _Last) and hook.step is not step:  # that one was stopped
            hook = hooks[last] = hook.hook
        if isinstance(hook, _Last):
            hook.then.append(graded)
        elif last == self._handles[0].id or is_traced:
            graded()  # to a compiled step, hooks are what they were when it began
            if self._early is not None and self._is_followed(list(hooks)):
                self._early()
        else:
            hooks[last] = _Last(hook, [graded], step, hooks, last)

    def _is_followed(self, hooks: list[int]) -> bool:
        """Whether hooks of others come after this one, ahead of a step."""
        return not _AHEAD.issuperset(hooks[hooks.index(self._handles[0].id) :])

    def _closure_place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
        """Where among a step's arguments its closure is, if it was given one."""
        name, place = self._closure or ("", 0)
        if callable(kwargs.get(name)):
            return name
        return place if 0 < place < len(args) and callable(args[place]) else None

    def _then_graded(
        self, closure: Callable[..., Any], graded: Callable[[], None]
    ) -> Callable[..., Any]:
        @wraps(closure)
        def then_graded(*args: Any, **kwargs: Any) -> Any:
            if self._ungraded is not None:
                self._ungraded()
            loss = closure(*args, **kwargs)
            graded()
            return loss

        return then_graded

    def _post(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth and _stepping(sys._getframe(1)) is not self._frame:
            return
        self._after()
        self._frame = None

    def settle(self) -> None:
        """Tell ``stopped`` of a step that is over, and has not come to its end; once of each."""
        frame = self._frame
        if frame is None or _on_stack(frame, sys._getframe(1)):
            return
        if self._stopped is not None:
            self._stopped("out" in frame.f_locals)  # what the optimizer has returned, in torch
        self._frame = None

    def remove(self) -> None:
        """Detach; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._frame = None


@dataclass(frozen=True, slots=True)
class _Last:
    """The last hook ahead of one step, in whose place this stands, and what is to follow it."""

    hook: Callable[..., Any]
    then: list[Callable[[], None]]
    step: FrameType
    hooks: dict[int, Callable[..., Any]]
    number: int

    def __call__(self, *arguments: Any) -> Any:
        result = self.hook(*arguments)
        if self.number in self.hooks:
            self.hooks[self.number] = self.hook
        for call in self.then:
            call()
        return result


def _closure_name(step: Callable[..., Any]) -> tuple[str, int] | None:
    """Under which name, and in which place, a step takes a closure; place 0 if by name alone."""
    for place, parameter in enumerate(signature(step).parameters.values()):
        if parameter.kind is parameter.VAR_POSITIONAL:
            return "closure", place
        if parameter.kind is parameter.VAR_KEYWORD:
            return "closure", 0
        if "closure" in parameter.name:
            return parameter.name, 0 if parameter.kind is parameter.KEYWORD_ONLY else place
    return None


def is_captured() -> bool:
    """Whether what is done here goes into a CUDA graph, where nothing may be read back."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook on steps, which a compiled step calls between its graphs."""

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return _outside_the_graph(hook, *arguments, True)
        return hook(*arguments)

    return call


# As torch.compiler.disable, which would load torch._dynamo here and now.
@torch._disable_dynamo  # type: ignore[attr-defined]
def _outside_the_graph(call: Callable[..., Any], *arguments: Any) -> Any:
    return call(*arguments)


def _stepping(frame: FrameType) -> FrameType:
    """The frame of torch that called a step hook, below whatever the compiler put between."""
    found: FrameType | None = frame
    while found is not None and found.f_code.co_filename != optimizer_module.__file__:
        found = found.f_back
    return frame if found is None else found


def _on_stack(wanted: FrameType, frame: FrameType | None) -> bool:
    while frame is not None:
        if frame is wanted:
            return True
        frame = frame.f_back
    return False


class ForwardHooks:
    """Calls ``before()`` ahead of a model's forward passes in training mode.

    A loop need not call the model itself: Lightning calls a method that calls a part of it. So
    every module has a hook until the first pass shows which one is called; then that module and
    the model keep theirs.
    """

    def __init__(self, model: nn.Module, before: Callable[[], None]) -> None:
        """Attach."""
        self._before, self._model = before, model
        self._handles = {
            # ahead of hooks that copy the weights elsewhere, as FSDP's does
            module: module.register_forward_pre_hook(
                _ForwardHook(self, module is model), prepend=True
            )
            for module in model.modules()
        }

    def called(self, module: nn.Module) -> None:
        """A module is about to run."""
        if not module.training:
            return
        for other in list(self._handles):
            if other is not self._model and other is not module:
                self._handles.pop(other).remove()
        self._before()

    def remove(self) -> None:
        """Detach; safe to call twice."""
        for handle in self._handles.values():
            handle.remove()


class _ForwardHook:
    """One module's hook; a deep copy or pickle of the module carries a hook that does nothing."""

    def __init__(self, owner: ForwardHooks, is_model: bool) -> None:
        self._owner, self._is_model = owner, is_model

    def __call__(self, module: nn.Module, _: Any) -> None:
        if not torch.compiler.is_compiling():
            self._owner.called(module)
        elif self._is_model:  # compiled after attaching: one graph break, ahead of the forward
            _outside_the_graph(self._owner.called, module)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _inert_hook, ()


def _inert(*_: Any) -> None:
    pass


def _inert_hook() -> Callable[..., None]:
    return _inert


class Missing:
    """Calls ``missing(passes)`` once where weights move and no step that moves them is seen.

    A backward pass gives the largest of the weights its gradient, and is taken to see whether it
    has moved since the one before: until the first step, which calls `seen`. Weights that come back
    to where they were (SAM's) are not moved.
    """

    def __init__(self, weights: Iterable[Tensor], missing: Callable[[int], None]) -> None:
        """Attach."""
        self._missing, self._passes = missing, 0
        self._places: list[bytes] = []  # since it stood where it stood at first
        free = [
            p for p in weights
            if p.requires_grad and p.is_leaf and not p.is_meta and local(p).numel()
        ]  # fmt: skip
        self._p = max(free, key=Tensor.numel, default=None)
        hook = weakly(self._graded)
        self._handle = None if self._p is None else self._p.register_post_accumulate_grad_hook(hook)

    def _graded(self, _: Tensor) -> None:
        """A backward pass has reached the weight."""
        self._passes += 1
        try:
            place = self._place()
        except Exception:  # numbers that cannot be read must not end somebody's training
            self.remove()
            return
        if self._places and place == self._places[0]:
            del self._places[1:]
        elif place not in self._places:
            self._places.append(place)
        if len(self._places) > _MOVES:
            self.remove()
            self._missing(self._passes)

    def _place(self) -> bytes:
        """Where some of its numbers stand."""
        assert self._p is not None
        part = local(self._p).detach()
        corner = part[(0,) * (part.ndim - 1)][:_LOOKED_AT] if part.ndim else part
        return corner.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()

    def look(self) -> None:
        """See whether the weight has moved, as no other pass may come."""
        if self._handle is not None and self._places and self._place() != self._places[0]:
            self.remove()
            self._missing(self._passes)

    def remove(self) -> None:
        """A step is seen, or none is to be looked for any more; safe to call twice."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = self._p = None

    def __reduce__(self) -> tuple[type["Missing"], tuple[tuple[()], Callable[..., None]]]:
        """A copy or pickle misses nothing."""
        return Missing, ((), _inert)


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A method that is called only while its object lives, and does not keep it alive."""
    found = WeakMethod(method)

    def call(*arguments: Any) -> None:
        alive = found()
        if alive is not None:
            alive(*arguments)

    return call
