"""Reading: order, splits, partial stores, memory, and the same values as plain zarr-python."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import storage_cases as cases
from storage_cases import TARGETS, make_plan, write_store, zarr_quietly

import storage.commit.open_shard
import storage.format.arrays
import storage.reader
from storage.commit.manifest import Manifest
from storage.errors import CorruptionError, UsageError
from storage.plan import HeldoutRule
from storage.reader import StoreReader
from storage.segments import cumsum_rows

ROOT = Path(__file__).parent.parent.parent


def test_totals_and_identity(sealed, fresh):
    plan, store = cases.make_plan(), cases.copy(sealed, fresh)
    train, heldout = StoreReader(store), StoreReader(store, split="heldout")
    assert train.plan == plan
    assert train.digest == heldout.digest
    for reader in (train, heldout):
        batches = [cases.make_batch(plan, shard) for shard in plan.shards() if shard.split == reader.split]
        assert len(reader) == sum(len(batch) for batch in batches)
        assert reader.rows == sum(batch.rows for batch in batches)
        assert reader.tokens == sum(len(batch.tokens) for batch in batches)
    assert train.tokenizer_files() == cases.TOKENIZER_FILES
    np.testing.assert_array_equal(train.remap, cases.make_remap())


def test_splits_do_not_share_a_document(sealed):
    plan = cases.make_plan()
    for split in ("train", "heldout"):
        reader = StoreReader(sealed, split=split)
        documents = reader.read(range(len(reader))).document
        assert all(plan.heldout.holds_out(int(number)) == (split == "heldout") for number in documents)
    with pytest.raises(UsageError, match="split"):
        StoreReader(sealed, split="test")


def test_any_order_and_repeats(sealed):
    reader = StoreReader(sealed)
    whole = reader.read(range(len(reader)))
    wanted = np.random.default_rng(0).integers(0, len(reader), 40)
    wanted[5] = wanted[4]
    batch = reader.read(wanted)
    for place, number in enumerate(wanted):
        for name, offset in (("tokens", "token_offset"), ("entropy", "row_offset"), ("head_ids", "head_offset")):
            mine, theirs = getattr(batch, offset), getattr(whole, offset)
            np.testing.assert_array_equal(
                getattr(batch, name)[mine[place] : mine[place + 1]],
                getattr(whole, name)[theirs[number] : theirs[number + 1]],
            )
    np.testing.assert_array_equal(batch.document, whole.document[wanted])


def test_numbers_out_of_range(sealed):
    reader = StoreReader(sealed)
    last = len(reader) - 1
    assert len(reader.read([0, last])) == 2
    for asked, told in (([0, -1], "-1 to 0"), ([last + 1, 0], f"0 to {last + 1}")):
        with pytest.raises(IndexError, match=f"sequence numbers {told}; the split has {last + 1}"):
            reader.read(asked)


def test_an_unfinished_store_is_refused_with_its_counts(fresh):
    cases.write_store(fresh, shards=[0, 2])
    with pytest.raises(UsageError, match="2 of 5 shards") as caught:
        StoreReader(fresh)
    assert "pipeline extract" in caught.value.fix


def test_a_partial_store_is_a_frozen_set_of_shards(fresh):
    cases.write_store(fresh, shards=[0, 2])
    partial = StoreReader(fresh, allow_partial=True)
    assert [item.shard for item in partial.shards] == [0, 2]
    again = StoreReader(fresh, allow_partial=True)
    assert again.digest == partial.digest
    cases.write_store(fresh, shards=[1])
    more = StoreReader(fresh, allow_partial=True)
    assert more.digest != partial.digest
    assert len(partial.read(range(len(partial)))) == len(partial)
    cases.write_store(fresh)
    assert StoreReader(fresh, allow_partial=True).digest == StoreReader(fresh).digest


def test_there_is_no_store(fresh):
    with pytest.raises(UsageError, match="no store"):
        StoreReader(fresh)


def test_equals_plain_zarr(sealed):
    reader = StoreReader(sealed)
    whole, first = reader.read(range(len(reader))), 0
    for directory in sorted((sealed / "shards").iterdir())[:4]:
        with zarr_quietly() as zarr:
            arrays = {name: array[:] for name, array in zarr.open_group(directory, mode="r").arrays()}
        sequences = len(arrays["document"])
        rows = slice(whole.row_offset[first], whole.row_offset[first + sequences])
        tokens = slice(whole.token_offset[first], whole.token_offset[first + sequences])
        head = slice(whole.head_offset[first], whole.head_offset[first + sequences])
        tail = slice(whole.tail_offset[first], whole.tail_offset[first + sequences])
        np.testing.assert_array_equal(reader.remap[arrays["tokens"]], whole.tokens[tokens])
        np.testing.assert_array_equal(reader.remap[arrays["head_ids"].reshape(-1)], whole.head_ids[head])
        ranks = cumsum_rows(arrays["tail_ids"], arrays["tail_size"])
        np.testing.assert_array_equal(reader.remap[ranks], whole.tail_ids[tail])
        np.testing.assert_array_equal(arrays["entropy"].astype(np.float32), whole.entropy[rows])
        np.testing.assert_array_equal(arrays["token_end_byte"], whole.token_end_byte[tokens])
        bits = np.unpackbits(arrays["has_row"])[: tokens.stop - tokens.start].astype(bool)
        np.testing.assert_array_equal(bits, whole.has_row[tokens])
        first += sequences


@pytest.fixture
def many_chunks(fresh, monkeypatch):
    """A store whose shards have about ten chunks per array."""
    with monkeypatch.context() as patch:  # a reader knows no other than the real one
        patch.setattr(storage.format.arrays, "CHUNK_UNITS", 8)
        cases.write_store(fresh)
    return fresh


def test_chunking_does_not_change_what_is_read(many_chunks, sealed):
    left, right = StoreReader(many_chunks), StoreReader(sealed)
    for numbers in ([3], [9, 2, 2], range(len(left))):
        one, other = left.read(numbers), right.read(numbers)
        for name in ("tokens", "has_row", "head_ids", "logprob", "tail_ids", "count", "entropy", "token_end_byte"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_opening_takes_no_record_apart_whole(sealed, monkeypatch):
    """Its own numbers follow from hash and counts of each; a shard's first use checks the rest."""
    taken, parse = [], Manifest.parse_record
    monkeypatch.setattr(
        Manifest, "parse_record", lambda self, spec, data: taken.append(spec) or parse(self, spec, data)
    )
    reader = StoreReader(sealed)
    filled = [item.shard for item in reader.shards if item.sequences]
    assert not {spec.index for spec in taken} & set(filled)
    reader.lengths()
    reader.lengths()
    assert [spec.index for spec in taken if spec.index in filled] == filled


