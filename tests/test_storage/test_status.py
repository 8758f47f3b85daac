"""What `status` says about a store."""

from __future__ import annotations

import os

import numpy as np
import pytest
import storage_cases as cases

from storage.errors import UsageError
from storage.reader import StoreReader
from storage.tools.status import status


def test_a_sealed_store(sealed):
    found, plan = status(sealed), cases.make_plan()
    batches = [cases.make_batch(plan, shard) for shard in plan.shards()]
    assert (found.shards, found.committed, found.missing) == (5, 5, 0)
    assert found.digest == StoreReader(sealed).digest
    assert found.rows == sum(batch.rows for batch in batches)
    assert found.heldout_rows == batches[-1].rows
    assert found.bytes == sum(len(data) for data in cases.tree(sealed).values())
    assert found.bytes_per_row == pytest.approx(found.bytes / found.rows)
    assert found.shard_bytes_per_row < found.bytes_per_row
    head_mass = np.concatenate([1 / (1 + np.exp(batch.tail_logit)) for batch in batches]).mean()
    assert found.head_mass == pytest.approx(head_mass, abs=1e-3)


def test_an_unfinished_store(tmp_path):
    cases.open_writer(tmp_path / "store", cases.make_plan())
    empty = status(tmp_path / "store")
    assert (empty.committed, empty.missing, empty.rows, empty.bytes_per_row, empty.digest) == (0, 5, 0, None, None)
    cases.write_store(tmp_path / "store", shards=[1])
    (tmp_path / "store" / "tmp" / "1-x").write_bytes(b"x" * 10**6)
    found = status(tmp_path / "store")
    assert (found.committed, found.missing, found.digest) == (1, 4, None)
    assert found.bytes < 10**6


def test_the_pace_is_that_of_the_newest_commits(tmp_path, sealed):
    path = tmp_path / "store"
    cases.write_store(path, shards=[0, 1, 3])
    for shard, at in ((0, 1000), (3, 1010), (1, 1030)):
        os.utime(path / "commits" / f"{shard:06d}.json", (at, at))
    pace, plan = status(path).pace, cases.make_plan()
    rows = sum(cases.make_batch(plan, plan.shards()[shard]).rows for shard in (1, 3))
    assert (pace.shards, pace.rows, pace.seconds, pace.rows_per_second) == (2, rows, 30.0, rows / 30)
    for shard in (0, 1, 3):
        os.utime(path / "commits" / f"{shard:06d}.json", (5, 5))
    assert status(path).pace is None, "copied without times: nothing is known"
    assert status(sealed).pace is None, "it is finished"


def test_no_store(tmp_path):
    with pytest.raises(UsageError):
        status(tmp_path)
