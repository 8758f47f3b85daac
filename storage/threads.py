"""Loading and decoding in threads: decompressing, hashing and numpy on large arrays let others run meanwhile.

Threads live as long as one call: those of a pool that stayed would be missing in a forked process, which would hang.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Each(Protocol):
    """What `map` does, in this thread or in several."""

    def __call__(self, function: Callable[[Item], Result], items: Sequence[Item], /) -> Iterable[Result]:
        """Return the result of each item, in order. They may be computed now or when they are asked for."""
        ...


def usable_cores() -> int:
    """Return how many cores this process may use, as far as the system tells."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on
        return int(os.process_cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """Return how many threads a reader uses by default: one for each usable core, at most 4."""
    return min(4, usable_cores())


@contextmanager
def in_threads(threads: int) -> Iterator[Each]:
    """Yield a `map` that runs in this many threads, this one among them; for 1 the builtin.

    Thread t of n takes items t, t + n, ...: handing them out one by one would cost as much as some of them.
    """
    if threads == 1:
        yield map
        return
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="topk_distill-read") as pool:

        def each(function: Callable[[Item], Result], items: Sequence[Item], /) -> Iterable[Result]:
            def share(first: int) -> list[Result]:
                return [function(item) for item in items[first::threads]]

            others = [pool.submit(share, first) for first in range(1, threads)]
            shares = [share(0), *(other.result() for other in others)]
            return [shares[index % threads][index // threads] for index in range(len(items))]

        yield each
