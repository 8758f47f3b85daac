"""The difference between two stores: found where it was made, of the size it was made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import storage_cases as cases

from storage.errors import CorruptionError, UsageError
from storage.reader import StoreReader
from storage.tools.convert import Conversion, convert
from storage.tools.diff import diff

EXACT = cases.make_plan(codecs=cases.EXACT)


def write(path, plan=EXACT, change=lambda shard, batch: batch, shards=range(99)):
    writer = cases.open_writer(path, plan)
    for shard in writer.missing():
        if shard.index in shards:
            writer.commit(shard, change(shard, cases.make_batch(EXACT, shard)))
    writer.seal()
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write(tmp_path_factory.mktemp("diff") / "store")


def with_row_changed(batch, **changes):
    """The batch with values added to one entry of each named array."""
    arrays = {}
    for name, (at, amount) in changes.items():
        arrays[name] = getattr(batch, name).copy()
        arrays[name][at] += amount
    return replace(batch, **arrays)


def test_equal_digests_end_at_once(store, fresh, monkeypatch):
    write(fresh)
    monkeypatch.setattr(StoreReader, "read", pytest.fail)
    found = diff(store, fresh)
    assert found.equal
    assert found.splits == {}
    assert found.digests[0] == found.digests[1]


def test_one_value_of_one_row(store, store_at, fresh):
    def change(shard, batch):
        # The second entry of a head moves a little towards the third: order and mass stay legal.
        return with_row_changed(batch, logprob=(1, -1e-4)) if shard.index == 2 else batch

    other = write(fresh, change=change)
    found = diff(cases.copy(store, store_at("first")), other)
    part = found.splits["train"]
    assert not found.equal
    assert found.plan == []
    assert found.splits["heldout"].equal
    assert (part.rows_different, part.sequences_different, part.shards) == (1, 1, [2])
    assert (part.rows_other_head, part.rows_other_samples, part.only_first, part.only_second) == (0, 0, 0, 0)
    assert part.rows == StoreReader(store).rows
    assert part.sequences == len(StoreReader(store))
    assert part.largest_logprob == pytest.approx(1e-4, rel=1e-2)
    (example,) = part.examples
    batch = cases.make_batch(EXACT, EXACT.shards()[2])
    first_with_rows = int(np.flatnonzero(np.diff(batch.row_offset))[0])
    assert (example.shard, example.document, example.rows) == (2, batch.document[first_with_rows], 1)
    p = float(np.exp(batch.logprob[1]))
    mass = float(np.exp(batch.logprob[:6].astype(float)).sum())
    q = p * np.exp(-1e-4)
    expected = p * np.log(p / q) + (1 - mass) * np.log((1 - mass) / (1 - mass + p - q))
    assert part.mean_kl * part.rows == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("name", ["tail_logit", "logsumexp", "entropy", "next_logprob"])
def test_a_number_of_a_row(store, tmp_path, name):
    other = write(tmp_path / "other", change=lambda shard, batch: with_row_changed(batch, **{name: (3, -0.01)}))
    for part in diff(store, other).splits.values():
        assert part.rows_different == len(part.shards)
        assert part.largest_logprob == 0.0


@pytest.mark.parametrize("lost", [False, True])
def test_where_tokens_end(store, tmp_path, lost):
    def change(shard, batch):
        if shard.index == 0:
            return with_row_changed(batch, token_end_byte=(1, 1))
        return replace(batch, token_end_byte=None) if lost and shard.index == 4 else batch

    splits = diff(store, write(tmp_path / "other", change=change)).splits
    part = splits["train"]
    assert (part.other_parts, part.sequences_different, part.rows_different) == ({"token_end_byte": 1}, 1, 0)
    assert [(item.document, item.parts, item.rows) for item in part.examples] == [(0, ("token_end_byte",), 0)]
    assert splits["heldout"].other_parts == ({"token_end_byte": splits["heldout"].sequences} if lost else {})
    assert not part.equal


def test_added_columns_that_both_have(store, tmp_path):
    about = {"axis": "row", "dtype": "float32"}
    plans = [
        replace(EXACT, columns={"score": about, "weight": {"axis": "sequence", "dtype": "uint8"}, name: about})
        for name in ("mine", "yours")
    ]

    def with_columns(plan, number):
        def change(shard, batch):
            score, weight = np.arange(batch.rows, dtype=np.float32), np.arange(len(batch), dtype=np.uint8)
            score[0] = np.nan
            if number and shard.index == 1:
                score[[3, -1]] += 1
                weight[-1] += 1
            names = plan.columns.keys() - {"weight"}
            return replace(batch, row_columns=dict.fromkeys(names, score), sequence_columns={"weight": weight})

        return change

    paths = [write(tmp_path / str(number), plan, with_columns(plan, number)) for number, plan in enumerate(plans)]
    found = diff(*paths)
    assert [line.split(":")[0] for line in found.plan] == ["columns.mine", "columns.yours"]
    part, batch = found.splits["train"], cases.make_batch(EXACT, EXACT.shards()[1])
    sequence_of = batch.sequence_of_row[[3, -1]]
    assert part.other_parts == {"column score": len(set(sequence_of)), "column weight": 1}
    assert (part.rows_different, part.largest_logprob, part.shards) == (2, 0.0, [1])
    assert part.sequences_different == len({*sequence_of, len(batch) - 1})
    assert part.examples[-1].parts[-1] in ("column score", "column weight")
    assert found.splits["heldout"].equal


def test_ids_and_samples(store, tmp_path):
    def change(shard, batch):
        ids, count = batch.head_ids.copy(), batch.count.copy()
        ids[[0, 1]] = ids[[1, 0]]
        wide = int(np.flatnonzero((batch.tail_size == 2) | (batch.tail_size == 3))[0])
        start = int(batch.tail_size[:wide].sum())
        pair = count[start : start + int(batch.tail_size[wide])]
        pair[int(pair.argmax())] -= 1
        pair[int(pair.argmin())] += 1
        return replace(batch, head_ids=ids, count=count) if shard.index == 1 else batch

    part = diff(store, write(tmp_path / "other", change=change)).splits["train"]
    assert part.rows_other_head == 1
    assert part.rows_other_samples <= 1
    assert part.rows_different in (1, 2)
    batch = cases.make_batch(EXACT, EXACT.shards()[1])
    assert part.largest_logprob == pytest.approx(float(batch.logprob[0] - batch.logprob[1]), abs=1e-6)


def test_other_tokens_are_not_compared_further(store, tmp_path):
    def change(shard, batch):
        tokens = batch.tokens.copy()
        tokens[0] = (tokens[0] + 1) % EXACT.vocab_size
        return replace(batch, tokens=tokens) if shard.index == 0 else batch

    part = diff(store, write(tmp_path / "other", change=change)).splits["train"]
    assert (part.other_tokens, part.sequences_different, part.rows_different) == (1, 1, 0)
    assert part.examples[0].rows is None
    assert part.rows < StoreReader(store).rows


def test_an_unfinished_store_has_sequences_less(store, tmp_path):
    some = write(tmp_path / "some", shards=[0, 2])
    found = diff(store, some)
    counts = [item.sequences for item in StoreReader(store).shards]
    assert found.splits["train"].only_first == counts[1] + counts[3]
    assert diff(some, store).splits["train"].only_second == counts[1] + counts[3]
    assert found.splits["train"].rows_different == 0


def test_another_sharding_holds_the_same_rows(store, tmp_path):
    list(convert(store, tmp_path / "other", Conversion(documents_per_shard=11)))
    found = diff(store, tmp_path / "other")
    assert not found.equal
    assert found.plan[0] == "documents_per_shard: 6 -> 11"
    for part in found.splits.values():
        assert part.equal
        assert (part.sequences > 0, part.rows > 0) == (True, True)


def test_heads_of_other_sizes_are_compared_by_their_common_ids(store, tmp_path):
    list(convert(store, tmp_path / "small", Conversion(k=3)))
    part = diff(store, tmp_path / "small").splits["train"]
    assert part.rows_other_head == part.rows_different == part.rows > 0
    assert part.largest_logprob == 0.0
    assert part.mean_kl == pytest.approx(0.0, abs=1e-9)


def test_damage_and_no_store(store, tmp_path):
    write(tmp_path / "damaged", change=lambda shard, batch: with_row_changed(batch, entropy=(0, 0.1)))
    next((tmp_path / "damaged" / "shards").glob("000001-*/logprob/c/0/0")).write_bytes(b"x")
    with pytest.raises(CorruptionError, match="logprob"):
        diff(store, tmp_path / "damaged")
    with pytest.raises(UsageError, match="no store here"):
        diff(store, tmp_path / "none")


def test_temperatures_that_both_have(tmp_path):
    target = cases.TARGETS["hybrid"]
    two, one = (cases.make_plan(target=replace(target, temperatures=values)) for values in ((0.5, 2.0), (2.0,)))

    def second(amount):
        def change(shard, batch):
            mine = cases.make_batch(two, shard)
            hotter = {name: getattr(mine, name)[:, 1:] + amount for name in ("tail_logit_T", "entropy_T")}
            return replace(mine, temperatures=(2.0,), **hotter)

        return change

    write(tmp_path / "two", two, change=lambda shard, batch: cases.make_batch(two, shard))
    for amount in (0.0, 1.0):
        write(tmp_path / f"{amount}", one, change=second(amount))
        part = diff(tmp_path / "two", tmp_path / f"{amount}").splits["train"]
        assert part.rows_different == (part.rows if amount else 0)
        assert part.rows > 0
