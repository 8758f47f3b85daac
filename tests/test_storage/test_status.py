"""What `status` says about a store."""

from __future__ import annotations

import os

import numpy as np
import pytest
import storage_cases as cases

from storage.errors import UsageError
from storage.reader import StoreReader
from storage.tools.status import status


def test_a_sealed_store(sealed, fresh):
    found, plan = status(cases.copy(sealed, fresh)), cases.make_plan()
    batches = [cases.make_batch(plan, shard) for shard in plan.shards()]
    assert found.path == str(fresh)
    assert (found.shards, found.committed, found.missing) == (5, 5, 0)
    assert found.digest == StoreReader(sealed).digest
    assert found.rows == sum(batch.rows for batch in batches)
    assert found.heldout_rows == batches[-1].rows
    assert found.bytes == sum(len(data) for data in cases.tree(sealed).values())
    assert found.bytes_per_row == pytest.approx(found.bytes / found.rows)
    growing = ("shards/", "commits/", "sealed.json")
    growing_bytes = sum(len(data) for name, data in cases.tree(sealed).items() if name.startswith(growing))
    assert found.shard_bytes_per_row == pytest.approx(growing_bytes / found.rows)
    assert found.shard_bytes_per_row < found.bytes_per_row
    head_mass = np.concatenate([1 / (1 + np.exp(batch.tail_logit)) for batch in batches]).mean()
    assert found.head_mass == pytest.approx(head_mass, abs=1e-3)


def test_an_unfinished_store(fresh):
    cases.open_writer(fresh, cases.make_plan())
    empty = status(fresh)
    assert (empty.committed, empty.missing, empty.rows, empty.bytes_per_row, empty.digest) == (0, 5, 0, None, None)
    cases.write_store(fresh, shards=[1])
    cases.put(fresh, "tmp/1-x", b"x" * 10**6)
    found = status(fresh)
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


def test_no_store(fresh):
    with pytest.raises(UsageError, match="no store") as caught:
        status(fresh)
    assert caught.value.where == str(fresh)
