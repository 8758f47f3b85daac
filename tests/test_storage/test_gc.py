"""Garbage collection: everything that nothing refers to goes, nothing else does."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import storage_cases as cases

from storage import gc
from storage.claims import Claim
from storage.errors import CorruptionError, UsageError
from storage.gc import collect_garbage
from storage.repair import repair
from storage.verify import verify

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
        f"shards/000002-{'0' * 16}",
        "tmp/77-abc",
        "tmp/78-def",
        "tmp/79-empty",
        "tmp/claim-000003",
        "quarantine/commits-000001.json",
    ]
    assert [item.bytes for item in shown[1:4]] == [100, 10, 0]
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
    assert collect_garbage(tmp_path / "store", apply=True) == []
    assert verify(tmp_path / "store").problems == []


def test_no_store(tmp_path):
    with pytest.raises(UsageError):
        collect_garbage(tmp_path, apply=True)
