"""What happens in phase 1, as events: whoever runs the phase decides what to show. And the meter that they read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.plan import ShardSpec, Split
from storage.rows import SequenceBatch

if TYPE_CHECKING:  # imports the model libraries
    from stages.corpus.tokenize import TokenWindow


@dataclass(frozen=True, kw_only=True)
class Started:
    """The plan is written. `missing` of `shards` shards are left, about `rows` rows; `notes` are about the corpus."""

    store: str
    shards: int
    missing: int
    rows: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FirstRow:
    """The teacher at work, once, before the first shard.

    Attributes:
        context: text that the teacher read.
        following: the token that really follows it.
        candidates: the five most probable next tokens, (text, probability) falling.
        head_mass: probability that the head holds at this position; None for a kind without.
        bytes_per_row: estimate of what a stored row takes.
        at_most: whether that is a bound, see `planning.Estimate`.
        seconds: since the start of the extraction.
    """

    context: str
    following: str
    candidates: tuple[tuple[str, float], ...]
    head_mass: float | None
    bytes_per_row: float
    at_most: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A batch is done.

    Attributes:
        shard: index of the shard in work.
        rows, rows_total: target rows done and to do in this run; the total is estimated from a sample.
        tokens_per_second: since the first batch of this run.
        seconds_left: at that rate.
    """

    shard: int
    rows: int
    rows_total: int
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class ShardDone:
    """A shard is committed, and what it holds.

    `committed` of `shards` are known to be committed now; of other processes' work, that may lag behind. `head_mass` is
    the mean probability of its heads; None for a kind without.
    """

    shard: int
    split: Split
    committed: int
    shards: int
    sequences: int
    tokens: int
    rows: int
    bytes: int
    head_mass: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ExtractSummary:
    """The end of a run.

    Attributes:
        store: its directory.
        digest: hash of the sealed store; None while shards are missing.
        committed, shards: of the whole store.
        new_shards, new_rows, new_tokens: of this run.
        tokens_per_second: of this run, encoding and writing included; None without a new shard.
        seconds: of this run, planning and loading included.
    """

    store: str
    digest: str | None
    committed: int
    shards: int
    new_shards: int
    new_rows: int
    new_tokens: int
    tokens_per_second: float | None
    seconds: float


Event = Started | FirstRow | Progress | ShardDone | ExtractSummary


class Meter:
    """Counts and clock of one run."""

    def __init__(self) -> None:
        self.began = self.work_began = time.perf_counter()
        self.rows = self.tokens = self.rows_total = 0  # also of shards that were given up
        self.new_shards = self.new_rows = self.new_tokens = 0

    @property
    def seconds(self) -> float:
        """Since the start of the run."""
        return time.perf_counter() - self.began

    @property
    def tokens_per_second(self) -> float:
        """Since the work began."""
        return self.tokens / (time.perf_counter() - self.work_began)

    def begin_work(self, rows_total: int) -> None:
        """Start the clock of the work on about so many rows."""
        self.rows_total = rows_total
        self.work_began = time.perf_counter()

    def count(self, sequences: Sequence[TokenWindow]) -> None:
        """Count sequences that the teacher has read."""
        self.rows += sum(int(sequence.has_row.sum()) for sequence in sequences)
        self.tokens += sum(len(sequence) for sequence in sequences)
        self.rows_total = max(self.rows_total, self.rows)

    def done(self, batch: SequenceBatch) -> None:
        """Count a committed shard."""
        self.new_shards += 1
        self.new_rows += batch.rows
        self.new_tokens += len(batch.tokens)

    def progress(self, shard: ShardSpec) -> Progress:
        """Say how far the run is."""
        elapsed = time.perf_counter() - self.work_began
        return Progress(
            shard=shard.index,
            rows=self.rows,
            rows_total=self.rows_total,
            tokens_per_second=self.tokens_per_second,
            seconds_left=elapsed * (self.rows_total - self.rows) / max(self.rows, 1),
        )
