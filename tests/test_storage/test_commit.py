"""The commit protocol in one process: identity, resumption, other writers. For errors see test_failing_calls.py."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import numpy as np
import pytest
import storage_cases as cases
from warm_process import WarmProcess, wait_for_all

import storage.writer
from storage.commit.records import CommitRecord, Seal
from storage.errors import (
    CorruptionError,
    IdentityError,
    NumericsError,
    StorageUnavailableError,
    UsageError,
)
from storage.files import open_files
from storage.files.local import LocalFiles
from storage.plan import HeldoutRule, TargetSpec
from storage.reader import StoreReader
from storage.writer import StoreWriter


def test_a_store_is_sealed_and_a_second_run_changes_nothing(fresh):
    cases.write_store(fresh)
    before = cases.tree(fresh)
    assert {"plan.json", "remap", "sealed.json", "commits/000000.json", "tokenizer/tokenizer.json.xz"} <= before.keys()
    writer = cases.write_store(fresh)
    assert writer.missing() == []
    assert writer.committed() == frozenset(range(5))
    assert writer.seal() == StoreReader(fresh).digest
    assert cases.tree(fresh) == before
    assert open_files(fresh).entries("tmp") == set()


def test_an_interrupted_store_goes_on_to_the_same_bytes(fresh, sealed):
    cases.write_store(fresh, shards=[1, 3])
    writer = cases.open_writer(fresh, cases.make_plan())
    assert [shard.index for shard in writer.missing()] == [0, 2, 4]
    assert writer.seal() is None
    cases.write_store(fresh)
    assert cases.tree(fresh) == cases.tree(sealed)


def test_recorded_fields_may_differ(fresh):
    cases.write_store(fresh)
    writer = cases.open_writer(fresh, cases.make_plan(recorded={"workers": 8, "host": "b"}))
    assert writer.plan.recorded == {"workers": 1}


def test_another_plan_is_refused_with_every_difference(fresh):
    cases.write_store(fresh)
    before = cases.tree(fresh)
    other = cases.make_plan(
        target=TargetSpec(kind="hybrid", k=7, draws=4), teacher={"name": "other"}, documents_per_shard=5
    )
    with pytest.raises(IdentityError) as caught:
        cases.open_writer(fresh, other)
    assert caught.value.exit_code == 3
    for line in ("target.k: 6 -> 7", "teacher.name: 'synthetic' -> 'other'", "documents_per_shard: 6 -> 5"):
        assert line in str(caught.value)
    assert "teacher.files: " in str(caught.value)
    assert cases.tree(fresh) == before


def test_a_directory_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        cases.open_writer(tmp_path, cases.make_plan())
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="file"):
        cases.open_writer(tmp_path / "thesis.tex", cases.make_plan())


def test_leftovers_of_another_plan_are_refused(fresh):
    cases.open_writer(fresh, cases.make_plan())
    cases.drop(fresh, "plan.json")
    with pytest.raises(UsageError, match="cut off"):
        cases.open_writer(fresh, cases.make_plan(vocab_size=200))
    cases.open_writer(fresh, cases.make_plan(documents=9))


def test_a_store_that_lost_its_plan_is_not_overwritten(fresh):
    cases.write_store(fresh)
    cases.drop(fresh, "plan.json")
    with pytest.raises(UsageError, match="commit records"):
        cases.open_writer(fresh, cases.make_plan())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"remap_sha256": "00"}, "remap_sha256"),
        ({"vocab_size": 299}, "the remap of 300 ids is not the one that the plan names"),
        ({"tokenizer": {"files": {"tokenizer.json": "00"}}}, "tokenizer.files"),
        ({"target": TargetSpec(kind="topk", k=4, temperatures=(2.0, 1.5))}, "temperatures must rise"),
        ({"target": TargetSpec(kind="sampled", k=4, draws=4)}, "kind sampled has no exact head"),
    ],
)
def test_arguments_that_contradict_the_plan_are_refused(tmp_path, change, told):
    plan = replace(cases.make_plan(), **change)
    with pytest.raises(UsageError, match=told):
        StoreWriter.create(tmp_path / "s", plan, remap=cases.make_remap(), tokenizer_files=cases.TOKENIZER_FILES)
    assert not (tmp_path / "s").exists()


def test_tokenizer_names_cannot_leave_the_store(tmp_path):
    plan = cases.make_plan(tokenizer={"files": {"../evil": cases.hashlib.sha256(b"x").hexdigest()}})
    with pytest.raises(UsageError, match="plain"):
        StoreWriter.create(tmp_path / "s", plan, remap=cases.make_remap(), tokenizer_files={"../evil": b"x"})
    assert not (tmp_path / "evil.xz").exists()


def looks_per_shard(path, monkeypatch, *, shards):
    """Write a store and count what is committed after each shard; return how many files are looked at each time."""
    plan = cases.make_plan(documents=6 * shards, heldout=HeldoutRule())
    writer, looks, found = cases.open_writer(path, plan), [], []
    with monkeypatch.context() as patch:
        for name in ("read_stamped", "exists", "entries"):
            real = getattr(LocalFiles, name)
            patch.setattr(
                LocalFiles,
                name,
                lambda self, entry, real=real, **bound: looks.append(entry) or real(self, entry, **bound),
            )
        for number, shard in enumerate(writer.missing()):
            looks.clear()
            writer.commit(shard, cases.make_batch(plan, shard))
            assert writer.count_committed() == number + 1
            found.append(len(looks))
    return found


def test_counting_what_is_committed_costs_the_same_in_stores_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.writer, "LOOKS", 3)
    few = looks_per_shard(tmp_path / "few", monkeypatch, shards=5)
    many = looks_per_shard(tmp_path / "many", monkeypatch, shards=20)
    assert set(many[:-3]) == {few[0]}
    assert many[-3:] == few[-3:]


def test_shards_of_another_process_are_counted_a_few_at_a_time(fresh, monkeypatch):
    mine = cases.open_writer(fresh, cases.make_plan())
    cases.write_store(fresh, shards=[0, 1, 3, 4])
    monkeypatch.setattr(storage.writer, "LOOKS", 2)
    assert [mine.count_committed() for _ in range(4)] == [2, 3, 4, 4]
    cases.write_store(fresh, shards=[2])
    assert mine.count_committed() == 5
    assert mine.missing() == []


def test_invalid_batches_are_refused_and_not_committed(fresh):
    plan = cases.make_plan()
    writer = cases.open_writer(fresh, plan)
    shard = writer.missing()[0]
    batch = cases.make_batch(plan, shard)
    entropy = batch.entropy.copy()
    entropy[3] = np.nan
    with pytest.raises(NumericsError, match="document"):
        writer.commit(shard, replace(batch, entropy=entropy))
    assert writer.committed() == frozenset()
    assert open_files(fresh).entries("shards") == set()


def test_a_store_that_another_process_makes_meanwhile_is_taken(fresh, sealed, monkeypatch):
    """It had looked for the plan before the other one made the whole store."""
    look = storage.writer.read_plan

    def look_then_sleep(files):
        monkeypatch.setattr(storage.writer, "read_plan", look)
        found = look(files)
        cases.write_store(fresh)
        return found

    monkeypatch.setattr(storage.writer, "read_plan", look_then_sleep)
    assert cases.open_writer(fresh, cases.make_plan()).missing() == []
    assert cases.tree(fresh) == cases.tree(sealed)


def test_a_seal_needs_its_shards(fresh):
    """A repair that was cut off has moved a directory and the seal away, and not yet the record."""
    cases.write_store(fresh)
    open_files(fresh).quarantine(cases.find(fresh, "shards/000001-*/entropy/c/0").removesuffix("/entropy/c/0"))
    cases.drop(fresh, "sealed.json")
    with pytest.raises(CorruptionError, match=r"shard 1 .* its directory is missing"):
        cases.write_store(fresh)
    assert "sealed.json" not in cases.tree(fresh)


def test_what_another_process_committed_stays(fresh, caplog):
    """A teacher that is not deterministic: the first commit wins, mine is discarded with a warning."""
    plan = cases.make_plan()
    writer = cases.open_writer(fresh, plan)
    shard = plan.shards()[0]
    first = writer.commit(shard, cases.make_batch(plan, shard))
    before = cases.tree(fresh)
    with caplog.at_level(logging.WARNING, logger="topk_distill.storage"):
        second = writer.commit(shard, cases.make_batch(plan, shard, longest=10))
    assert second == first
    assert "not deterministic" in caplog.text
    assert cases.tree(fresh) == before


def test_a_process_that_wakes_up_late_changes_nothing(fresh, caplog, monkeypatch):
    """It has looked for the record before the other one committed."""
    plan = cases.make_plan()
    writer, late = (cases.open_writer(fresh, plan) for _ in range(2))
    shard = plan.shards()[0]
    look = late._manifest.record

    def look_then_sleep(spec):
        monkeypatch.setattr(late._manifest, "record", look)
        found = look(spec)
        writer.commit(shard, cases.make_batch(plan, shard))
        return found

    monkeypatch.setattr(late._manifest, "record", look_then_sleep)
    kept = late.commit(shard, cases.make_batch(plan, shard, longest=10))
    assert kept == writer._records[0]
    assert "not deterministic" in caplog.text
    assert open_files(fresh).entries("shards") == {kept.directory}


def test_a_directory_that_is_there_whole_is_recognised(fresh, sealed):
    """A kill between rename and commit leaves it."""
    cases.write_store(fresh)
    cases.drop(fresh, "sealed.json")
    cases.drop(fresh, "commits/000002.json")
    cases.write_store(fresh)
    assert cases.tree(fresh) == cases.tree(sealed)
    assert not open_files(fresh).exists("quarantine")


@pytest.mark.parametrize("damage", ["flip", "missing", "foreign", "emptied"])
def test_a_directory_that_is_there_damaged_is_moved_away(fresh, sealed, damage, caplog):
    cases.write_store(fresh)
    for name in ("sealed.json", "commits/000002.json"):
        cases.drop(fresh, name)
    victim = cases.find(fresh, "shards/000002-*/head_ids/c/0/0")
    if damage == "flip":
        data = cases.contents(fresh)[victim]
        cases.put(fresh, victim, bytes([data[0] ^ 1]) + data[1:])
    elif damage == "missing":
        cases.drop(fresh, victim)
    elif damage == "emptied":
        cases.put(fresh, victim, b"")
    else:
        cases.put(fresh, f"{victim}-foreign", b"x")
    cases.write_store(fresh)
    assert cases.tree(fresh) == cases.tree(sealed)
    assert "moved to quarantine" in caplog.text


def test_a_target_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageUnavailableError, match="Not a directory"):
        cases.open_writer(tmp_path / "file" / "store", cases.make_plan())


def test_two_processes_at_once(tmp_path, sealed):
    workers = [WarmProcess(cases.write_store, tmp_path / "store") for _ in range(2)]
    assert [worker.returncode for worker in wait_for_all(workers)] == [0, 0]
    assert cases.tree(tmp_path / "store") == cases.tree(sealed)


def test_records_and_seals_are_read_only_in_the_form_in_which_they_are_written(sealed):
    for kind, name in ((CommitRecord, "commits/000001.json"), (Seal, "sealed.json")):
        data = (sealed / name).read_bytes()
        assert kind.from_json(data).to_json() == data
        for bit in range(0, len(data) * 8, 5):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(ValueError):
                kind.from_json(bytes(flipped))
        for other in (b"", b"{}", b"[]", b"null", data + b" ", data[:-1]):
            with pytest.raises(ValueError):
                kind.from_json(other)


def test_a_plan_from_the_future_is_a_usage_error(tmp_path):
    path = tmp_path / "store"
    cases.write_store(path)
    newer = replace(cases.make_plan(), format_version=2)
    (path / "plan.json").write_bytes(newer.to_json())
    with pytest.raises(UsageError, match="format version 2"):
        StoreReader(path)
    with pytest.raises(UsageError, match="format version 2"):
        cases.open_writer(path, cases.make_plan())


def test_a_damaged_plan_does_not_open(tmp_path):
    path = tmp_path / "store"
    cases.write_store(path)
    data = (path / "plan.json").read_bytes()
    for bit in range(0, len(data) * 8, 11):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / "plan.json").write_bytes(flipped)
        with pytest.raises(CorruptionError, match=r"plan\.json"):
            StoreReader(path)


def test_every_file_and_directory_is_synced_before_what_builds_on_it(tmp_path, monkeypatch):
    """Content before its name, and the directory of a name before the next name: a power loss takes back no step."""
    events: list[tuple[str, int]] = []

    def watched(name, of):
        real = getattr(os, name)

        def call(*arguments, **options):
            try:
                return real(*arguments, **options)
            finally:
                events.append((name, of(*arguments, **options)))

        monkeypatch.setattr(os, name, call)

    def inode(path):
        return os.stat(path).st_ino

    watched("fsync", lambda descriptor: os.fstat(descriptor).st_ino)
    for name in ("link", "rename"):
        watched(name, lambda source, target, *, dst_dir_fd, **_: os.stat(target, dir_fd=dst_dir_fd).st_ino)
    store = tmp_path / "store"
    cases.write_store(store, shards=[0])
    monkeypatch.undo()
    kept = [path for path in (store, *store.rglob("*")) if "tmp" not in path.relative_to(store).parts]
    for path in kept:
        assert ("fsync", inode(path)) in events, f"{path} was never synced"
    named = [place for place, (call, _) in enumerate(events) if call != "fsync"]
    assert len(named) == 6, "remap, two tokenizer files, plan, shard and record"
    paths = {inode(path): path for path in kept}
    for place, end in zip(named, [*named[1:], len(events)], strict=True):
        path = paths[events[place][1]]
        inside = [path, *path.rglob("*")] if path.is_dir() else [path]
        assert {inode(part) for part in inside} <= {number for call, number in events[:place] if call == "fsync"}, (
            f"{path}: content first"
        )
        assert ("fsync", inode(path.parent)) in events[place:end], f"{path}: its directory was not synced"
