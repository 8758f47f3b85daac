"""Decoding against a slow reference: a row at a time, from the arrays as plain zarr-python reads them, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import storage_cases as cases
from storage_cases import zarr_quietly

import storage.format.arrays
from storage.codecs import CODECS, logprob_codec
from storage.codecs.sqrt_delta import SqrtDelta
from storage.plan import TargetSpec
from storage.reader import StoreReader
from storage.segments import cumsum_rows, diff_rows, sum_ranks

TARGETS = {"hybrid": TargetSpec(kind="hybrid", k=6, draws=4), "topk": TargetSpec(kind="topk", k=6)}


def reference_head(codec, codes, tail_logit):
    """Log-probabilities of one row's head, float32 [k], from its stored numbers."""
    if codec.id == "exact":
        return codes
    table = codec._table()
    logprob = np.array([table[int(codes[: rank + 1].astype(np.int64).sum())] for rank in range(len(codes))])
    mass = 0.0
    for value in np.exp(logprob):
        mass += float(value)
    shift = -np.logaddexp(0.0, float(tail_logit)) - np.log(mass) if len(codes) else 0.0
    return (logprob + np.float32(shift)).astype(np.float32)


def reference(store, plan, remap):
    """Heads and tails of every training row, in order: (ids, logprob, tail ids)."""
    codec, rows = logprob_codec(plan.codecs["logprob"]), []
    training = sum(shard.split == "train" for shard in plan.shards())
    for directory in sorted((store / "shards").iterdir())[:training]:
        with zarr_quietly() as zarr:
            arrays = {name: array[:] for name, array in zarr.open_group(directory, mode="r").arrays()}
        if arrays["logprob"].ndim == 2:
            arrays["logprob"] = arrays["logprob"].T
        head, tail = np.cumsum([0, *arrays["head_size"]]), np.cumsum([0, *arrays.get("tail_size", [])])
        for row, logit in enumerate(arrays["tail_logit"]):
            cut = slice(head[row], head[row + 1])
            codes = arrays["logprob"].reshape(-1)[cut]
            deltas = arrays["tail_ids"][tail[row] : tail[row + 1]] if plan.target.draws else np.zeros(0, np.uint16)
            ranks = np.cumsum(deltas, dtype=np.int64)
            rows.append((remap[arrays["head_ids"].reshape(-1)[cut]], reference_head(codec, codes, logit), remap[ranks]))
    return rows


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("ragged", [[], [0, 1, 2, 3], [1, 3]], ids=["even", "ragged", "mixed"])
def test_equals_a_decoder_that_takes_one_row_at_a_time(tmp_path, monkeypatch, codec, kind, ragged):
    monkeypatch.setattr(storage.format.arrays, "CHUNK_UNITS", 16)
    plan = cases.make_plan(target=TARGETS[kind], codecs={"logprob": CODECS[codec]().parameters()})
    writer = cases.open_writer(tmp_path / "store", plan)
    for shard in writer.missing():
        writer.commit(shard, cases.make_batch(plan, shard, ragged=shard.index in ragged))
    writer.seal()
    reader = StoreReader(tmp_path / "store")
    expected = reference(tmp_path / "store", plan, reader.remap)
    whole = reader.read(range(len(reader)))
    for name, place in (("head_ids", 0), ("logprob", 1), ("tail_ids", 2)):
        found = getattr(whole, name)
        np.testing.assert_array_equal(found, np.concatenate([row[place] for row in expected]), err_msg=name)
    for number in range(len(reader)):
        one = reader.read([number])
        rows = expected[whole.row_offset[number] : whole.row_offset[number + 1]]
        values = [row[1] for row in rows] or [np.zeros(0, np.float32)]
        np.testing.assert_array_equal(one.logprob, np.concatenate(values))


def test_sums_by_rank_undo_differences():
    values = np.sort(np.random.default_rng(0).integers(0, 65_536, (9, 7)).astype(np.uint16), axis=1)
    deltas = diff_rows(values.reshape(-1), np.full(9, 7, np.int32)).reshape(9, 7)
    np.testing.assert_array_equal(sum_ranks(deltas.T), values.T)


@pytest.mark.parametrize("codes", [[65_535, 1], [40_000, 40_000], [1, 65_535, 65_535], [0, 65_535, 0, 1]])
def test_codes_that_sum_beyond_the_largest_are_refused_in_every_form(codes):
    sizes = np.array([len(codes)], np.int32)
    flat = np.array(codes, np.uint16)
    with pytest.raises(ValueError, match="beyond 65535"):
        SqrtDelta().decode(flat, sizes)
    with pytest.raises(ValueError, match="beyond 65535"):
        SqrtDelta().decode_ranks(flat.reshape(-1, 1))


def test_running_sums_do_not_wrap_within_a_row():
    """The sum over all rows passes 2**32 several times; no row's does."""
    rows = [np.full(1000, 65_535, np.uint16)] * 200
    sums = cumsum_rows(np.concatenate(rows), np.full(200, 1000, np.int32)).reshape(200, 1000)
    np.testing.assert_array_equal(sums, np.tile(np.arange(1, 1001, dtype=np.int64) * 65_535, (200, 1)))
    long = np.full(70_000, 65_535, np.uint16)
    assert cumsum_rows(long, np.array([70_000], np.int32))[-1] == 70_000 * 65_535
