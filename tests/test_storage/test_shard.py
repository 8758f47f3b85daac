"""A batch becomes a shard and comes back."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import storage_cases as cases

from storage.codecs import CODECS, logprob_codec
from storage.codecs.sqrt_delta import SqrtDelta
from storage.format.decode import scale_heads
from storage.format.encode import encode_shard
from storage.format.remap import invert
from storage.format.validate import check_batch
from storage.plan import TargetSpec
from storage.reader import StoreReader
from storage.writer import StoreWriter

HALF = 2.0**-11  # relative rounding of float16
NUMBERS = ("tail_logit", "logsumexp", "entropy", "next_logprob", "tail_logit_T", "entropy_T")


def read_all(path, **options):
    reader = StoreReader(path, **options)
    return reader.read(range(len(reader)))


def whole_split(plan, split, **options):
    """What was written, as one batch per shard."""
    return [cases.make_batch(plan, shard, **options) for shard in plan.shards() if shard.split == split]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", cases.TARGETS)
@pytest.mark.parametrize("options", [{}, {"ragged": True}, {"end_bytes": False}], ids=["even", "ragged", "no_text"])
def test_round_trip(tmp_path, codec, kind, options):
    plan = cases.make_plan(target=cases.TARGETS[kind], codecs={"logprob": CODECS[codec]().parameters()})
    cases.write_store(tmp_path / "store", plan, **options)
    for split in ("train", "heldout"):
        back = read_all(tmp_path / "store", split=split)
        parts = [cases.in_order(batch) for batch in whole_split(plan, split, **options)]
        for item in fields(back):
            if item.name in ("draws", "logprob", "temperatures") or item.name.endswith(("_offset", "_columns")):
                continue
            if not plan.target.temperatures and item.name in ("tail_logit_T", "entropy_T"):
                assert getattr(back, item.name) is None
                continue
            if item.name == "token_end_byte" and not options.get("end_bytes", True):
                assert back.token_end_byte is None
                continue
            stored, given = getattr(back, item.name), np.concatenate([getattr(part, item.name) for part in parts])
            assert stored.dtype == given.dtype
            if item.name in NUMBERS:
                exact = codec == "exact"
                rounding = {"rtol": 0, "atol": 0} if exact else {"rtol": HALF, "atol": SqrtDelta().row_step / 2}
                np.testing.assert_allclose(stored, given.astype(np.float32), **rounding)
            else:
                np.testing.assert_array_equal(stored, given, err_msg=item.name)
        _check_logprob(plan, back, np.concatenate([part.logprob for part in parts]))


def _check_logprob(plan, back, given):
    codec = logprob_codec(plan.codecs["logprob"])
    if codec.id == "exact":
        np.testing.assert_array_equal(back.logprob, given)
        return
    shift = scale_heads(given, back.head_size, back.tail_logit) - given  # float16 tail mass against the exact one
    assert np.abs(shift).max(initial=0.0) < 0.01
    row = np.repeat(np.arange(back.rows), back.head_size)
    mass = np.bincount(row, weights=np.exp(back.logprob.astype(np.float64)), minlength=back.rows)
    expected = np.exp(-np.logaddexp(0.0, back.tail_logit.astype(np.float64)))
    np.testing.assert_allclose(mass, expected, rtol=2e-6)


def test_a_single_sequence_equals_its_slice_of_the_whole(sealed):
    whole, reader = read_all(sealed), StoreReader(sealed)
    for number in (0, 3, len(reader) - 1):
        one = reader.read([number])
        rows = slice(whole.row_offset[number], whole.row_offset[number + 1])
        head = slice(whole.head_offset[number], whole.head_offset[number + 1])
        np.testing.assert_array_equal(one.entropy, whole.entropy[rows])
        np.testing.assert_array_equal(one.logprob, whole.logprob[head])
        np.testing.assert_array_equal(one.head_ids, whole.head_ids[head])


def test_the_same_batch_gives_the_same_bytes():
    plan = cases.make_plan()
    shard = plan.shards()[0]
    rank = invert(cases.make_remap())
    first = encode_shard(plan, shard, cases.make_batch(plan, shard), rank)
    assert first == encode_shard(plan, shard, cases.make_batch(plan, shard), rank)


def test_the_order_of_samples_does_not_change_the_bytes():
    plan = cases.make_plan()
    shard = plan.shards()[0]
    rank = invert(cases.make_remap())
    batch = cases.make_batch(plan, shard)
    assert encode_shard(plan, shard, batch, rank) == encode_shard(plan, shard, cases.in_order(batch), rank)


def test_empty_shards(tmp_path):
    """All documents filtered out: legal, sealed, and nothing to read."""
    plan = cases.make_plan()
    writer = cases.open_writer(tmp_path / "store", plan)
    for shard in writer.missing():
        record = writer.commit(shard, cases.batch_of(plan, [], np.random.default_rng(0)))
        assert record.counts.rows == 0
    assert writer.seal() is not None
    reader = StoreReader(tmp_path / "store")
    assert len(reader) == reader.rows == reader.tokens == 0
    assert len(reader.read([])) == 0


def test_some_empty_shards(tmp_path):
    plan = cases.make_plan()
    writer = cases.open_writer(tmp_path / "store", plan)
    for shard in writer.missing():
        empty = shard.index in (0, 2)
        batch = cases.batch_of(plan, [], np.random.default_rng(0)) if empty else cases.make_batch(plan, shard)
        writer.commit(shard, batch)
    writer.seal()
    back = read_all(tmp_path / "store")
    expected = [cases.make_batch(plan, shard) for shard in plan.shards()[1:4:2]]
    np.testing.assert_array_equal(back.tokens, np.concatenate([batch.tokens for batch in expected]))


def test_extreme_rows(tmp_path):
    """k = V: no tail. A certain teacher: p = 1. Log-probabilities far below any codec's range."""
    plan = cases.make_plan(vocab_size=8, target=TargetSpec(kind="hybrid", k=8, draws=4))
    shard = plan.shards()[0]
    batch = cases.make_batch(plan, shard)
    assert np.all(np.isneginf(batch.tail_logit) | (batch.tail_logit < -20))
    logprob = batch.logprob.copy().reshape(-1, 8)
    logprob[:] = [0.0, -50.0, -200.0, -1e3, -9e3, -9.1e3, -1e4, -1e5]
    zeros = np.zeros_like(batch.tail_size)
    batch = replace(
        batch, logprob=logprob.reshape(-1), tail_logit=np.full(batch.rows, -np.inf, np.float32), tail_size=zeros,
        tail_ids=batch.tail_ids[:0], count=batch.count[:0], tail_offset=np.zeros_like(batch.tail_offset),
    )  # fmt: skip
    check_batch(plan, shard, batch)
    writer: StoreWriter = cases.open_writer(tmp_path / "store", plan)
    writer.commit(shard, batch)
    back = read_all(tmp_path / "store", allow_partial=True)
    assert np.all(np.isneginf(back.tail_logit))
    row = back.logprob[:8]
    assert np.all(np.diff(row) <= 0)
    np.testing.assert_allclose(row[:4], [0.0, -50.0, -200.0, -1e3], atol=0.07)
    assert np.all(row[4:] < -8000)
