"""Garbage collection: everything that nothing refers to goes, nothing else does."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import storage_cases as cases
from seam import Counter, FailAt, watched

from storage.commit.aside import set_aside
from storage.commit.claims import Claim, Claims
from storage.commit.records import CommitRecord, record_name
from storage.errors import CorruptionError, StorageUnavailableError, UsageError
from storage.files import open_files
from storage.files.local import LocalFiles
from storage.tools import gc
from storage.tools.gc import collect_garbage
from storage.tools.repair import repair
from storage.tools.verify import verify

DEAD = 99999999999999999999  # no system has a process of this number


ORPHAN = f"shards/000002-{'0' * 16}"


def with_garbage(sealed: Path, store: cases.Store) -> cases.Store:
    """Copy a sealed store, with garbage of every sort."""
    cases.copy(sealed, store)
    for name, data in cases.contents(sealed).items():
        if name.startswith("shards/000002-"):
            cases.put(store, f"{ORPHAN}/{name.split('/', 2)[2]}", data)
    cases.put(store, "tmp/77-abc/tokens/c", b"x" * 100)
    cases.put(store, "tmp/78-def", b"y" * 10)
    if isinstance(store, Path):
        (store / "tmp" / "79-empty").mkdir()
    cases.put(store, "tmp/claim-000003", Claim(host=socket.gethostname(), process=DEAD).to_bytes())
    cases.put(store, "quarantine/commits-000001.json", b"old")
    return store


@pytest.fixture
def store(tmp_path, sealed) -> Path:
    """One on disk."""
    return with_garbage(sealed, tmp_path / "store")


@pytest.fixture
def any_store(fresh, sealed) -> cases.Store:
    """One on disk, or in memory."""
    return with_garbage(sealed, fresh)


def test_it_shows_first_and_then_removes_what_nothing_names(any_store, sealed):
    on_disk = isinstance(any_store, Path)
    whole = cases.contents(any_store)
    shown = collect_garbage(any_store, apply=False)
    assert cases.contents(any_store) == whole
    assert [item.name for item in shown] == [
        "tmp/77-abc",
        "tmp/78-def",
        *(["tmp/79-empty"] if on_disk else []),
        "tmp/claim-000003",
        "quarantine/commits-000001.json",
        ORPHAN,
    ]
    assert [item.bytes for item in shown[:2]] == [100, 10]
    assert not on_disk or shown[2].bytes == 0
    assert collect_garbage(any_store, apply=True) == shown
    assert cases.tree(any_store) == cases.tree(sealed)
    files = open_files(any_store)
    assert files.entries("tmp") | files.entries("quarantine") == set()
    assert collect_garbage(any_store, apply=True) == []
    assert verify(any_store).problems == []


def test_files_that_are_not_of_a_store_stay(store):
    (store / "shards" / "notes.txt").write_text("mine")
    (store / "thesis.tex").write_text("mine")
    collect_garbage(store, apply=True)
    assert (store / "shards" / "notes.txt").read_text() == "mine"
    assert (store / "thesis.tex").read_text() == "mine"


def test_a_link_in_tmp_is_removed_and_not_followed(store, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").write_text("mine")
    (store / "tmp" / "80-link").symlink_to(tmp_path / "precious")
    collect_garbage(store, apply=True)
    assert not os.path.lexists(store / "tmp" / "80-link")
    assert (tmp_path / "precious" / "data").read_text() == "mine"


def test_with_damage_nothing_is_removed(any_store):
    cases.drop(any_store, "commits/000002.json")
    before = cases.tree(any_store)
    for apply in (False, True):
        with pytest.raises(CorruptionError, match=r"000002\.json"):
            collect_garbage(any_store, apply=apply)
    assert cases.tree(any_store) == before
    assert "tmp/78-def" in cases.contents(any_store)


def test_quarantine_stays_until_the_repaired_store_is_whole_again(fresh, sealed):
    cases.copy(sealed, fresh)
    cases.put(fresh, cases.find(fresh, "shards/000001-*/logprob/c/0/0"), b"x")
    repair(fresh, apply=True)
    assert [item.name for item in collect_garbage(fresh, apply=True) if item.name.startswith("quarantine/")] == []
    cases.write_store(fresh)
    removed = [item.name for item in collect_garbage(fresh, apply=True)]
    assert "quarantine/commits-000001.json" in removed
    assert cases.tree(fresh) == cases.tree(sealed)


def test_a_worker_of_this_machine_forbids_it(store):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        claim = Claim(host=socket.gethostname(), process=worker.pid)
        (store / "tmp" / "claim-000001").write_bytes(claim.to_bytes())
        assert collect_garbage(store, apply=False)
        with pytest.raises(UsageError, match=f"process {worker.pid} of this machine works on shard 1"):
            collect_garbage(store, apply=True)
        assert (store / "tmp" / "78-def").exists()
        worker.communicate(b"\n")
    collect_garbage(store, apply=True)
    assert not (store / "tmp" / "78-def").exists()


def test_a_worker_of_another_machine_forbids_it(any_store):
    cases.put(any_store, "tmp/claim-000001", Claim(host="node17", process=42).to_bytes())
    before = cases.tree(any_store)
    with pytest.raises(UsageError, match="process 42 of node17 works on shard 1") as refusal:
        collect_garbage(any_store, apply=True)
    assert "remove tmp/claim-000001 by hand" in str(refusal.value.fix)
    assert refusal.value.where == f"{any_store}/tmp/claim-000001"
    assert cases.tree(any_store) == before
    assert [item.reason for item in collect_garbage(any_store, apply=False) if item.name == "tmp/claim-000001"] == [
        "a claim: process 42 of node17 works on shard 1, or was cut off there"
    ]
    assert any("a claim: process 42 of node17" in line for line in verify(any_store).warnings)
    cases.drop(any_store, "tmp/claim-000001")
    assert collect_garbage(any_store, apply=True)


def test_what_is_committed_after_the_look_stays(tmp_path, monkeypatch):
    """A worker died before it linked the record; another adopts the directory while garbage is collected."""
    writer = cases.open_writer(tmp_path / "store", cases.make_plan())
    spec = writer.missing()[0]
    writer.commit(spec, cases.make_batch(writer.plan, spec))
    (tmp_path / "store" / "commits" / "000000.json").unlink()
    find = gc._find

    def found_before_the_commit(files):
        found = find(files)
        late = cases.open_writer(tmp_path / "store", cases.make_plan())
        late.commit(spec, cases.make_batch(late.plan, spec))
        return found

    monkeypatch.setattr(gc, "_find", found_before_the_commit)
    calls = Counter()
    with watched(calls):
        assert collect_garbage(tmp_path / "store", apply=True) == []
    moved = [path for function, path in calls.names if function == "rename" and "/shards/" in path]
    assert moved == [], "readers would miss it for a moment"
    assert verify(tmp_path / "store").problems == []


def test_a_record_that_is_damaged_after_the_look_is_told_and_its_directory_stays(any_store, monkeypatch):
    find = gc._find

    def found_before_the_damage(manifest):
        found = find(manifest)
        cases.put(any_store, "commits/000002.json", b"{}")
        return found

    monkeypatch.setattr(gc, "_find", found_before_the_damage)
    with pytest.raises(CorruptionError, match="its commit record"):
        collect_garbage(any_store, apply=True)
    assert open_files(any_store).exists(ORPHAN)


def test_what_was_set_aside_and_is_committed_after_the_look_comes_back(any_store, monkeypatch):
    """A collection was killed; the worker that had found the directory goes on beside the next collection."""
    files, find = open_files(any_store), gc._find
    record = files.read("commits/000001.json")
    path = CommitRecord.from_json(record).path
    for name in ("sealed.json", "commits/000001.json"):
        cases.drop(any_store, name)
    aside = set_aside(files, path)

    def found_before_the_commit(manifest):
        found = find(manifest)
        assert aside in [item.name for item in found]
        cases.put(any_store, "commits/000001.json", record)
        return found

    monkeypatch.setattr(gc, "_find", found_before_the_commit)
    assert aside not in [item.name for item in collect_garbage(any_store, apply=True)]
    assert files.exists(path)
    assert verify(any_store).problems == []


def test_what_cannot_be_removed_is_not_listed_as_removed(store):
    with watched(FailAt("rmtree", 3, errno.EIO)), pytest.raises(StorageUnavailableError, match="Input/output"):
        collect_garbage(store, apply=True)
    (left,) = (store / "tmp").iterdir()
    assert left.name.startswith("discard-000002-")
    assert [item.name for item in collect_garbage(store, apply=True)] == [f"tmp/{left.name}"]
    assert not list((store / "tmp").iterdir())


def test_a_copy_of_what_was_written_anew_is_removed(store):
    """A collection was killed, and the same directory has been computed again since."""
    path = next((store / "shards").glob("000001-*"))
    shutil.copytree(path, store / "tmp" / f"discard-{path.name}.01234567")
    assert f"tmp/discard-{path.name}.01234567" in [item.name for item in collect_garbage(store, apply=True)]
    assert not list((store / "tmp").iterdir())
    assert verify(store).problems == []


def test_leftovers_are_not_read_and_claims_a_few_times(store, monkeypatch):
    """There may be many, and large ones."""
    for number in range(20):
        (store / "tmp" / f"90-{number:012x}").write_bytes(b"left")
        shutil.copytree(store / ORPHAN, store / "shards" / f"000003-{number:016x}")
    read, real = list[str](), LocalFiles.read

    def noted(self, name, **bound):
        read.append(name)
        return real(self, name, **bound)

    monkeypatch.setattr(LocalFiles, "read", noted)
    assert len(collect_garbage(store, apply=True)) == 6 + 2 * 20
    verified = ["tmp/claim-000003"]  # it tells of strangers
    assert [name for name in read if name.startswith(("tmp", "quarantine", "shards"))] == verified * 4


def test_the_claim_of_a_worker_that_begins_after_the_look_stays(tmp_path, monkeypatch):
    """It takes the name of one that gave up just then, finds the directory that a dead one wrote, and commits it."""
    store = tmp_path / "store"
    cases.write_store(store)
    (store / "sealed.json").unlink()
    files, spec = LocalFiles(store), cases.make_plan().shards()[1]
    record = files.read(record_name(spec.index))
    files.remove(record_name(spec.index))

    def worker():
        turns = Claims(store).turns([spec], lambda shard: files.exists(record_name(shard.index)))
        assert next(turns) == spec
        return turns

    workers, refuse = [worker()], gc._refuse_workers

    def another_begins(place):
        if len(workers) == 1:
            workers[0].close()
            refuse(place)
            workers.append(worker())
        else:
            refuse(place)

    monkeypatch.setattr(gc, "_refuse_workers", another_begins)
    with pytest.raises(UsageError, match="works on shard 1"):
        collect_garbage(store, apply=True)
    assert files.create(record_name(spec.index), record)
    workers[1].close()
    assert verify(store).problems == []


def test_a_collection_killed_while_a_committed_directory_is_out_of_sight(memory, workers):
    """A worker that has found it links the record after that. The directory is not lost: a repair puts it back."""
    path, reference = memory / "store", memory / "reference"
    for each in (path, reference):
        assert workers.run(each, shards=2).code == 0
    (path / "sealed.json").unlink()
    record = (path / "commits/000000.json").rename(memory / "record")
    left = next((path / "shards").glob("000000-*"))
    assert workers.run(path, collect=True, signal_at=[1, signal.SIGKILL, "rmtree"]).code == -signal.SIGKILL
    record.rename(path / "commits/000000.json")
    assert workers.run(path, shards=2).code == CorruptionError.exit_code, "it cannot seal the store"
    (aside,) = (path / "tmp").glob("discard-*")
    name = f"tmp/{aside.name}"
    report = verify(path)
    assert [problem.name for problem in report.problems] == [f"shards/{left.name}"]
    assert f"left it in {name}; `pipeline repair` puts it back" in report.problems[0].message
    assert not [line for line in report.warnings if name in line]
    with pytest.raises(CorruptionError, match="pipeline repair"):
        collect_garbage(path, apply=True)
    (planned,) = repair(path, apply=False)
    assert (planned.name, planned.goes_to, planned.moved_to) == (name, "shards", None)
    (done,) = repair(path, apply=True)
    assert done.moved_to == f"shards/{left.name}"
    assert verify(path).problems == []
    assert repair(path, apply=True) == []
    assert workers.run(path, shards=2).code == 0
    assert cases.tree(path) == cases.tree(reference)
    assert not (path / "quarantine").exists()


def test_what_is_put_back_is_read_before_it_is_trusted(any_store):
    """Someone flipped a bit of it meanwhile; its size is as before."""
    files = open_files(any_store)
    record = CommitRecord.from_json(files.read("commits/000001.json"))
    aside = set_aside(files, record.path)
    data = files.read(f"{aside}/entropy/c/0")
    cases.put(any_store, f"{aside}/entropy/c/0", data[:-1] + bytes([data[-1] ^ 1]))
    actions = repair(any_store, apply=True)
    assert [action.name for action in actions] == [aside, record.path, "sealed.json", "commits/000001.json"]
    assert [action.moved_to.split("/")[0] for action in actions] == ["shards", *["quarantine"] * 3]
    cases.write_store(any_store)
    assert verify(any_store).problems == []


def test_what_was_set_aside_and_removed_in_part_is_not_put_back(any_store):
    record = CommitRecord.from_json(cases.contents(any_store)["commits/000001.json"])
    aside = set_aside(open_files(any_store), record.path)
    cases.drop(any_store, f"{aside}/entropy/c/0")
    assert verify(any_store).problems[0].message == "the directory is missing"
    assert aside not in [action.name for action in repair(any_store, apply=False)]


def test_no_store(tmp_path):
    with pytest.raises(UsageError, match="no store") as caught:
        collect_garbage(tmp_path, apply=True)
    assert caught.value.where == str(tmp_path)
