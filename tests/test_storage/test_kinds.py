"""Rows of every kind in a store: any order, any part, the same as plain zarr-python reads, and no damage unseen."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import storage_cases as cases
from storage_cases import zarr_quietly

import storage.format.arrays
from storage.commit.records import CommitRecord
from storage.errors import CorruptionError, NumericsError
from storage.exchange.arrow import to_table
from storage.format.validate import check_batch
from storage.plan import Plan
from storage.reader import StoreReader
from storage.segments import cumsum_rows
from storage.tools.verify import verify

SHARD = 1  # the damaged one
OPTIONAL = {
    "k": {"head_offset", "head_size", "head_ids", "logprob", "tail_logit"},
    "draws": {"tail_offset", "tail_size", "tail_ids", "count"},
    "temperatures": {"tail_logit_T", "entropy_T"},
}


@pytest.fixture(params=cases.TARGETS, scope="module")
def store(request, tmp_path_factory) -> Path:
    """A sealed store of each kind. Read only."""
    path = tmp_path_factory.mktemp(request.param) / "store"
    cases.write_store(path, cases.make_plan(target=cases.TARGETS[request.param]))
    return path


def arrays_of(store: Path, shard: int) -> tuple[CommitRecord, dict[str, np.ndarray]]:
    """A shard's record, and its arrays as zarr-python reads them."""
    record = CommitRecord.from_json((store / f"commits/{shard:06d}.json").read_bytes())
    with zarr_quietly() as zarr:
        group = zarr.open_group(store / record.path, mode="r")
        return record, {name: array[:] for name, array in group.arrays()}


def test_arrays_are_there_if_the_kind_has_them(store):
    plan = StoreReader(store).plan
    _, arrays = arrays_of(store, 0)
    for field, names in OPTIONAL.items():
        assert names <= arrays.keys() if getattr(plan.target, field) else not names & arrays.keys()


def test_equals_plain_zarr(store):
    reader, (record, arrays) = StoreReader(store), arrays_of(store, 0)
    batch = reader.read(range(record.counts.sequences))
    if reader.plan.target.k:
        np.testing.assert_array_equal(reader.remap[arrays["head_ids"].reshape(-1)], batch.head_ids)
        np.testing.assert_array_equal(arrays["head_size"], batch.head_size)
        np.testing.assert_array_equal(arrays["tail_logit"].astype(np.float32), batch.tail_logit)
    else:
        assert batch.head_ids.size == batch.logprob.size == batch.head_size.sum() == 0
        assert np.all(np.isposinf(batch.tail_logit))
    if reader.plan.target.draws:
        ranks = cumsum_rows(arrays["tail_ids"], arrays["tail_size"].astype(np.int32))
        np.testing.assert_array_equal(reader.remap[ranks], batch.tail_ids)
        np.testing.assert_array_equal(arrays["count"], batch.count)
    for name in OPTIONAL["temperatures"]:
        if reader.plan.target.temperatures:
            np.testing.assert_array_equal(arrays[name].T.astype(np.float32), getattr(batch, name))
        else:
            assert getattr(batch, name) is None


def test_any_order_gives_the_same_rows(store):
    reader = StoreReader(store)
    whole = reader.read(range(len(reader)))
    for number in (len(reader) - 1, 0, 3):
        one = reader.read([number])
        for name, axis in cases.AXES.items():
            if getattr(whole, name) is not None:
                cut = slice(*getattr(whole, axis)[number : number + 2])
                np.testing.assert_array_equal(getattr(one, name), getattr(whole, name)[cut], err_msg=name)
    numbers = np.random.default_rng(0).permutation(len(reader))
    shuffled = reader.read(numbers)
    assert shuffled.rows == whole.rows
    np.testing.assert_array_equal(np.diff(shuffled.head_offset), np.diff(whole.head_offset)[numbers])


def test_chunks_change_nothing(store, tmp_path, monkeypatch):
    whole = StoreReader(store)
    with monkeypatch.context() as patch:
        patch.setattr(storage.format.arrays, "CHUNK_UNITS", 8)
        cases.write_store(tmp_path / "store", whole.plan)
    many = StoreReader(tmp_path / "store")
    for numbers in ([3], [9, 2, 2], range(len(whole))):
        one, other = whole.read(numbers), many.read(numbers)
        for item in fields(one):
            np.testing.assert_array_equal(getattr(one, item.name), getattr(other, item.name), err_msg=item.name)


