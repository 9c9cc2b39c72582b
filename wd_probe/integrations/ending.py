"""How a script of somebody's own ends, and what is done then."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

#: What ends a process where nothing is said of them.
_SIGNALS = ("SIGTERM", "SIGHUP")


def status_of(error: type[BaseException] | None) -> str:
    """What a run's files say of it."""
    if error is None:
        return "finished"
    return "interrupted" if issubclass(error, KeyboardInterrupt) else "failed"


def close_at_exit(close: Callable[[str], None]) -> None:
    """Call it with the status of a script that is over, and let python end as it would have."""
    error = getattr(sys, "last_type", None)  # of what ended it
    with contextlib.suppress(KeyboardInterrupt):  # of who does not wait for the figures
        close(status_of(error))
    if error is KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")  # python ends by the last one that code text raised


class Endings:
    """What is done before a signal ends the process, which it would do without a word.

    A script's own handlers stay, and so does what they make of the signal: one that calls the
    handler it has found, as Lightning's does, goes on by itself.
    """

    def __init__(self) -> None:
        self._closes: list[Callable[[], None]] = []
        self._process = self._busy = self._came = 0

    def add(self, close: Callable[[], None]) -> None:
        """Call it before such an end."""
        self._process = os.getpid()
        if close not in self._closes:
            self._closes.append(close)
        self._exchange(signal.SIG_DFL, self._end)

    def remove(self, close: Callable[[], None]) -> None:
        """Call it no more."""
        if close in self._closes:
            self._closes.remove(close)
        if not self._closes:
            self._exchange(self._end, signal.SIG_DFL)

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Such a signal waits until this is done."""
        is_main = _is_main()
        self._busy += is_main
        try:
            yield
        finally:
            self._busy -= is_main
            if self._came and is_main and not self._busy:
                number, self._came = self._came, 0
                self._end(number, None)

    def _exchange(self, old: Any, new: Any) -> None:
        if not _is_main():
            return
        for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
            if signal.getsignal(number) == old:
                signal.signal(number, new)

    def _end(self, number: int, _: FrameType | None) -> None:
        """Close, then end as the signal would have."""
        if signal.getsignal(number) != self._end:  # somebody else's calls this one
            return
        if os.getpid() == self._process:
            if self._busy:
                self._came = number
                return
            for close in tuple(self._closes):
                with contextlib.suppress(Exception):
                    close()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _is_main() -> bool:
    """Whether this thread is the one that has the signals."""
    return threading.current_thread() is threading.main_thread()


#: Of this process.
ENDINGS = Endings()
