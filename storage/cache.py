"""Bounded memory of what was read last: decoded chunks, checked files, metadata of shards.

Beside it a reader holds the remap, and per shard a line of the seal and half a kilobyte once it was used.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """Keeps the most recently used values, up to a total size. Threads may share it.

    Args:
        limit: greatest sum of the sizes of what is kept; 0 keeps nothing.
        size: returns the size of a value.
    """

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        self._limit = limit
        self._size_of = size
        self._size = 0
        self._using = threading.Lock()
        self._kept: OrderedDict[Hashable, Value] = OrderedDict()

    @property
    def size(self) -> int:
        """Sum of the sizes of what is kept now."""
        return self._size

    def get(self, key: Hashable) -> Value | None:
        """Return a value, or None if it is not kept. It must not be changed."""
        with self._using:
            value = self._kept.get(key)
            if value is not None:
                self._kept.move_to_end(key)
            return value

    def put(self, key: Hashable, value: Value) -> None:
        """Keep a value under a new key, and drop the least recently used ones beyond the limit."""
        size = self._size_of(value)
        with self._using:
            if key in self._kept or size > self._limit:
                return
            self._kept[key] = value
            self._size += size
            while self._size > self._limit:
                _, dropped = self._kept.popitem(last=False)
                self._size -= self._size_of(dropped)
