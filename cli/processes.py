"""One command in several processes, as `torchrun` starts them."""

import os
import sys

#: What they do together.
SHARED = ("rop", "train", "watch", "zeroshot")
#: The exit code of a command that was ended by Ctrl-C, as shells have it.
INTERRUPTED = 130


def _started(name: str, alone: int) -> int:
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


def process() -> int:
    """Which of them this is; 0 without `torchrun`. The first one speaks for all."""
    return _started("RANK", 0)


def check_shared() -> None:
    """Refuse a command that each process would do once more.

    Raises:
        InputError: it is none of ``SHARED``.
    """
    from wd_probe.errors import InputError

    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if _started("WORLD_SIZE", 1) > 1 and command not in SHARED:
        raise InputError(
            f"torchrun is for {', '.join(SHARED)}; start `wdprobe {command}` without it"
            + (", with --ray for many machines" if command == "sweep" else "")
        )
