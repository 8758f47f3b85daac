"""Stores written by format version 1, kept here for good: whatever the code becomes, it reads them as they were meant.

Each archive holds a store and, for each split, what a reader gives. They are not refreshed. A new format version adds a
folder: `python tests/test_storage/test_golden_stores.py` writes the one of the present version, unless it is there.
"""

from __future__ import annotations

import tarfile
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from storage_cases import EXACT, TARGETS, in_order, make_batch, make_plan, write_store

from storage.plan import FORMAT_VERSION, Plan
from storage.reader import StoreReader
from storage.rows import SequenceBatch
from storage.tools.verify import verify

GOLDEN = Path(__file__).parent / "golden_stores"
SPLITS = ("train", "heldout")
ARCHIVES = sorted(GOLDEN.glob("format-*/*.tar.xz"))


def _name(path: Path) -> str:
    return path.relative_to(GOLDEN).as_posix().removesuffix(".tar.xz")


def _plans() -> dict[str, Plan]:
    plans = {kind: make_plan(target=target, documents=6, documents_per_shard=6) for kind, target in TARGETS.items()}
    return {**plans, "exact": make_plan(documents=6, documents_per_shard=6, codecs=EXACT)}


def _unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder


def _read(store: Path, split: str) -> SequenceBatch:
    reader = StoreReader(store, split=split)
    return reader.read(np.arange(len(reader)))


def _arrays(batch: SequenceBatch) -> dict[str, np.ndarray]:
    values = {item.name: getattr(batch, item.name) for item in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def test_there_is_a_golden_store_of_every_kind_for_every_version():
    found = {_name(path) for path in ARCHIVES}
    assert {f"format-1/{name}" for name in _plans()} <= found
    assert any(name.startswith(f"format-{FORMAT_VERSION}/") for name in found)


@pytest.mark.parametrize("archive", ARCHIVES, ids=_name)
def test_read_as_written(archive, tmp_path):
    folder = _unpack(archive, tmp_path)
    assert verify(folder / "store").problems == []
    for split in SPLITS:
        read = _arrays(_read(folder / "store", split))
        with np.load(folder / f"{split}.npz") as expected:
            assert set(expected.files) <= set(read)
            for name in expected.files:
                # Scaling the head uses exp and log, whose last bit may differ between machines.
                tolerance = 3e-6 if name == "logprob" else 0.0
                np.testing.assert_allclose(read[name], expected[name], rtol=0.0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("kind", TARGETS)
def test_what_they_hold_is_what_was_given(kind, tmp_path):
    """The expected values are the writer's input, but for what a codec may round: not merely what was read once."""
    folder = _unpack(GOLDEN / "format-1" / f"{kind}.tar.xz", tmp_path)
    plan = _plans()[kind]
    for shard in plan.shards():
        given = in_order(make_batch(plan, shard))
        with np.load(folder / f"{shard.split}.npz") as expected:
            for name in ("tokens", "head_ids", "tail_ids", "count", "head_size", "has_row", "document"):
                assert np.array_equal(expected[name], getattr(given, name)), name
            assert np.abs(expected["logprob"] - given.logprob).max(initial=0.0) < 0.1


def _anonymous(item: tarfile.TarInfo) -> tarfile.TarInfo:
    return item.replace(uid=0, gid=0, uname="", gname="", mtime=0, deep=False)


def _write(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, plan in _plans().items():
        with tempfile.TemporaryDirectory() as temporary, tarfile.open(folder / f"{name}.tar.xz", "w:xz") as packed:
            store = Path(temporary) / "store"
            write_store(store, plan)
            (store / "tmp").rmdir()
            packed.add(store, "store", filter=_anonymous)
            for split in SPLITS:
                np.savez(Path(temporary) / f"{split}.npz", **_arrays(_read(store, split)))
                packed.add(Path(temporary) / f"{split}.npz", f"{split}.npz", filter=_anonymous)


if __name__ == "__main__":
    _write(GOLDEN / f"format-{FORMAT_VERSION}")
