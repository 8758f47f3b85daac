"""The store's benchmark on a tiny store: its sides read the same rows, and its sizes and memory come out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import storage_cases as cases

from storage.reader import StoreReader

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    from benchmarks.storage import formats, memory, speed

    return formats, memory, speed


@pytest.fixture
def training(tmp_path):
    """A store without a held-out part, all of whose rows have six entries and four draws."""
    from storage.plan import HeldoutRule

    cases.write_store(tmp_path / "store", cases.make_plan(heldout=HeldoutRule()), longest=40)
    return tmp_path / "store"


def test_all_sides_give_the_same_sequences(bench, training, tmp_path):
    formats, _, speed = bench
    reader = StoreReader(training)
    whole = reader.read(range(len(reader)))
    pq.write_table(formats.table(whole), tmp_path / "rows")
    ours = [rows for rows in speed.split(whole) if len(rows[0])]
    zarr = speed.Zarr(training)
    others = {
        "zarr": zarr.decoded(reader.remap),
        "zarr, one by one": zarr.sequences(reader.remap, np.arange(len(reader))),
        "parquet": speed.parquet_sequences(pq.read_table(tmp_path / "rows")),
    }
    for name, sequences in others.items():
        found = [rows for rows in sequences if len(rows[0])]
        assert len(found) == len(ours), name
        for mine, other in zip(ours, found, strict=True):
            for place in (0, 2, 3):
                np.testing.assert_array_equal(mine[place], other[place], err_msg=name)
            tolerance = 2e-3 if name == "parquet" else 1e-5
            np.testing.assert_allclose(mine[1], other[1], rtol=tolerance, atol=1e-4, err_msg=name)


def test_it_prints_numbers(bench, training, tmp_path):
    formats, memory, speed = bench
    reader = StoreReader(training)
    batch = reader.read(range(len(reader)))
    sizes = formats.sizes([batch], tmp_path)
    assert sizes["parquet zstd"] > 0
    assert sizes["nemo-aligner jsonl"] is None, "it has no place for samples"
    assert formats.distillkit_bytes(49_152) == {"recommended": 312, "budget": 114}
    pq.write_table(formats.table(batch), tmp_path / "rows", row_group_size=64)
    rounds = speed.Rounds(1)
    for rates, ratios in (
        speed.sequential(training, {"parquet zstd": tmp_path / "rows"}, rounds, 6),
        speed.random_sequences(training, tmp_path / "rows", rounds, 6),
    ):
        assert min(rates.values()) > 0
        assert ratios["ours, read"] == 1.0
    assert min(speed.looking(reader, tmp_path / "export.parquet").values()) > 0
    assert memory.growth(training, "random", 1 << 20) >= 0