def test_a_random_sequence_decodes_only_the_chunks_it_needs(many_chunks, monkeypatch):
    reader = StoreReader(many_chunks)
    decoded = []
    real = storage.commit.open_shard.decode_inner
    monkeypatch.setattr(
        storage.commit.open_shard, "decode_inner", lambda data, layout: decoded.append(layout) or real(data, layout)
    )
    rows = np.diff(reader.read(range(len(reader))).row_offset)
    sequence = int(np.flatnonzero((rows > 2) & (rows < 8))[0])
    reader = StoreReader(many_chunks)
    decoded.clear()
    reader.read([sequence])
    of_rows = [layout for layout in decoded if layout.axis in ("row", "head", "tail")]
    assert len(of_rows) <= 2 * 10, "ten arrays, and at most two chunks of each"
    assert min(layout.chunks for layout in of_rows) >= 5
    decoded.clear()
    reader.read([sequence])
    assert decoded == []


def test_the_cache_is_bounded(many_chunks):
    reader = StoreReader(many_chunks, cache_bytes=2000)
    for number in range(len(reader)):
        reader.read([number])
        assert reader._cache.size <= 2000
    nothing = StoreReader(many_chunks, cache_bytes=0)
    np.testing.assert_array_equal(nothing.read([1, 0]).tokens, reader.read([1, 0]).tokens)
    assert nothing._cache.size == 0


def test_what_is_returned_can_be_written_to(sealed):
    """No view of the cache gets out."""
    reader = StoreReader(sealed)
    before = reader.read([0]).entropy.copy()
    for name in ("tokens", "entropy", "has_row", "head_size", "document", "window_start", "count", "token_end_byte"):
        values = getattr(reader.read([0]), name)
        values[...] = 0
    np.testing.assert_array_equal(reader.read([0]).entropy, before)
    assert reader.read([0]).tokens.any()


