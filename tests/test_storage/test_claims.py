"""Claims keep workers apart and block nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import storage_cases as cases

from storage.commit.claims import Claim, Claims
from storage.files import open_files


@pytest.fixture
def store(fresh):
    cases.open_writer(fresh, cases.make_plan())
    return fresh


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def claim(store, shard, **fields):
    cases.put(store, f"tmp/claim-{shard:06d}", Claim(**fields).to_bytes())


def notes(store):
    return open_files(store).entries("tmp")


def turns(store, committed=frozenset()):
    return Claims(store).turns(cases.make_plan().shards(), lambda spec: spec.index in committed)


def order(store):
    return [spec.index for spec in turns(store)]


def test_alone_it_is_the_order_given_and_nothing_is_left(store):
    assert order(store) == [0, 1, 2, 3, 4]
    assert notes(store) == set()


def test_two_workers_share_the_shards(store):
    done = set()
    workers = [turns(store, done) for _ in range(2)]
    taken = [[], []]
    for _ in range(2):
        working = [next(worker).index for worker in workers]
        for mine, shard in zip(taken, working, strict=True):
            mine.append(shard)
        done.update(working)
    assert taken == [[0, 2], [1, 3]]
    assert next(workers[0]).index == 4
    assert next(workers[1]).index == 4, "claimed, but nothing else is left"
    done.add(4)
    assert [list(worker) for worker in workers] == [[], []]


def test_a_shard_that_is_committed_between_the_look_and_the_claim_is_left_out(store):
    asked = []

    def is_committed(spec):
        asked.append(spec.index)
        return asked.count(spec.index) > 1

    assert list(Claims(store).turns(cases.make_plan().shards(), is_committed)) == []
    assert notes(store) == set()


def test_claims_of_other_machines_come_last(store):
    for shard in (0, 2):
        claim(store, shard, host="elsewhere", process=1)
    assert order(store) == [1, 3, 4, 0, 2]
    assert "claim-000000" in notes(store), "it is another's"


def test_a_claim_of_a_dead_process_of_this_machine_is_void(store):
    claim(store, 0, host=socket.gethostname(), process=dead_process())
    done = []
    for spec in Claims(store).turns(cases.make_plan().shards(), lambda spec: spec.index in done):
        done.append(spec.index)
    assert done == [0, 1, 2, 3, 4]
    assert notes(store) == set()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"host x", b"12", b"host 99999999999999999999"])
def test_a_claim_that_says_nothing_blocks_nothing(store, content):
    cases.put(store, "tmp/claim-000000", content)
    assert sorted(order(store)) == [0, 1, 2, 3, 4]


def test_a_worker_that_stops_early_takes_its_claim_away(store):
    worker = turns(store)
    assert next(worker).index == 0
    assert list(Claims(store).in_work()) == ["tmp/claim-000000"]
    worker.close()
    assert notes(store) == set()


def test_who_may_be_at_work(store):
    mine = Claim.of_this_process()
    claim(store, 3, **asdict(mine))
    claim(store, 4, host="elsewhere", process=os.getpid())
    assert Claims(store).in_work() == {
        "tmp/claim-000003": (3, mine),
        "tmp/claim-000004": (4, Claim(host="elsewhere", process=os.getpid())),
    }


@pytest.mark.parametrize("field", ["started", "boot"])
def test_a_number_that_is_used_again_is_another_process(field):
    assert Claim.of_this_process().worker == "runs"
    assert replace(Claim.of_this_process(), **{field: "1"}).worker == "ended"


def test_own_number_without_a_start_and_another_container():
    assert Claim(host=socket.gethostname(), process=os.getpid()).worker == "ended"
    assert Claim.read(f"{socket.gethostname()} 0".encode()) is None
    assert replace(Claim.of_this_process(), namespace="pid:[1]").worker == "unknown"


def test_a_worker_beside_another_leaves_its_own_note(store):
    for shard in range(5):
        claim(store, shard, host="elsewhere", process=1)
    worker = turns(store)
    assert next(worker).index == 0
    assert Claims(store).in_work()["tmp/claim-000000-1"] == (0, Claim.of_this_process())
    worker.close()
    assert len(notes(store)) == 5


def test_claims_sync_nothing_and_ask_of_each_shard_once(store, monkeypatch):
    for shard in (0, 1):
        claim(store, shard, host="elsewhere", process=1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("synced"))
    asked = []
    worker = Claims(store).turns(cases.make_plan().shards(), lambda spec: asked.append(spec.index))
    assert [next(worker).index, next(worker).index] == [2, 3]
    assert asked.count(4) == 0
    worker.close()
