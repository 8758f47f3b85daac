"""Phase 1: a teacher reads a corpus once, and a store of its sparse next-token distributions is left on disk.

Data path: config -> plan -> [shard] -> documents -> sequences -> hidden states -> logits -> target rows -> commit.

`extract` is a generator of small events, so that whoever runs it decides what to show. It must be exhausted.

Axis legend: B sequences of a batch, T tokens of its longest one, D hidden width, N positions of a chunk, V real tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

from pipeline.config.extract import ExtractConfig
from pipeline.extraction.events import Event, ExtractSummary, Meter, Progress, ShardDone, Started
from pipeline.extraction.planning import Extraction, build_plan
from pipeline.extraction.rates import write_rate
from pipeline.extraction.work import compute_shard, expected_rows, first_row, load_teacher
from pipeline.launchers import place_among_processes
from stages.input_files import unchanged
from stages.teacher.backend import Teacher
from storage.commit.claims import Claims
from storage.commit.records import PLAN
from storage.files import open_files
from storage.plan import ShardSpec
from storage.tools.verify import require_whole
from storage.writer import StoreWriter


def extract(config: ExtractConfig, *, limit: int | None = None) -> Iterator[Event]:
    """Extract every shard that is not committed yet, seal the store, and tell about it; the last event is the summary.

    Args:
        limit: stop once this run has committed so many shards; the same call again goes on.

    Raises:
        UsageError: bad configuration, corpus or teacher.
        IdentityError: the store was begun with another plan, or the corpus or teacher changes during the run.
        NumericsError: the teacher gives NaN or infinity; names document and position.
        OutOfSpaceError, StorageUnavailableError: memory or disk gives out; what is committed stays valid.
    """
    files = open_files(config.store)
    meter = Meter()
    planned = build_plan(config)
    # A new store is not begun for a teacher that does not load: its plan could never be carried out.
    teacher = None if files.exists(PLAN) else load_teacher(planned)
    writer = StoreWriter.create(files, planned.plan, remap=planned.remap, tokenizer_files=planned.tokenizer_files)
    todo = _from_own_place(writer.missing())
    chosen = todo[:limit]
    shards = len(planned.plan.shards())
    rows = expected_rows(planned, todo)
    yield Started(store=str(files), shards=shards, missing=len(todo), rows=rows, notes=planned.notes)
    if chosen:
        teacher = teacher or load_teacher(planned)
        yield from first_row(planned, teacher, chosen, meter)
        meter.begin_work(expected_rows(planned, chosen))
        with closing(Claims(files).turns(todo, writer.is_committed)) as turns:
            for event in _extract_shards(planned, teacher, writer, turns, meter):
                yield event
                if meter.new_shards == limit:
                    break
    digest = writer.seal()
    advice = f"pipeline verify {files} lists them, pipeline repair {files} sets damaged shards aside"
    require_whole(files, advice=advice)
    yield ExtractSummary(
        store=str(files),
        digest=digest,
        committed=len(writer.committed()),
        shards=shards,
        new_shards=meter.new_shards,
        new_rows=meter.new_rows,
        new_tokens=meter.new_tokens,
        tokens_per_second=meter.tokens_per_second if meter.new_shards else None,
        seconds=meter.seconds,
    )


def _extract_shards(
    planned: Extraction, teacher: Teacher, writer: StoreWriter, shards: Iterator[ShardSpec], meter: Meter
) -> Iterator[Progress | ShardDone]:
    """Compute and commit shards one after the other, and keep the rate for `pipeline plan`.

    A shard that another process commits in the meantime is skipped.
    """
    total = len(planned.plan.shards())
    for shard in shards:
        began = time.perf_counter()
        with unchanged(*planned.teacher_files):  # torch may map them: a change in them changes the weights in use
            batch = yield from compute_shard(planned, teacher, shard, meter, done_elsewhere=writer.is_committed)
        if batch is None:
            continue
        record = writer.commit(shard, batch)
        meter.done(batch)
        write_rate(planned.rate_key, meter.tokens_per_second)
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


def _from_own_place(shards: list[ShardSpec]) -> list[ShardSpec]:
    """Rotate the shards, so that processes that a launcher started begin far apart and meet only at the end."""
    number, processes = place_among_processes()
    first = len(shards) * (number % processes) // processes
    return shards[first:] + shards[:first]
