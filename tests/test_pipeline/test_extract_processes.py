"""Several processes, and stores that are finished or damaged: `extract` never does work twice or vouches for damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from warm_process import WarmProcess, pipeline, wait_for_all

from pipeline.config.extract import ExtractConfig
from pipeline.extract import extract
from pipeline.extraction.events import ExtractSummary, Progress, ShardDone, Started
from pipeline.launchers import place_among_processes
from storage.errors import CorruptionError, UsageError
from storage.files.local import LocalFiles


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


def test_a_limit_counts_the_shards_of_this_run_alone(tmp_path: Path, tiny_extraction: dict[str, Any]) -> None:
    """Another process commits the shard in work: that is not one of the two, and its rows are not new."""
    settings = {**tiny_extraction, "batch_size": 2}
    whole, store = tmp_path / "whole", tmp_path / "store"
    list(extract(config_for(whole, settings)))
    mine = extract(config_for(store, settings), limit=2)
    first = next(event for event in mine if isinstance(event, Progress))
    (directory,) = whole.glob(f"shards/{first.shard:06d}-*")
    shutil.copytree(directory, store / "shards" / directory.name)
    shutil.copy(whole / "commits" / f"{first.shard:06d}.json", store / "commits")
    rest = list(mine)
    done = [event for event in rest if isinstance(event, ShardDone)]
    end = rest[-1]
    assert isinstance(end, ExtractSummary)
    assert [event.shard for event in done] == [1, 2]
    assert [event.committed for event in done] == [2, 3]
    assert (end.new_shards, end.committed, end.digest) == (2, 3, None)
    assert end.new_rows == sum(event.rows for event in done)
    assert end.new_tokens == sum(event.tokens for event in done)


def test_a_shard_costs_the_same_in_stores_of_any_size(
    tmp_path: Path, tiny_extraction: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the number of looks for records, but for one at each batch: whether another process has done the shard."""
    monkeypatch.setattr("storage.writer.LOOKS", 2)
    looks: list[str] = []

    def noted(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, entry, **bound: looks.append(entry) or real(self, entry, **bound)

    for name in ("read_stamped", "exists"):
        monkeypatch.setattr(LocalFiles, name, noted(getattr(LocalFiles, name)))
    found = []
    for size in (4, 1):
        looks.clear()
        batches, counts = 0, []
        for event in extract(config_for(tmp_path / str(size), {**tiny_extraction, "documents_per_shard": size})):
            batches += isinstance(event, Progress)
            if isinstance(event, ShardDone):
                counts.append(sum(entry.startswith("commits/") for entry in looks) - batches)
                batches, looks[:] = 0, []
        found.append(counts)
    few, many = found
    assert len(many) > 3 * len(few)
    assert set(few[1:-3]) == set(many[1:-3]) == {few[1]}


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

    done = []
    for worker in wait_for_all([WarmProcess(pipeline, "extract", config, "--json") for _ in range(2)]):
        events = [json.loads(line) for line in worker.stdout.splitlines()]
        assert worker.returncode == 0
        done += [event["shard"] for event in events if event["event"] == "ShardDone"]
    shards = len(list((tmp_path / "store" / "commits").iterdir()))
    assert set(done) == set(range(1, shards)), "shard 0 was there before"
    assert len(done) <= len(set(done)) + 1, "only the last shard may be computed twice"
    assert not list((tmp_path / "store" / "tmp").glob("claim-*"))


def test_jobs_of_an_array_times_processes_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    array = {"SLURM_ARRAY_TASK_COUNT": 3, "SLURM_ARRAY_TASK_MIN": 10, "SLURM_ARRAY_TASK_STEP": 5}
    for name, value in {**array, "SLURM_NTASKS": 2}.items():
        monkeypatch.setenv(name, str(value))
    places = []
    for job, process in product((10, 15, 20), (0, 1)):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(job))
        monkeypatch.setenv("SLURM_PROCID", str(process))
        places.append(place_among_processes())
    assert places == [(number, 6) for number in range(6)]


@pytest.mark.parametrize(("name", "said"), [("WORLD_SIZE", "two"), ("RANK", "-1"), ("SLURM_ARRAY_TASK_STEP", "0")])
def test_a_launcher_that_says_no_number_is_told_which(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, said)
    with pytest.raises(UsageError, match=f"{name} is '{said}', not a whole number") as caught:
        place_among_processes()
    assert name in str(caught.value.fix)


@pytest.mark.parametrize(
    ("rank_name", "first", "settings"),
    [
        ("RANK", 0, {"WORLD_SIZE": "2"}),
        ("RANK", 0, {"WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"}),
        ("SLURM_PROCID", 0, {"SLURM_NTASKS": "2"}),
        ("SLURM_PROCID", 0, {"SLURM_NTASKS": "2", "RANK": "0", "WORLD_SIZE": "1"}),
        ("SLURM_ARRAY_TASK_ID", 2, {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "2"}),
    ],
    ids=["torchrun", "torchrun-in-slurm", "srun", "srun-of-single-torchruns", "array"],
)
def test_each_process_begins_at_its_own_place(
    rank_name: str,
    first: int,
    settings: dict[str, str],
    tmp_path: Path,
    tiny_extraction: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = []
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for rank in (0, 1):
        monkeypatch.setenv(rank_name, str(first + rank))
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
