"""A series of any length in bounded memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Thinned(Generic[T]):
    """Keeps a series whole up to a limit; then, of every stretch of neighbours, the largest one.

    Stretches are equally long and double whenever the limit is reached, so between half the limit
    and the limit are kept, evenly over the whole series, and its maximum always. The newest item is
    kept too.

    Args:
        limit: how many items to keep, at least 2.
        size: what the largest is by; NaN counts as the smallest.
    """

    def __init__(self, limit: int, size: Callable[[T], float]) -> None:
        self.limit, self._size = limit, size
        self._stride = 1  # items in a full stretch
        self._in_last = 0  # items in the last one
        self._kept: list[T] = []
        self._newest: T | None = None

    def append(self, item: T) -> None:
        """Add one."""
        self._newest = item
        if self._in_last < self._stride and self._kept:
            self._kept[-1] = self._larger(self._kept[-1], item)
            self._in_last += 1
            return
        self._kept.append(item)
        self._in_last = 1
        if len(self._kept) > self.limit:
            pairs = [self._kept[k : k + 2] for k in range(0, len(self._kept), 2)]
            self._in_last += self._stride if len(pairs[-1]) == 2 else 0
            self._kept = [self._larger(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
            self._stride *= 2

    def _larger(self, old: T, new: T) -> T:
        a, b = self._size(old), self._size(new)
        return new if b > a or (a != a and b == b) else old

    def __iter__(self) -> Iterator[T]:
        """What is kept, oldest first, the newest item last."""
        yield from self._kept
        if self._kept and self._newest is not None and self._kept[-1] is not self._newest:
            yield self._newest


class Growing(Generic[T]):
    """What a sum that grows was at earlier times, evenly over them.

    Args:
        limit: how many values to keep.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._stride = 1
        self.count = 0
        self._kept: list[tuple[int, T]] = []

    def append(self, value: T) -> None:
        """Note what the sum has come to."""
        self.count += 1
        if self.count % self._stride:
            return
        self._kept.append((self.count, value))
        if len(self._kept) > self._limit:
            self._stride *= 2
            self._kept = self._kept[1::2]

    def before(self, share: float) -> T | None:
        """What it was before the last so great a share of the times; None if there was nothing."""
        times = math.floor(self.count * (1 - share))
        return next((value for at, value in reversed(self._kept) if at <= times), None)

    def state(self) -> list[Any]:
        """Plain values, from which :meth:`load` goes on."""
        return [self._stride, self.count, self._kept]

    def load(self, state: Sequence[Any]) -> None:
        """Go on from there."""
        self._stride, self.count, kept = state
        self._kept = [(at, value) for at, value in kept]
