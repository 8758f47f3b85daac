"""Columns of one's own beside the rows: added by a conversion, read back, exported; wrong files are refused."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.commit.records import CommitRecord
from storage.errors import IdentityError, StorageUnavailableError, UsageError
from storage.exchange.arrow import to_table
from storage.reader import StoreReader
from storage.tools.columns import ColumnFile
from storage.tools.convert import Conversion, Converted, ValuesFound, convert
from storage.tools.diff import diff
from storage.tools.status import status
from storage.tools.verify import verify

KEYS = ["document", "sequence", "position"]


def rows_of(store):
    """The keys of all rows of both splits, in an order of their own."""
    table = pa.concat_tables([to_table(StoreReader(store, split=split)) for split in ("train", "heldout")]).select(KEYS)
    return table.take(np.random.default_rng(0).permutation(table.num_rows))


def write(path, name, keys, values):
    pq.write_table(keys.append_column(name, pa.array(values)), path)
    return ColumnFile(name, path)


def run(source, target, *columns, **changes):
    return list(convert(source, target, Conversion(columns=columns, **changes)))[-1]


def records(store):
    return [CommitRecord.from_json(path.read_bytes()) for path in sorted((store / "commits").iterdir())]


def number(table):
    return sum(table[key].to_numpy() * scale for key, scale in zip(KEYS, (10_000, 100, 1), strict=True))


@pytest.fixture
def with_columns(sealed, tmp_path):
    keys = rows_of(sealed)
    by_row = write(tmp_path / "row.parquet", "mine", keys, number(keys).astype(np.float32))
    documents = pa.table({"document": np.arange(99)})
    by_document = write(tmp_path / "document.parquet", "weight", documents, np.arange(99) * 2)
    run(sealed, tmp_path / "new", by_row, by_document)
    return tmp_path / "new"


def test_values_come_back_beside_unchanged_rows(sealed, with_columns):
    assert verify(with_columns).problems == []
    for split, part in diff(sealed, with_columns).splits.items():
        assert part.equal
        reader = StoreReader(with_columns, split=split)
        batch = reader.read(range(len(reader)))
        assert batch.row_columns["mine"].dtype == np.float32
        assert batch.sequence_columns["weight"].tolist() == (batch.document * 2).tolist()
        table = to_table(reader)
        assert table["mine"].to_numpy().tolist() == number(table).tolist()
        assert table["weight"].to_numpy().tolist() == (table["document"].to_numpy() * 2).tolist()
    for new, old in zip(records(with_columns), records(sealed), strict=True):
        kept = {name: item for name, item in new.objects.items() if not name.startswith("column_")}
        assert {**kept, "zarr.json": None} == {**old.objects, "zarr.json": None}, "the same bytes but for its name"
    plan = reader.plan
    assert plan.columns == {
        "mine": {"axis": "row", "dtype": "float32"},
        "weight": {"axis": "sequence", "dtype": "uint64"},
    }
    assert plan.derived_from["column_files"].keys() == {"mine", "weight"}
    assert "columns" not in StoreReader(sealed).plan.semantic()


def test_columns_stay_in_further_conversions_and_in_any_order(with_columns, tmp_path):
    run(with_columns, tmp_path / "next", k=2, documents_per_shard=10)
    assert verify(tmp_path / "next").problems == []
    reader = StoreReader(tmp_path / "next")
    order = np.random.default_rng(1).permutation(len(reader))
    batch = reader.read(order)
    assert batch.sequence_columns["weight"].tolist() == (batch.document * 2).tolist()
    assert (batch.row_columns["mine"] // 10_000 == np.repeat(batch.document, np.diff(batch.row_offset))).all()


def test_another_file_is_another_store(sealed, with_columns, tmp_path):
    documents = pa.table({"document": np.arange(99)})
    other = write(tmp_path / "other.parquet", "weight", documents, np.arange(99))
    with pytest.raises(IdentityError, match="derived_from"):
        run(sealed, with_columns, other)


def refused(sealed, path, keys, values, words, name="mine"):
    with pytest.raises(UsageError, match=words):
        run(sealed, path / f"refused {words}", write(path / "column.parquet", name, keys, values))


def test_wrong_files(sealed, tmp_path):
    keys = rows_of(sealed)
    ones = np.ones(keys.num_rows, np.float32)
    refused(sealed, tmp_path, keys, ones.astype(np.float64), "type double")
    refused(sealed, tmp_path, keys, ["text"] * len(ones), "type string")
    refused(sealed, tmp_path, keys, ones, "a name is a letter", name="../x")
    for name in ("entropy", "loss_mask"):
        refused(sealed, tmp_path, keys, ones, f"{name}: exports have something of that name already", name=name)
    pq.write_table(keys, tmp_path / "keys.parquet")
    with pytest.raises(UsageError, match="no column 'mine'"):
        ColumnFile("mine", tmp_path / "keys.parquet")
    (tmp_path / "text.parquet").write_text("mine")
    for path, words in ((tmp_path / "text.parquet", "no readable Parquet file"), (tmp_path / "none", "no such file")):
        with pytest.raises(UsageError, match=words):
            ColumnFile("mine", path)
    assert not list(tmp_path.glob("refused*")), "nothing was begun"


def test_wrong_values(sealed, tmp_path):
    keys = rows_of(sealed)
    ones = np.ones(keys.num_rows, np.float32)
    refused(sealed, tmp_path, keys.slice(1), ones[1:], "1 values are missing, the first for document")
    refused(
        sealed, tmp_path / "", pa.concat_tables([keys, keys.slice(0, 1)]), np.ones(len(ones) + 1, np.float32), "twice"
    )
    refused(sealed, tmp_path, keys, -ones.astype(np.int32), "negative")
    refused(sealed, tmp_path, keys, pa.array([None, *ones[1:].tolist()], pa.float32()), "nulls")
    assert not list(tmp_path.glob("refused*")), "nothing was begun"


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("document", lambda values: values.cast(pa.string()), "column document has type string"),
        ("position", lambda values: values.cast(pa.float64()), "column position has type double"),
        ("sequence", lambda values: pa.array([None, *values.to_pylist()[1:]], pa.int64()), "column sequence has nulls"),
    ],
)
def test_wrong_keys(sealed, tmp_path, key, change, words):
    keys = rows_of(sealed)
    wrong = keys.set_column(KEYS.index(key), key, change(keys[key]))
    refused(sealed, tmp_path, wrong, np.ones(keys.num_rows, np.float32), words)
    assert not list(tmp_path.glob("refused*")), "nothing was begun"


def test_a_damaged_file(sealed, tmp_path):
    """Its schema, at the end, is good."""
    keys = rows_of(sealed)
    column = write(tmp_path / "row.parquet", "mine", keys, np.ones(keys.num_rows, np.float32))
    data = column._path.read_bytes()
    column._path.write_bytes(data[:4] + b"\xff" * 200 + data[204:])
    with pytest.raises(UsageError, match="no readable Parquet file"):
        run(sealed, tmp_path / "new", ColumnFile("mine", column._path))
    assert not (tmp_path / "new").exists()


def test_every_value_is_looked_up_before_anything_is_written(sealed, tmp_path):
    column = write(tmp_path / "weight.parquet", "weight", pa.table({"document": np.arange(99)}), np.arange(99))
    conversion = convert(sealed, tmp_path / "new", Conversion(columns=(column,)))
    looked_up = [next(conversion) for _ in range(5)]
    assert [(type(event), event.checked, event.shards) for event in looked_up] == [
        (ValuesFound, shard, 5) for shard in range(1, 6)
    ]
    rows = [event.rows for event in looked_up]
    assert rows == sorted(rows)
    assert (rows[0] > 0, rows[-1]) == (True, status(sealed).rows)
    assert looked_up[0].seconds_left == pytest.approx(4 * looked_up[0].seconds)
    assert looked_up[-1].seconds_left == 0
    assert not (tmp_path / "new").exists()
    assert next(conversion).committed == 1
    conversion.close()
    again = convert(sealed, tmp_path / "new", Conversion(columns=(column,)))
    assert {type(event) for event in again} == {Converted}, "what is begun goes on at once"


def test_the_plan_and_the_target_are_looked_at_before_the_values(sealed, tmp_path, monkeypatch):
    monkeypatch.setattr("storage.plan.LARGEST_SHARDS", 10)
    useless = write(tmp_path / "useless.parquet", "mine", pa.table({"document": [1000]}), [1])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for target, changes, error, words in (
        ("useless.parquet", {}, UsageError, "the store's path is a file"),
        ("foreign", {}, UsageError, "not a store: it holds notes"),
        ("x" * 300, {}, StorageUnavailableError, "name too long"),
        ("loop", {}, StorageUnavailableError, "symbolic links"),
        ("new", {"documents_per_shard": 0}, UsageError, "documents_per_shard"),
        ("new", {"documents_per_shard": 1}, UsageError, "more than 10 shards"),
        ("new", {}, UsageError, "values are missing"),
    ):
        with pytest.raises(error, match=words):
            run(sealed, tmp_path / target, useless, **changes)
    assert not (tmp_path / "new").exists()


def put_in_its_place(path, other):
    other.replace(path)


def edit_in_place(path, other):
    """As `rsync --inplace --times` leaves it: inode, size and time of modification stay."""
    before = path.stat()
    path.write_bytes(other.read_bytes())
    while (after := path.stat()).st_mtime_ns != before.st_mtime_ns or after.st_ctime_ns == before.st_ctime_ns:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # until the file system's clock has moved on
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)


@pytest.mark.parametrize("change", [put_in_its_place, edit_in_place])
def test_a_file_that_is_replaced_meanwhile(sealed, tmp_path, change):
    path, documents = tmp_path / "weights.parquet", pa.table({"document": np.arange(99)})
    weights = np.arange(99, dtype=np.uint8)  # as many bytes in any order
    first = write(path, "weight", documents, weights)
    good = path.read_bytes()
    conversion = convert(sealed, tmp_path / "new", Conversion(columns=(first,)))
    assert any(isinstance(event, Converted) for event in conversion), "up to the first shard"
    write(tmp_path / "other.parquet", "weight", documents, weights[::-1])
    change(path, tmp_path / "other.parquet")
    with pytest.raises(IdentityError, match="changed while the conversion was reading it"):
        list(conversion)
    path.write_bytes(good)
    run(sealed, tmp_path / "new", ColumnFile("weight", path))
    run(sealed, tmp_path / "undisturbed", ColumnFile("weight", path))
    assert StoreReader(tmp_path / "new").digest == StoreReader(tmp_path / "undisturbed").digest
    path.unlink()
    with pytest.raises(StorageUnavailableError, match="No such file") as caught:
        run(sealed, tmp_path / "third", first)
    assert caught.value.where == str(path)


class ReplacedByAReader:
    """The data of a column file that is replaced just before or just after it is read."""

    def __init__(self, data, replace, *, before):
        self._data, self._replace, self._before = data, replace, before

    def to_table(self, **options):
        if self._before:
            self._replace()
        table = self._data.to_table(**options)
        self._replace()
        return table


@pytest.mark.parametrize("before", [False, True])
def test_a_file_that_is_replaced_while_it_is_read(sealed, tmp_path, before):
    """What was read may be of either file; what cannot be read is not called damaged."""
    path = tmp_path / "weights.parquet"
    column = write(path, "weight", pa.table({"document": np.arange(99)}), np.arange(99))
    (tmp_path / "other").write_bytes(b"not Parquet")
    column._data = ReplacedByAReader(column._data, lambda: (tmp_path / "other").replace(path), before=before)
    batch = StoreReader(sealed).read([0])
    with pytest.raises(IdentityError, match="changed while the conversion was reading it"):
        column.values(batch, np.arange(1))
