"""Being called once before and once after every step of an optimizer."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.optim import LBFGS, Optimizer

from .errors import InputError

#: Under these names wrappers (timm's Lookahead, accelerate, SAM) keep the optimizer they wrap.
_INNER = ("_base_optimizer", "base_optimizer", "optimizer")


def hooked(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose step hooks fire: itself, or the one a wrapper holds.

    Raises:
        InputError: it is no optimizer, or its hooks would never fire, or it is LBFGS, which moves
            the weights many times in one step.
    """
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"a torch.optim.Optimizer is needed, got {type(optimizer).__name__}")
    if isinstance(optimizer, LBFGS):
        raise InputError("LBFGS moves the weights several times in one step: it has no single û")
    # torch marks a step as hooked in Optimizer.__init__, which some wrappers never call.
    if getattr(type(optimizer).step, "hooked", False):
        return optimizer
    for name in _INNER:
        inner = vars(optimizer).get(name)
        if isinstance(inner, Optimizer):
            return hooked(inner)
    raise InputError(
        f"{type(optimizer).__name__} does not call torch's step hooks (does its __init__ call "
        "super().__init__?); attach to the optimizer it wraps"
    )


class StepHooks:
    """Calls ``before(has_closure)`` and ``after()`` around every outermost ``optimizer.step()``.

    A subclass that calls ``super().step()`` fires torch's hooks twice, and a step that raises fires
    the first and not the second; both are told apart by whether the earlier call is still on the
    stack.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[bool], None],
        after: Callable[[], None],
        *,
        outermost: bool = False,
    ) -> None:
        """Attach; ``outermost`` runs before every other hook, and after every other one."""
        self._before, self._after = before, after
        self._frame: FrameType | None = None
        self._depth = 0
        pre = optimizer.register_step_pre_hook(self._pre)
        post = optimizer.register_step_post_hook(self._post)
        self._handles = (pre, post)
        moved = pre if outermost else post
        hooks = moved.hooks_dict_ref()
        assert hooks is not None
        hooks.move_to_end(moved.id, last=False)

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caller = sys._getframe(1)
        if self._frame is not None and _on_stack(self._frame, caller):
            self._depth += 1
            return
        self._frame, self._depth = caller, 1
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._before(closure is not None)

    def _post(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._frame = None
            self._after()

    def remove(self) -> None:
        """Detach; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._frame = None


def _on_stack(wanted: FrameType, frame: FrameType | None) -> bool:
    while frame is not None:
        if frame is wanted:
            return True
        frame = frame.f_back
    return False
