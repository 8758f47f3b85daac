"""Several processes, and stores that are finished or damaged: `extract` never does work twice or vouches for damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.extract import ExtractConfig
from pipeline.extract import ExtractSummary, Progress, ShardDone, Started, extract
from storage.errors import CorruptionError


def config_for(store: Path, tiny_extraction: dict[str, Any]) -> ExtractConfig:
    return ExtractConfig.model_validate({**tiny_extraction, "store": store})


def test_a_shard_that_another_process_commits_is_passed_over(tmp_path: Path, tiny_extraction: dict[str, Any]) -> None:
    config = config_for(tmp_path / "store", tiny_extraction)
    mine = extract(config)
    first = next(event for event in mine if isinstance(event, ShardDone))
    others = [event.shard for event in extract(config) if isinstance(event, ShardDone)]
    rest = list(mine)
    assert first.shard not in others
    assert not [event for event in rest if isinstance(event, ShardDone | Progress)]
    assert isinstance(rest[-1], ExtractSummary)
    assert rest[-1].digest is not None


def test_two_processes_share_the_work_and_a_dead_one_blocks_nothing(
    tmp_path: Path, tiny_extraction: dict[str, Any]
) -> None:
    config = tmp_path / "extract.yaml"
    content = {**tiny_extraction, "store": str(tmp_path / "store"), "documents_per_shard": 2}
    config.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "pipeline", "extract", str(config), "--json"]
    killed = {**os.environ, "TOPK_DISTILL_FAULT": "record-link:2"}
    assert subprocess.run(command, env=killed, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert list((tmp_path / "store" / "tmp").glob("claim-*"))

    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    done = []
    for worker in workers:
        events = [json.loads(line) for line in worker.communicate(timeout=120)[0].splitlines()]
        assert worker.returncode == 0
        done += [event["shard"] for event in events if event["event"] == "ShardDone"]
    shards = len(list((tmp_path / "store" / "commits").iterdir()))
    assert set(done) == set(range(1, shards)), "shard 0 was there before"
    assert len(done) <= len(set(done)) + 1, "only the last shard may be computed twice"
    assert not list((tmp_path / "store" / "tmp").glob("claim-*"))


def test_each_process_begins_at_its_own_place(
    tmp_path: Path, tiny_extraction: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        events = list(extract(config_for(tmp_path / f"store-{rank}", tiny_extraction)))
        order.append([event.shard for event in events if isinstance(event, ShardDone)])
    (started,) = (event for event in events if isinstance(event, Started))
    assert order[0] == sorted(order[0])
    assert order[1][0] == started.shards // 2 > 0
    assert sorted(order[1]) == order[0]


def test_a_damaged_store_is_not_called_complete(
    tmp_path: Path, tiny_extraction: dict[str, Any], tiny_store: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)
    victim = sorted(store.glob("shards/*/logprob/c/0*"))[0]
    victim = victim if victim.is_file() else next(path for path in victim.rglob("*") if path.is_file())
    victim.write_bytes(b"x")
    with pytest.raises(CorruptionError, match="logprob"):
        list(extract(config_for(store, tiny_extraction)))