def test_damage_after_the_first_read_is_found(many_chunks):
    """The file was checked, then replaced or changed in place."""
    reader = StoreReader(many_chunks, cache_bytes=0)
    reader.read(range(3))
    for part in ("head_ids/c/0/0", "entropy/c/0"):
        victim = cases.find(many_chunks, f"shards/000000-{'?' * 16}/{part}")
        good = cases.contents(many_chunks)[victim]
        cases.put(many_chunks, victim, good[:-30] + bytes([good[-30] ^ 4]) + good[-29:])
        with pytest.raises(CorruptionError, match=f"shard 0 .*{part}: its sha256 is not"):
            reader.read(range(3))
        cases.put(many_chunks, victim, good)
        reader.read(range(3))


def test_importing_the_reader_is_cheap():
    code = (
        "import storage, sys; assert not {m for m in sys.modules if m.split('.')[0] in ('numpy', 'zarr', 'pyarrow')};"
        "import storage.reader, storage.writer, storage.tools.verify, storage.tools.repair, storage.tools.status;"
        "import storage.permutation;"
        "heavy = {'torch', 'transformers', 'datasets', 'click', 'pydantic', 'zarr', 'pyarrow'} & set(sys.modules);"
        "assert not heavy, heavy; import storage.exchange.arrow;"
        "assert not {'torch', 'transformers', 'datasets', 'click', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


def test_threads_may_share_a_reader(many_chunks, monkeypatch):
    """With hardly any memory, so that everything is loaded and dropped all the time."""
    monkeypatch.setattr(storage.reader, "OPEN_BYTES", 1)
    shared, alone = StoreReader(many_chunks, cache_bytes=2000), StoreReader(many_chunks)
    numbers = np.random.default_rng(0).integers(0, len(alone), 200).tolist()
    with ThreadPoolExecutor(4) as pool:
        for number, batch in zip(numbers, pool.map(lambda number: shared.read([number]), numbers), strict=True):
            expected = alone.read([number])
            np.testing.assert_array_equal(batch.logprob, expected.logprob)
            np.testing.assert_array_equal(batch.tail_ids, expected.tail_ids)


@pytest.mark.parametrize(
    ("documents", "documents_per_shard"), [(80, 2), (12_000, 3_000)], ids=["small_shards", "large_shards"]
)
def test_the_metadata_of_open_shards_takes_bounded_memory(tmp_path, monkeypatch, documents, documents_per_shard):
    limit = 300_000
    monkeypatch.setattr(storage.reader, "OPEN_BYTES", limit)
    plan = make_plan(
        documents=documents, documents_per_shard=documents_per_shard, target=TARGETS["topk"], heldout=HeldoutRule()
    )
    write_store(tmp_path / "store", plan, longest=2)
    reader = StoreReader(tmp_path / "store", cache_bytes=0, threads=1)
    numbers = range(0, len(reader), documents_per_shard)
    reader.read([0])  # what every first read sets up
    tracemalloc.start()
    try:
        for number in [*numbers, *reversed(numbers)]:
            reader.read([number])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < limit
    assert 0.5 * limit < reader._open.size <= limit
    shard = reader._open.get(reader.shards[0].shard)
    assert len(reader.shards) * shard.nbytes > 1.3 * limit, "not all of them fit"


def test_one_shard_stays_open_however_large_its_metadata(sealed, monkeypatch):
    opened = []
    open_shard = storage.reader.OpenShard

    def counted(plan, record, objects, cache):
        opened.append(record.shard)
        return open_shard(plan, record, objects, cache)

    monkeypatch.setattr(storage.reader, "OPEN_BYTES", 1)
    monkeypatch.setattr(storage.reader, "OpenShard", counted)
    reader = StoreReader(sealed)
    for number in [0, 0, len(reader) - 1, len(reader) - 1]:
        reader.read([number])
    assert opened == [reader.shards[0].shard, reader.shards[-1].shard]


def test_a_shard_that_is_opened_again_is_not_hashed_again(sealed, monkeypatch):
    hashed = []
    real = storage.commit.open_shard.CommittedObjects.whole

    def whole(self, name):
        hashed.append((self._record.shard, name))
        return real(self, name)

    monkeypatch.setattr(storage.commit.open_shard.CommittedObjects, "whole", whole)
    monkeypatch.setattr(storage.reader, "OPEN_BYTES", 60_000)  # of one shard
    reader = StoreReader(sealed, cache_bytes=0)
    for number in [*range(len(reader)), *range(len(reader))]:
        reader.read([number])
    groups = [name for _, name in hashed if name == "zarr.json"]
    objects = [found for found in hashed if "/c/" in found[1]]
    assert len(groups) == 2 * len(reader.shards)
    assert len(set(objects)) == len(objects) > 60


def test_tokenizer_files_are_checked_when_they_are_asked_for(sealed, tmp_path):
    store = Path(shutil.copytree(sealed, tmp_path / "store"))
    (store / "tokenizer" / "tokenizer.json.xz").unlink()
    reader = StoreReader(store)
    assert len(reader.read([0])) == 1
    with pytest.raises(CorruptionError, match="tokenizer"):
        reader.tokenizer_files()


def written_ragged(path):
    """A store some of whose shards have uneven heads, with end bytes."""
    plan = cases.make_plan()
    writer = cases.open_writer(path, plan)
    for shard in writer.missing():
        writer.commit(shard, cases.make_batch(plan, shard, ragged=shard.index == 1))
    writer.seal()
    return path


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("targets", [False, True])
def test_threads_change_nothing(many_chunks, tmp_path, monkeypatch, ragged, targets):
    monkeypatch.setattr(storage.reader, "ROWS_FOR_THREADS", 0)
    store = written_ragged(tmp_path / "ragged") if ragged else many_chunks
    alone = StoreReader(store, threads=1)
    wanted = np.random.default_rng(0).integers(0, len(alone), 30)
    for indices in (range(len(alone)), wanted, wanted[:1], []):
        expected = alone.read(indices, targets=targets)
        for threads in (2, 3, 7):
            found = StoreReader(store, threads=threads, cache_bytes=3000).read(indices, targets=targets)
            for field in fields(found):
                np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def test_a_large_read_runs_in_threads(many_chunks, monkeypatch):
    monkeypatch.setattr(storage.reader, "ROWS_FOR_THREADS", 20)
    used = set()
    real = storage.commit.open_shard.OpenShard.sequences

    def sequences(self, *arguments, **options):
        used.add(threading.get_ident())
        return real(self, *arguments, **options)

    monkeypatch.setattr(storage.commit.open_shard.OpenShard, "sequences", sequences)
    for few, threads, at_least, at_most in ((True, 3, 1, 1), (False, 1, 1, 1), (False, 3, 2, 3)):
        used.clear()
        reader = StoreReader(many_chunks, threads=threads)
        reader.read([0] if few else range(len(reader)))
        assert at_least <= len(used) <= at_most


@pytest.mark.parametrize("name", ["logprob", "head_ids", "tail_ids", "tokens", "row_offset"])
def test_damage_is_reported_alike_in_threads(sealed, tmp_path, monkeypatch, name):
    monkeypatch.setattr(storage.reader, "ROWS_FOR_THREADS", 0)
    store = shutil.copytree(sealed, tmp_path / "store")
    shard = sorted((store / "shards").iterdir())[1]
    path = next(file for file in (shard / name / "c").rglob("0") if file.is_file())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    messages = set()
    for threads in (1, 2, 4):
        reader = StoreReader(store, threads=threads)
        with pytest.raises(CorruptionError, match=name) as caught:
            reader.read(range(len(reader)))
        messages.add(str(caught.value))
        assert len(reader.read([0])) == 1, "what is not damaged can still be read"
    assert len(messages) == 1


def test_threads_are_at_least_one(sealed):
    with pytest.raises(UsageError, match="at least 1"):
        StoreReader(sealed, threads=0)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_no_sequences_have_the_shapes_of_some(target, tmp_path):
    write_store(tmp_path / "store", make_plan(target=target))
    nothing = StoreReader(tmp_path / "store").read([])
    for name in ("tail_logit_T", "entropy_T"):
        values = getattr(nothing, name)
        assert (values is None) == (not target.temperatures)
        assert values is None or values.shape == (0, len(target.temperatures))