def test_without_targets_rows_are_empty(store):
    reader = StoreReader(store)
    whole, bare = (reader.read(range(len(reader)), targets=targets) for targets in (True, False))
    for name in ("tokens", "has_row", "row_offset", "document"):
        np.testing.assert_array_equal(getattr(bare, name), getattr(whole, name))
    assert bare.rows == whole.rows
    assert bare.head_size.sum() == bare.tail_size.sum() == bare.head_ids.size == bare.tail_ids.size == 0
    assert bare.tail_logit_T is None


def test_no_damage_passes(store, tmp_path):
    """Every file of a shard flipped, shortened or removed: named, found by verify, and not one row returned."""
    record, _ = arrays_of(store, SHARD)
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    first = StoreReader(copy).shards[0].sequences
    for number, name in enumerate(record.objects):
        path = copy / record.path / name
        good = path.read_bytes()
        bad = (bytes([good[0] ^ 4]) + good[1:], good[:-1], None)[number % 3]
        path.unlink() if bad is None else path.write_bytes(bad)
        with pytest.raises(CorruptionError, match=f"shard {SHARD}"):
            StoreReader(copy).read(range(first, first + record.counts.sequences))
        assert [problem.name for problem in verify(copy).problems] == [f"{record.path}/{name}"]
        path.write_bytes(good)
    assert verify(copy).problems == []


def changed(batch, name: str, value: float):
    values = getattr(batch, name).copy()
    values[2, 1] = value
    return replace(batch, **{name: values})


@pytest.mark.parametrize(
    ("name", "value"),
    [("tail_logit_T", np.nan), ("entropy_T", np.nan), ("entropy_T", -0.1), ("entropy_T", np.inf)],
)
def test_numbers_at_other_temperatures_are_checked(name, value):
    plan = cases.make_plan(target=cases.TARGETS["temperatures"])
    shard = plan.shards()[0]
    batch = cases.make_batch(plan, shard)
    check_batch(plan, shard, batch)
    with pytest.raises(NumericsError, match=rf"{name} .* at temperature 1.5: document \d+, .* row 2"):
        check_batch(plan, shard, changed(batch, name, value))


@pytest.mark.parametrize(
    "change",
    [
        {"tail_logit_T": None},
        {"entropy_T": np.zeros((3, 3), np.float32)},
        {"temperatures": (0.5, 1.5)},
        {"temperatures": (), "tail_logit_T": None, "entropy_T": None},
    ],
)
def test_temperatures_must_be_the_plans(change):
    plan = cases.make_plan(target=cases.TARGETS["temperatures"])
    shard = plan.shards()[0]
    with pytest.raises(ValueError, match="temperatures"):
        check_batch(plan, shard, replace(cases.make_batch(plan, shard), **change))


def test_a_plan_of_every_kind_survives_its_json():
    for target in cases.TARGETS.values():
        plan = cases.make_plan(target=target)
        assert Plan.from_json(plan.to_json()) == plan


def test_arrow_has_every_row(store):
    reader = StoreReader(store)
    target, batch, table = reader.plan.target, reader.read(range(len(reader))), to_table(reader)
    assert table["temperatures"].to_pylist() == [pytest.approx(list(target.temperatures))] * batch.rows
    assert [len(ids) for ids in table["logprob"].to_pylist()] == batch.head_size.tolist()
    assert [sum(counts) for counts in table["counts"].to_pylist()] == [target.draws] * batch.rows
    if batch.tail_logit_T is not None and batch.entropy_T is not None:
        mass = 1 / (1 + np.exp(-batch.tail_logit_T.astype(np.float64)))
        np.testing.assert_allclose(table["tail_mass_T"].to_pylist(), mass, rtol=1e-6)
        np.testing.assert_array_equal(table["entropy_T"].to_pylist(), batch.entropy_T)
    assert (table["tail_mass"].to_numpy() == 1.0).all() == (target.k == 0)
