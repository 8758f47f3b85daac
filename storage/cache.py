"""A bounded cache of decoded chunks: the reader's only memory of what it has decoded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from numpy.typing import NDArray

Key = tuple[int, str, int]  # shard, array, chunk


class ChunkCache:
    """Keeps the most recently used chunks, up to a number of bytes. Safe to use from several threads.

    Args:
        limit: bytes of decoded values kept; 0 keeps none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._chunks: OrderedDict[Key, NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes kept now."""
        return self._size

    def get(self, key: Key) -> NDArray[Any] | None:
        """Return a chunk, or None if it is not kept."""
        with self._lock:
            values = self._chunks.get(key)
            if values is not None:
                self._chunks.move_to_end(key)
            return values

    def put(self, key: Key, values: NDArray[Any]) -> None:
        """Keep a chunk, and drop the least recently used ones beyond the limit. It must not be written to."""
        with self._lock:
            if key in self._chunks or values.nbytes > self._limit:
                return
            self._chunks[key] = values
            self._size += values.nbytes
            while self._size > self._limit:
                _, dropped = self._chunks.popitem(last=False)
                self._size -= dropped.nbytes
