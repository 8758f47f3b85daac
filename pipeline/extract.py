"""Phase 1: a teacher reads a corpus once, and a store of its sparse next-token distributions is left on disk.

Data path: config -> plan -> [shard] -> documents -> sequences -> hidden states -> logits -> target rows -> commit.

`extract` is a generator of small events, so that whoever runs it decides what to show. It must be exhausted.

Axis legend: B sequences of a batch, T tokens of its longest one, D hidden width, N positions of a chunk, V real tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Items
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from pipeline.config.extract import ExtractConfig
from pipeline.launchers import place_among_processes
from pipeline.planning import PlannedExtraction, build_plan, bytes_per_row, rate_key
from pipeline.rates import write_rate
from pipeline.reading import BACKEND
from stages.corpus.files import unchanged
from stages.corpus.tokenize import Sequence, render
from stages.targets import KINDS, TargetRows, assemble
from stages.targets.positions import document_order, wanted_mask, wanted_positions
from stages.teacher import BACKENDS, Teacher
from stages.teacher.batching import pad
from storage.commit.claims import Claims
from storage.commit.records import PLAN
from storage.errors import OutOfSpaceError
from storage.faults import fault_point
from storage.plan import ShardSpec, Split, TargetSpec
from storage.rows import SequenceBatch
from storage.tools.verify import require_whole
from storage.writer import StoreWriter

CONTEXT_TOKENS = 48  # of the first event: what the teacher read before it names its candidates
CANDIDATES = 5


@dataclass(frozen=True, kw_only=True)
class Started:
    """The plan is written. `missing` of `shards` shards are left, about `rows` rows."""

    store: Path
    shards: int
    missing: int
    rows: int


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
        rows, rows_total: target rows done and to do in this run; the total is estimated from the survey's sample.
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

    store: Path
    digest: str | None
    committed: int
    shards: int
    new_shards: int
    new_rows: int
    new_tokens: int
    tokens_per_second: float | None
    seconds: float


Event = Started | FirstRow | Progress | ShardDone | ExtractSummary


def extract(config: ExtractConfig, *, limit: int | None = None) -> Iterator[Event]:
    """Extract every shard that is not committed yet, seal the store, and tell about it; the last event is the summary.

    Args:
        limit: stop once this run has committed so many shards; the same call again goes on.

    Raises:
        UsageError: bad configuration, corpus or teacher.
        IdentityError: the store there was made with another plan, or corpus or teacher change under the run.
        NumericsError: the teacher gives NaN or infinity; names document and position.
        OutOfSpaceError, StorageUnavailableError: memory or disk; what is committed stays valid.
    """
    meter = _Meter()
    planned = build_plan(config)
    # A new store is not begun for a teacher that does not load: its plan could never be carried out.
    teacher = None if (config.store / PLAN).exists() else load_teacher(planned)
    writer = StoreWriter.create(
        config.store, planned.plan, remap=planned.remap, tokenizer_files=planned.tokenizer_files
    )
    todo = from_own_place(writer.missing())
    chosen = todo[:limit]
    shards = len(planned.plan.shards())
    yield Started(store=config.store, shards=shards, missing=len(todo), rows=expected_rows(planned, todo))
    if chosen:
        teacher = teacher or load_teacher(planned)
        yield from first_row(planned, teacher, chosen, meter)
        meter.begin_work(expected_rows(planned, chosen))
        with closing(Claims(config.store).turns(todo, writer.is_committed)) as turns:
            for event in extract_shards(planned, teacher, writer, turns, meter):
                yield event
                if meter.new_shards == limit:
                    break
    digest = writer.seal()
    store = config.store
    advice = f"pipeline verify {store} lists them, pipeline repair {store} sets damaged shards aside"
    require_whole(store, advice=advice)
    yield ExtractSummary(
        store=config.store,
        digest=digest,
        committed=len(writer.committed()),
        shards=shards,
        new_shards=meter.new_shards,
        new_rows=meter.new_rows,
        new_tokens=meter.new_tokens,
        tokens_per_second=meter.tokens_per_second if meter.new_shards else None,
        seconds=meter.seconds,
    )


def extract_shards(
    planned: PlannedExtraction, teacher: Teacher, writer: StoreWriter, shards: Iterator[ShardSpec], meter: _Meter
) -> Iterator[Progress | ShardDone]:
    """Compute and commit shards one after the other, and keep the rate for `pipeline plan`.

    A shard that another process commits meanwhile is given up.
    """
    total = len(planned.plan.shards())
    for shard in shards:
        began = time.perf_counter()
        with unchanged(*planned.teacher_files):  # torch may map them: what changes in them changes the weights in use
            batch = yield from extract_shard(planned, teacher, shard, meter, done_elsewhere=writer.is_committed)
        if batch is None:
            continue
        record = writer.commit(shard, batch)
        meter.done(batch)
        write_rate(rate_key(planned.survey), meter.tokens_per_second)
        yield ShardDone(
            shard=shard.index,
            split=shard.split,
            committed=writer.count_committed(),
            shards=total,
            sequences=len(batch),
            tokens=len(batch.tokens),
            rows=batch.rows,
            bytes=record.size,
            head_mass=record.counts.head_mass if planned.plan.target.k else None,
            seconds=time.perf_counter() - began,
        )


def from_own_place(shards: list[ShardSpec]) -> list[ShardSpec]:
    """Begin at an evenly spaced place for each process that a launcher started, so that they meet only at the end."""
    number, processes = place_among_processes()
    first = len(shards) * (number % processes) // processes
    return shards[first:] + shards[:first]


def load_teacher(planned: PlannedExtraction) -> Teacher:
    """Load the weights that the plan names. Raises as the backend, and IdentityError if they changed meanwhile."""
    found = planned.survey
    with unchanged(*planned.teacher_files):  # what is loaded is what was hashed
        return BACKENDS[BACKEND](
            found.reading.model,
            vocab_size=found.reading.vocab_size,
            device=found.device,
            dtype=found.dtype,
            attention=str(planned.plan.teacher["attention"]),
        )


def extract_shard(
    planned: PlannedExtraction,
    teacher: Teacher,
    shard: ShardSpec,
    meter: _Meter,
    *,
    done_elsewhere: Callable[[ShardSpec], bool],
) -> Generator[Progress, None, SequenceBatch | None]:
    """Compute everything that a shard holds; yields after each batch, returns the whole.

    Returns None, and stops, once another process has done the shard.
    """
    found, plan = planned.survey, planned.plan
    documents = found.reading.corpus.documents(plan.documents_of(shard))
    sequences = list(render(documents, found.reading.tokenizer, found.reading.rendering))
    computed: list[int] = []
    blocks = [TargetRows.empty(plan.target)]
    for batch in planned.batching.batches(sequences):
        if done_elsewhere(shard):
            return None
        fault_point("teacher-batch")
        chosen = [sequences[index] for index in batch]
        blocks += target_rows(planned, teacher, chosen)
        computed += batch
        meter.count(chosen)
        yield meter.progress(shard)
    rows = TargetRows.concatenate(blocks)
    return assemble(sequences, rows.take(document_order(sequences, computed)), plan.target)


@torch.inference_mode()
def target_rows(planned: PlannedExtraction, teacher: Teacher, sequences: Items[Sequence]) -> list[TargetRows]:
    """Return the rows of one batch of sequences, in their order, chunk by chunk."""
    target, step = planned.plan.target, planned.batching.chunk_size
    at = wanted_positions(sequences)
    with _memory_advice():
        hidden_BTD = teacher.hidden(pad(sequences, teacher.device))
        hidden_ND = hidden_BTD[wanted_mask(sequences).to(hidden_BTD.device)]
        return [
            KINDS[target.kind](teacher.logits(hidden_ND[first : first + step]), at[first : first + step], target)
            for first in range(0, len(at), step)
        ]


@torch.inference_mode()
def first_row(
    planned: PlannedExtraction, teacher: Teacher, shards: Items[ShardSpec], meter: _Meter
) -> Iterator[FirstRow]:
    """Show what the teacher makes of the first words to come: one short forward, nothing of it is stored."""
    found = planned.survey
    numbers = (number for shard in shards for number in planned.plan.documents_of(shard))
    # One document at a time, so that long ones do not delay it.
    sequences = (
        render(found.reading.corpus.documents([number]), found.reading.tokenizer, found.reading.rendering)
        for number in numbers
    )
    sequence = next(chain.from_iterable(sequences), None)
    if sequence is None:
        return
    length = min(CONTEXT_TOKENS, len(sequence) - 1)
    ids_1T = torch.from_numpy(sequence.tokens[:length].astype(np.int64))[None].to(teacher.device)
    prob_V = torch.softmax(teacher.logits(teacher.hidden(ids_1T)[0, -1:])[0], dim=-1)
    top = prob_V.topk(min(CANDIDATES, len(prob_V)))
    decode = found.reading.tokenizer.decode
    yield FirstRow(
        context=str(decode(sequence.tokens[:length].tolist(), skip_special_tokens=True)),
        following=str(decode([int(sequence.tokens[length])])),
        candidates=tuple(
            (str(decode([token])), prob) for token, prob in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ),
        head_mass=_head_mass(prob_V, planned.plan.target),
        bytes_per_row=bytes_per_row(planned.plan.target),
        at_most=planned.plan.target.kind == "topp",
        seconds=meter.seconds,
    )


def _head_mass(prob_V: torch.Tensor, target: TargetSpec) -> float | None:
    """Mass of the head of one distribution: of k entries, or of as many of them as reach p."""
    if target.k == 0:
        return None
    mass_K = prob_V.topk(target.k).values.double().cumsum(0)
    reaches_p = int((mass_K < target.p).sum()) if target.p is not None else target.k
    return float(mass_K[min(reaches_p, target.k - 1)])


def expected_rows(planned: PlannedExtraction, shards: Items[ShardSpec]) -> int:
    """Estimate the rows of some shards from the survey's sample."""
    sample = planned.survey.sample
    documents = sum(len(planned.plan.documents_of(shard)) for shard in shards)
    return round(documents * sample.rows / sample.documents)


