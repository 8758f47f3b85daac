"""Garbage collection beside a worker, one stopped anywhere while the other goes on: nothing committed is lost."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing, suppress
from typing import Any

import pytest
import storage_cases as cases
from power_loss import BATCH, small_plan
from seam import Call, Counter, watched

from storage.commit.claims import Claims
from storage.errors import StorageUnavailableError, UsageError
from storage.tools.gc import collect_garbage
from storage.tools.verify import verify

PLAN = small_plan(2)


def work(path, plan=PLAN):
    """What every worker does: create or open the store, take shard after shard, seal."""
    writer = cases.open_writer(path, plan)
    with closing(Claims(path).turns(writer.missing(), writer.is_committed)) as turns:
        for spec in turns:
            writer.commit(spec, cases.make_batch(plan, spec, **BATCH))
    return writer.seal()


class StopOnce:
    """A watcher that stops each named thread before its first call of a function whose arguments hold some words."""

    def __init__(self, **stops: tuple[str, str]) -> None:
        self.stops = stops
        self.there = {name: threading.Event() for name in stops}  # it has stopped, or ended without
        self.go_on = {name: threading.Event() for name in stops}

    def __call__(self, call: Call) -> Any:
        name = threading.current_thread().name
        function, words = self.stops.get(name, ("", ""))
        if call.function == function and words in f"{call.arguments} " and not self.there[name].is_set():
            self.there[name].set()
            assert self.go_on[name].wait(60)
        return call.proceed()

    def start(self, name: str, action: Callable[[], object]) -> Future[object]:
        """Run an action in a thread of this name; return when it has stopped or ended."""
        future: Future[object] = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except Exception as error:  # for the test to look at
                future.set_exception(error)
            self.there[name].set()

        threading.Thread(target=run, name=name).start()
        assert self.there[name].wait(60)
        return future

    def end(self, name: str, future: Future[object]) -> BaseException | None:
        """Let it go on; return the error that it ends with."""
        self.go_on[name].set()
        return future.exception(60)


@pytest.mark.parametrize("stop", [("mkdir", "/tmp"), ("link", "claim-000000"), ("link", "000000.json"), ("never", "")])
def test_a_collection_that_sleeps_removes_nothing_that_a_worker_has_found(memory, stop):
    """It is about to remove what a dead worker left. A worker finds that whole, and would only link its record."""
    path = memory / "store"
    writer = cases.open_writer(path, PLAN)
    spec = writer.missing()[0]
    left = writer.commit(spec, cases.make_batch(PLAN, spec, **BATCH)).path
    (path / "commits" / "000000.json").unlink()
    stops = StopOnce(collection=("rename", left), worker=stop)
    with watched(stops):
        collection = stops.start("collection", lambda: collect_garbage(path, apply=True))
        worker = stops.start("worker", lambda: work(path))
        refusal = stops.end("collection", collection)
        assert stops.end("worker", worker) is None
    assert refusal is None or "works on shard" in str(refusal)
    assert (refusal is None) == (stop != ("link", "000000.json"))
    assert verify(path).problems == []
    assert [item.name for item in (path / "shards").iterdir() if item.name.startswith("000000-")] == [left[7:]]


def test_beside_a_worker_that_creates_or_seals_nothing_is_lost(memory):
    """It has no claim then. What it is writing may go, and end it; the same run again ends in the same bytes."""
    work(memory / "reference")
    calls = Counter()
    with watched(calls):
        work(memory / "counted")
    links = [at for at, (function, _) in enumerate(calls.names) if function == "link"]
    collected = []
    for at in links:
        path, seen = memory / f"at {at}", itertools.count()

        def collect_once(call, at=at, path=path, seen=seen):
            if next(seen) == at:
                with suppress(UsageError):  # no store yet, or the worker has a claim
                    collected.extend(collect_garbage(path, apply=True))
            return call.proceed()

        with watched(collect_once), suppress(StorageUnavailableError):
            work(path)
        if (path / "plan.json").exists():
            assert verify(path).problems == []
        work(path)
        assert cases.tree(path) == cases.tree(memory / "reference")
    assert {item.reason for item in collected} == {"left by a run that was cut off"}
