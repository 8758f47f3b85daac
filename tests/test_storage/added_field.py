"""A program for `test_fields.py`: rows with one more number, through everything that a store does with rows.

Run where `storage` and `stages` are copies with one more field, `varentropy`, in storage/rows.py and no other change.
Arguments: a folder for the stores.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import storage_cases as cases

from stages.batches.sequences import join, pack, part
from storage.errors import NumericsError
from storage.format.validate import check_batch
from storage.reader import StoreReader
from storage.rows import SequenceBatch
from storage.tools.convert import Conversion, convert
from storage.tools.diff import diff
from storage.tools.verify import verify

FOLDER = Path(sys.argv[1])
PLAN = cases.make_plan(codecs=cases.EXACT, target=cases.TARGETS["temperatures"], documents=9, documents_per_shard=4)


def computed_by(rows_of, offset: float):
    """What computes the number: here it counts the rows of a shard."""
    return lambda plan, count, *rest: {
        **rows_of(plan, count, *rest),
        "varentropy": np.arange(count, dtype=np.float32) + np.float32(offset),
    }


def read(path: Path) -> SequenceBatch:
    reader = StoreReader(path)
    return reader.read(range(len(reader)))


rows_of = cases._rows
for name, offset in (("first", 0.5), ("second", 0.75)):
    cases._rows = computed_by(rows_of, offset)
    cases.write_store(FOLDER / name, PLAN)
    assert verify(FOLDER / name).problems == []

whole = read(FOLDER / "first")
given = [np.arange(item.rows) + 0.5 for item in StoreReader(FOLDER / "first").shards]
np.testing.assert_array_equal(whole.varentropy, np.concatenate(given))
assert whole.varentropy.dtype == np.float32
reader = StoreReader(FOLDER / "first")
np.testing.assert_array_equal(reader.read([3, 1]).varentropy, join([part(whole, 3, 4), part(whole, 1, 2)]).varentropy)
np.testing.assert_array_equal(join(pack(whole, 32)).varentropy, whole.varentropy)
assert reader.read([3, 1], targets=False).varentropy.tolist() == [0.0] * reader.read([3, 1]).rows

list(convert(FOLDER / "first", FOLDER / "resharded", Conversion(documents_per_shard=9, k=3)))
np.testing.assert_array_equal(read(FOLDER / "resharded").varentropy, whole.varentropy)
found = diff(FOLDER / "first", FOLDER / "second").splits["train"]
assert found.rows_different == found.rows == whole.rows

shard = PLAN.shards()[0]
batch = cases.make_batch(PLAN, shard)
for wrong, error in ((batch.varentropy[1:], ValueError), (np.full(batch.rows, np.nan, np.float32), NumericsError)):
    with pytest.raises(error, match="varentropy"):
        check_batch(PLAN, shard, replace(batch, varentropy=wrong))
print("kept")
