"""A folder belongs to one process at a time."""

import contextlib
import errno
import os
import platform
import re
import weakref
from io import FileIO
from pathlib import Path
from typing import Self

from filelock import lock_descriptor

from ..errors import InputError

#: Lies in a folder while a process has it, and says which.
LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system that has none
_HOLDER = re.compile(rb"process \d+ on [\w.-]+")

_files: weakref.WeakSet[FileIO] = weakref.WeakSet()


def _forget() -> None:
    for file in _files:
        file.close()


if hasattr(os, "register_at_fork"):
    # A data loader's worker outlives a killed run by seconds, and must not hold its folder so long.
    os.register_at_fork(after_in_child=_forget)


class Busy(InputError):
    """Another process is writing to the folder."""


class Lock:
    """A folder that belongs to this process until the lock is closed or the process ends.

    Args:
        folder: made if missing.
        who: what else may be writing there.
        advice: what to do where it cannot be written to.

    Raises:
        Busy: another process has it; the message says which, where it is known.
        InputError: it cannot be written to.
    """

    def __init__(
        self, folder: Path, who: str = "process", advice: str = "choose another --output"
    ) -> None:
        self._path = folder / LOCK
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _taken(self._path)
        except OSError as error:
            raise unwritable(folder, error, advice) from error
        if file is None:
            holder = _holder(self._path)
            raise Busy(f"another {who} is writing to {folder}; let it end first{holder}")
        self._file = file

    def close(self) -> None:
        """Let go of the folder."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._file.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go."""
        self.close()


def unwritable(folder: Path, error: OSError, advice: str = "choose another --output") -> InputError:
    """The error for a folder that cannot be written to."""
    return InputError(f"output folder {folder} cannot be written to ({error.strerror}); {advice}")


def _taken(path: Path) -> FileIO | None:
    """The file under a lock of its own; None where another process has one."""
    while True:
        file = FileIO(path, "a+", opener=_open)
        try:
            if not lock_descriptor(file.fileno(), blocking=False):
                file.close()
                return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
        links = os.fstat(file.fileno()).st_nlink
        if links:
            if links == 1:
                _sign(file)
            _files.add(file)
            return file
        file.close()  # the process that had it has just taken it away


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _sign(file: FileIO) -> None:
    """Name this process in it, past the first byte, which Windows shows to none but the holder."""
    with contextlib.suppress(OSError):  # a full disk, say
        file.truncate(0)
        file.write(f"\nprocess {os.getpid()} on {platform.node()}".encode())


def _holder(path: Path) -> str:
    """The process that signed it, in brackets; empty where none has."""
    with contextlib.suppress(OSError), FileIO(path, opener=_open) as file:
        file.seek(1)
        if found := _HOLDER.fullmatch(file.read(256)):
            return f" ({found.group().decode()})"
    return ""