class _Meter:
    """Counts and clock of one run."""

    def __init__(self) -> None:
        self.began = self.work_began = time.perf_counter()
        self.rows = self.tokens = self.rows_total = 0  # also of shards that were given up
        self.new_shards = self.new_rows = self.new_tokens = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / (time.perf_counter() - self.work_began)

    def begin_work(self, rows_total: int) -> None:
        self.rows_total = rows_total
        self.work_began = time.perf_counter()

    def count(self, sequences: Items[Sequence]) -> None:
        self.rows += sum(int(sequence.has_row.sum()) for sequence in sequences)
        self.tokens += sum(len(sequence) for sequence in sequences)
        self.rows_total = max(self.rows_total, self.rows)

    def done(self, batch: SequenceBatch) -> None:
        self.new_shards += 1
        self.new_rows += batch.rows
        self.new_tokens += len(batch.tokens)

    def progress(self, shard: ShardSpec) -> Progress:
        elapsed = time.perf_counter() - self.work_began
        return Progress(
            shard=shard.index,
            rows=self.rows,
            rows_total=self.rows_total,
            tokens_per_second=self.tokens_per_second,
            seconds_left=elapsed * (self.rows_total - self.rows) / max(self.rows, 1),
        )


@contextmanager
def _memory_advice() -> Iterator[None]:
    """Turn torch's out-of-memory errors into ours; on a CPU torch raises a plain RuntimeError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
            raise OutOfSpaceError(
                "out of memory in the teacher's forward pass",
                where="batch_size and chunk_size of the configuration",
                fix="set batch_size: 1 or a smaller chunk_size (both are part of the plan: use a new store directory)",
            ) from error
        raise
