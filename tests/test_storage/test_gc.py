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
from repair_crashes import flip
from seam import Counter, FailAt, watched

from storage.commit.aside import set_aside
from storage.commit.claims import Claim, Claims
from storage.commit.records import CommitRecord, record_name
from storage.errors import CorruptionError, StorageUnavailableError, UsageError
from storage.files.local import LocalFiles
from storage.tools import gc
from storage.tools.gc import collect_garbage
from storage.tools.repair import repair
from storage.tools.verify import verify

DEAD = 99999999999999999999  # no system has a process of this number


@pytest.fixture
def store(tmp_path, sealed) -> Path:
    """A sealed store with garbage of every sort."""
    path = tmp_path / "store"
    shutil.copytree(sealed, path)
    orphan = path / "shards" / f"000002-{'0' * 16}"
    shutil.copytree(next((path / "shards").glob("000002-*")), orphan)
    (path / "tmp" / "77-abc" / "tokens").mkdir(parents=True)
    (path / "tmp" / "77-abc" / "tokens" / "c").write_bytes(b"x" * 100)
    (path / "tmp" / "78-def").write_bytes(b"y" * 10)
    (path / "tmp" / "79-empty").mkdir()
    (path / "tmp" / "claim-000003").write_bytes(Claim(host=socket.gethostname(), process=DEAD).to_bytes())
    (path / "quarantine").mkdir()
    (path / "quarantine" / "commits-000001.json").write_bytes(b"old")
    return path


def test_it_shows_first_and_then_removes_what_nothing_names(store, sealed):
    whole = {file: file.read_bytes() for file in sorted(store.rglob("*")) if file.is_file()}
    shown = collect_garbage(store, apply=False)
    assert {file: file.read_bytes() for file in sorted(store.rglob("*")) if file.is_file()} == whole
    assert [item.name for item in shown] == [
        "tmp/77-abc",
        "tmp/78-def",
        "tmp/79-empty",
        "tmp/claim-000003",
        "quarantine/commits-000001.json",
        f"shards/000002-{'0' * 16}",
    ]
    assert [item.bytes for item in shown[:3]] == [100, 10, 0]
    assert collect_garbage(store, apply=True) == shown
    assert cases.tree(store) == cases.tree(sealed)
    assert not [*(store / "tmp").iterdir(), *(store / "quarantine").iterdir()]
    assert collect_garbage(store, apply=True) == []
    assert verify(store).problems == []


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


def test_with_damage_nothing_is_removed(store):
    (store / "commits" / "000002.json").unlink()
    before = cases.tree(store)
    for apply in (False, True):
        with pytest.raises(CorruptionError, match=r"000002\.json"):
            collect_garbage(store, apply=apply)
    assert cases.tree(store) == before
    assert (store / "tmp" / "78-def").exists()


def test_quarantine_stays_until_the_repaired_store_is_whole_again(tmp_path, sealed):
    path = tmp_path / "store"
    shutil.copytree(sealed, path)
    victim = next((path / "shards").glob("000001-*/logprob/c/0/0"))
    victim.write_bytes(b"x")
    repair(path, apply=True)
    assert [item.name for item in collect_garbage(path, apply=True) if item.name.startswith("quarantine/")] == []
    cases.write_store(path)
    removed = [item.name for item in collect_garbage(path, apply=True)]
    assert "quarantine/commits-000001.json" in removed
    assert cases.tree(path) == cases.tree(sealed)


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


def test_a_worker_of_another_machine_forbids_it(store):
    note = store / "tmp" / "claim-000001"
    note.write_bytes(Claim(host="node17", process=42).to_bytes())
    before = cases.tree(store)
    with pytest.raises(UsageError, match="process 42 of node17 works on shard 1") as refusal:
        collect_garbage(store, apply=True)
    assert "remove tmp/claim-000001 by hand" in str(refusal.value.fix)
    assert cases.tree(store) == before
    assert [item.reason for item in collect_garbage(store, apply=False) if item.name == "tmp/claim-000001"] == [
        "a claim: process 42 of node17 works on shard 1, or was cut off there"
    ]
    assert any("a claim: process 42 of node17" in line for line in verify(store).warnings)
    note.unlink()
    assert collect_garbage(store, apply=True)


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


def test_a_record_that_is_damaged_after_the_look_is_told_and_its_directory_stays(store, monkeypatch):
    orphan, find = store / "shards" / f"000002-{'0' * 16}", gc._find

    def found_before_the_damage(manifest):
        found = find(manifest)
        (store / "commits" / "000002.json").write_bytes(b"{}")
        return found

    monkeypatch.setattr(gc, "_find", found_before_the_damage)
    with pytest.raises(CorruptionError, match="its commit record"):
        collect_garbage(store, apply=True)
    assert orphan.exists()


def test_what_was_set_aside_and_is_committed_after_the_look_comes_back(store, monkeypatch):
    """A collection was killed; the worker that had found the directory goes on beside the next collection."""
    files, record, find = LocalFiles(store), store / "commits" / "000001.json", gc._find
    path = CommitRecord.from_json(record.read_bytes()).path
    (store / "sealed.json").unlink()
    record.rename(store.parent / "record")
    aside = set_aside(files, path)

    def found_before_the_commit(manifest):
        found = find(manifest)
        assert aside in [item.name for item in found]
        (store.parent / "record").rename(record)
        return found

    monkeypatch.setattr(gc, "_find", found_before_the_commit)
    assert aside not in [item.name for item in collect_garbage(store, apply=True)]
    assert (store / path).exists()
    assert verify(store).problems == []


def test_what_cannot_be_removed_is_not_listed_as_removed(store):
    with watched(FailAt("rmtree", 3, errno.EIO)), pytest.raises(StorageUnavailableError):
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
        shutil.copytree(store / "shards" / f"000002-{'0' * 16}", store / "shards" / f"000003-{number:016x}")
    read, real = list[str](), LocalFiles.read

    def noted(self, name):
        read.append(name)
        return real(self, name)

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

    def another_begins(root):
        if len(workers) == 1:
            workers[0].close()
            refuse(root)
            workers.append(worker())
        else:
            refuse(root)

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


def test_what_is_put_back_is_read_before_it_is_trusted(store):
    """Someone flipped a bit of it meanwhile; its size is as before."""
    record = CommitRecord.from_json((store / "commits" / "000001.json").read_bytes())
    aside = set_aside(LocalFiles(store), record.path)
    flip(store / aside / "entropy/c/0")
    actions = repair(store, apply=True)
    assert [action.name for action in actions] == [aside, record.path, "sealed.json", "commits/000001.json"]
    assert [action.moved_to.split("/")[0] for action in actions] == ["shards", *["quarantine"] * 3]
    cases.write_store(store)
    assert verify(store).problems == []


def test_what_was_set_aside_and_removed_in_part_is_not_put_back(store):
    record = CommitRecord.from_json((store / "commits" / "000001.json").read_bytes())
    aside = set_aside(LocalFiles(store), record.path)
    (store / aside / "entropy/c/0").unlink()
    assert verify(store).problems[0].message == "the directory is missing"
    assert aside not in [action.name for action in repair(store, apply=False)]


def test_no_store(tmp_path):
    with pytest.raises(UsageError):
        collect_garbage(tmp_path, apply=True)
