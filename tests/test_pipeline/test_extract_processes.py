"""Several processes, and stores that are finished or damaged: `extract` never does work twice or vouches for damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

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
