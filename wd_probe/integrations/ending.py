"""How a script of somebody's own ends, and what is done then."""

import contextlib
import sys
from collections.abc import Callable


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
