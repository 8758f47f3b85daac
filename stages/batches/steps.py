"""Training steps: which sequences each holds, read ahead of their use by one background thread.

Data path: order -> store -> **step of packed micro-batches** -> training loop. A step holds the same sequences whatever
the size of its micro-batches, so that memory can be traded for time in the middle of a run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from stages.batches.microbatch import MicroBatch, to_microbatch
from stages.batches.order import Order
from stages.batches.sequences import join, pack, part
from storage.errors import UsageError
from storage.rows import SequenceBatch

Item = TypeVar("Item")
# Sequences per read: enough that a store decodes whole chunks, few enough that what is read ahead stays small.
_READ_TOKENS = 32_768
# Positions of the order that are counted at a time.
_POSITIONS = 2**20


class SequenceSource(Protocol):
    """Sequences by number: a split of a store (`StoreReader`) or a corpus in memory (`TokenizedCorpus`)."""

    def __len__(self) -> int:
        """Return the number of sequences."""

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""

    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each sequence, int64 [S]."""

    def read(self, indices: NDArray[np.int64], *, targets: bool = True) -> SequenceBatch:
        """Return the sequences of these indices, in that order; without targets their rows are empty."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """How much a step and a micro-batch hold.

    Attributes:
        tokens_per_step: upper bound of the tokens of a step (one longer sequence still makes a step).
        tokens_per_batch: upper bound of the tokens of a micro-batch.
        with_targets: False when the loss needs no teacher (kd_ratio 0): target rows are left unread.
        ignore_index: label of positions without a target row.
        length_borders: lengths, rising, whose two sides never share a micro-batch: a model computes them differently.
    """

    tokens_per_step: int
    tokens_per_batch: int
    with_targets: bool = True
    ignore_index: int = -100
    length_borders: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One optimizer step.

    Attributes:
        batches: its micro-batches.
        tokens: tokens over all of them.
        rows: target rows over all of them: what a summed loss is divided by.
        cursor: position in the order of the first sequence after this step.
    """

    batches: tuple[MicroBatch, ...]
    tokens: int
    rows: int
    cursor: int


def training_steps(
    source: SequenceSource, order: Order, shape: StepShape, *, cursor: int = 0, end: int | None = None
) -> Iterator[Step]:
    """Yield steps from position `cursor` of the order on. A sequence is never cut.

    Args:
        source: of the sequences.
        order: in which they come.
        shape: of a step.
        cursor: position of the first sequence.
        end: position after the last one; the last step is what is left before it. None: there is always another.

    Raises:
        UsageError: a sequence is longer than a micro-batch, or the store holds no target rows at all.
    """
    sequences = _sequences(source, order, cursor, targets=shape.with_targets)
    if end is not None:
        sequences = islice(sequences, max(end - cursor, 0))
    chosen: list[SequenceBatch] = []
    tokens = 0
    for following in sequences:
        if chosen and tokens + len(following.tokens) > shape.tokens_per_step:
            cursor += len(chosen)
            yield _step(join(chosen), shape, cursor)
            chosen, tokens = [], 0
        chosen.append(following)
        tokens += len(following.tokens)
    if chosen:
        yield _step(join(chosen), shape, cursor + len(chosen))


def end_of_epochs(sequences: int, epochs: float) -> int:
    """Return the position of the order after so many passes over so many sequences."""
    return math.ceil(round(epochs * sequences, 6))  # 1.1 passes over 10 sequences are 11, not 11.000000000000002


def steps_of_epochs(
    length_S: NDArray[np.int64], order: Order, tokens_per_step: int, epochs: float, *, cursor: int = 0
) -> int:
    """Return how many steps `training_steps` makes up to the end of `epochs` passes over all sequences.

    Args:
        length_S: tokens of each sequence.
        order: in which they come.
        tokens_per_step: as in StepShape.
        epochs: passes, above 0.
        cursor: position of the order at which the steps begin.
    """
    end, steps, filled = end_of_epochs(len(length_S), epochs), 0, tokens_per_step
    for start in range(cursor, end, _POSITIONS):
        length_P = length_S[order.take(start, min(_POSITIONS, end - start))]
        end_P = filled + np.cumsum(length_P)
        began, at = 0, 0  # token at which the open step began, first position that it may not hold
        while (at := max(at, int(np.searchsorted(end_P, began + tokens_per_step, side="right")))) < len(end_P):
            steps, began, at = steps + 1, int(end_P[at] - length_P[at]), at + 1
        filled = int(end_P[-1]) - began
    return steps


def microbatches(batch: SequenceBatch, shape: StepShape) -> tuple[MicroBatch, ...]:
    """Pack all sequences of `batch`."""
    return tuple(
        to_microbatch(packed, with_targets=shape.with_targets, ignore_index=shape.ignore_index)
        for packed in pack(batch, shape.tokens_per_batch, shape.length_borders)
    )


def prefetch(items: Iterator[Item]) -> Generator[Item]:
    """Yield the same items, each computed in a background thread while the one before it is in use.

    Holds at most one item ahead. An exception in `items` is raised here, in its turn. Close the generator
    (`contextlib.closing`) to end the thread; the item being computed is finished first.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="topk_distill-prefetch") as background:
        coming = background.submit(next, items)
        while True:
            try:
                item = coming.result()
            except StopIteration:
                return
            coming = background.submit(next, items)
            yield item


def _step(batch: SequenceBatch, shape: StepShape, cursor: int) -> Step:
    batches = microbatches(batch, shape)
    return Step(batches=batches, tokens=len(batch.tokens), rows=sum(b.rows for b in batches), cursor=cursor)


def _sequences(source: SequenceSource, order: Order, cursor: int, *, targets: bool) -> Iterator[SequenceBatch]:
    """Yield single sequences in order, read a block at a time."""
    if len(source) == 0:
        raise UsageError("there are no training sequences", fix="take more documents, or hold out fewer")
    block = max(1, min(len(source), _READ_TOKENS * len(source) // max(source.tokens, 1)))
    for start in count(cursor, block):
        read = source.read(order.take(start, block), targets=targets)
        waiting = deque(part(read, index, index + 1) for index in range(len(read)))
        while waiting:
            yield waiting.popleft()


def evenly_spaced(source: SequenceSource, count: int, shape: StepShape) -> tuple[MicroBatch, ...]:
    """Pack so many sequences, spread evenly over a source; fewer if there are fewer, and none without rows."""
    count = min(count, len(source))
    if count == 0:
        return ()
    read = source.read(np.arange(count) * len(source) // count, targets=shape.with_targets)
    return tuple(batch for batch in microbatches(read, shape) if batch.rows)
