"""Ctrl-C held back until a step has ended, so that the state it leaves can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """A context in which the first Ctrl-C is only noted; a second one raises KeyboardInterrupt.

    So is SIGTERM where it does as Ctrl-C does. In other threads than the main one, which get no
    signals, and with ``hold=False`` nothing is held back.

    Attributes:
        asked: whether there was one.
        between_steps: whether the state was that of a step's end when one was raised.
    """

    def __init__(self, *, hold: bool = True) -> None:
        self.asked, self.between_steps = False, False
        self._hold = hold and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        """Hold them back."""
        held = [s for s in _SIGNALS if signal.getsignal(s) is signal.default_int_handler]
        self._held = held if self._hold else []
        for number in self._held:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked or self.between_steps:
            signal.default_int_handler(number, frame)
        self.asked = True

    def raise_if_asked(self) -> None:
        """At the end of a step: raise what was held back."""
        if self.asked:
            self.between_steps = True
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For what lies between two steps and changes nothing: raise at once."""
        self.raise_if_asked()
        self.between_steps = True
        yield
        self.between_steps = False

    def __exit__(self, *_: object) -> None:
        """Hold nothing back."""
        for number in self._held:
            signal.signal(number, signal.default_int_handler)
