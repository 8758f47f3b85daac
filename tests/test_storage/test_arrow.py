"""Rows as Arrow tables and Parquet files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import storage_cases as cases

from storage.errors import UsageError
from storage.exchange.arrow import record_batches, schema, shard_rows, to_parquet, to_record_batch, to_table
from storage.exchange.jsonl import KEYS, sequence_lines
from storage.reader import StoreReader

SAMPLES = ("sample_ids", "sample_counts")


def test_one_line_per_row(sealed):
    reader = StoreReader(sealed)
    table = to_table(reader)
    assert table.schema == schema()
    assert table.num_rows == reader.rows
    table.validate(full=True)


def test_values(sealed):
    reader = StoreReader(sealed)
    batch = reader.read(range(len(reader)))
    lines = to_table(reader).to_pylist()
    row = 0
    for sequence in range(len(batch)):
        start, end = batch.token_offset[sequence : sequence + 2]
        for position in np.flatnonzero(batch.has_row[start:end]):
            line = lines[row]
            head = slice(int(batch.head_size[:row].sum()), int(batch.head_size[: row + 1].sum()))
            tail = slice(int(batch.tail_size[:row].sum()), int(batch.tail_size[: row + 1].sum()))
            assert line["document"] == batch.document[sequence]
            assert (line["sequence"], line["position"]) == (sequence, position)
            assert line["token"] == batch.tokens[start + position]
            assert line["next_token"] == batch.tokens[start + position + 1]
            assert line["ids"] == [*batch.head_ids[head], *batch.tail_ids[tail]]
            assert line["logprob"] == batch.logprob[head].tolist()
            assert line["counts"] == batch.count[tail].tolist()
            assert line["head_size"] == batch.head_size[row]
            assert line["tail_mass"] == pytest.approx(1 - np.exp(batch.logprob[head].astype(float)).sum(), abs=1e-5)
            row += 1
    assert row == reader.rows


@pytest.mark.parametrize("kind", cases.TARGETS)
def test_json_lines_hold_what_the_table_holds(kind):
    """Under the same keys, or under those of others: nothing that a row or sequence has is left out."""
    plan = cases.make_plan(target=cases.TARGETS[kind])
    batch = cases.make_batch(plan, plan.shards()[0])
    score = np.arange(batch.rows, dtype=np.float32) / 1e6
    score[-1], batch.next_logprob[1] = np.nan, -np.inf
    weight = np.arange(len(batch), dtype=np.uint64) + 2**60
    batch = replace(batch, row_columns={"score": score}, sequence_columns={"weight": weight})
    table = to_record_batch(batch).to_pylist()
    lines = [json.loads(line) for line in sequence_lines(batch, numbers=range(len(batch)), padding=0)]
    assert all(line.keys() <= KEYS.union(schema().names, ("score", "weight")) for line in lines)
    assert [line["weight"] for line in lines] == weight.tolist()
    for row in table:
        line = lines[row["sequence"]]
        (samples, counts) = (line[name][row["position"]] if plan.target.draws else [] for name in SAMPLES)
        assert (line["topk_token_ids"][row["position"]] + samples, counts) == (row["ids"], row["counts"])
        assert line["loss_mask"][row["position"]] == 1
        for name in ("tail_mass", "entropy", *(("tail_mass_T", "entropy_T") if plan.target.temperatures else ())):
            assert line[name][row["position"]] == pytest.approx(row[name], abs=1e-4)
        assert line.get("temperatures", []) == pytest.approx(row["temperatures"])
        for name, digits in (("next_logprob", 1e-4), ("score", 0.0)):
            found = line[name][row["position"]]
            assert found is None if not np.isfinite(row[name]) else abs(found - row[name]) <= digits
    for line in lines:
        for position in np.flatnonzero(np.array(line["loss_mask"]) == 0):
            assert (line["entropy"][position], line["score"][position]) == (0, 0)
            assert set(line.get("entropy_T", {position: []})[position]) <= {0}
            assert len(line.get("entropy_T", {position: []})[position]) == len(plan.target.temperatures)


def test_a_stream_equals_the_table_and_has_the_c_interface(sealed):
    reader = StoreReader(sealed)
    stream = record_batches(reader, sequences_per_batch=3)
    assert hasattr(stream, "__arrow_c_stream__")
    assert pa.RecordBatchReader.from_stream(stream).read_all().equals(to_table(reader).combine_chunks())


def test_parquet(sealed, tmp_path):
    reader = StoreReader(sealed, split="heldout")
    assert to_parquet(reader, tmp_path / "rows.parquet") == reader.rows
    assert pq.read_table(tmp_path / "rows.parquet").equals(to_table(reader))
    with pytest.raises(UsageError, match="exists already"):
        to_parquet(reader, tmp_path / "rows.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.parquet"]


def test_a_batch_can_be_given_too():
    plan = cases.make_plan()
    batch = cases.make_batch(plan, plan.shards()[0])
    table = to_table(batch, first_sequence=7)
    assert table.column("sequence")[0].as_py() >= 7
    assert table.num_rows == batch.rows


def test_chosen_sequences_come_in_the_order_asked(sealed):
    reader = StoreReader(sealed)
    table = record_batches(reader, sequences=[5, 2, 9], sequences_per_batch=2).read_all()
    whole = to_table(reader)
    parts = [whole.filter(pc.field("sequence") == number) for number in (5, 2, 9)]
    assert table.to_pylist() == pa.concat_tables(parts).to_pylist()


def test_a_sequence_of_a_decoded_shard_is_a_slice_without_a_copy(sealed):
    reader = StoreReader(sealed)
    whole = to_table(reader)
    first = 0
    for position, item in enumerate(reader.shards):
        rows = shard_rows(reader, position)
        assert len(rows) == item.sequences
        addresses = [buffer.address for buffer in rows.rows.column("logprob").buffers() if buffer is not None]
        for number in range(len(rows)):
            part = rows[number]
            assert part.schema == schema()
            assert part.to_pylist() == whole.filter(pc.field("sequence") == first + number).to_pylist()
            assert [item.address for item in part.column("logprob").buffers() if item is not None] == addresses
        first += len(rows)
    assert first == len(reader)
    for number in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[number]


def test_no_rows(tmp_path):
    plan = cases.make_plan()
    empty = cases.batch_of(plan, [], np.random.default_rng(0))
    assert to_table(empty).num_rows == 0
    cases.open_writer(tmp_path / "store", plan)
    assert to_table(StoreReader(tmp_path / "store", allow_partial=True)).num_rows == 0
