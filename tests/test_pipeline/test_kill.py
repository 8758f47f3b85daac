"""kill -9 anywhere, then the same command: the same store byte for byte, the same loss curve to the last digit.

Everything runs through the command line in processes of their own, on a tiny real teacher. What nothing disturbs is
made by the real commands; the others are forked from a process that has imported them (warm_process.py).
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm_process
import yaml
from torture_results import save
from warm_process import WarmProcess, pipeline

SEED = 20261122
TIME_KEYS = {"seconds", "tokens_per_second"}
EXTRACT_POINTS = ["teacher-batch", "encode", "shard-write", "shard-rename", "record-link", "seal-link"]
TRAIN_POINTS = ["checkpoint-write", "checkpoint-rename", "optimizer-step"]
ALL_EXTRACT_POINTS = [
    "plan-link", "plan-linked", "teacher-batch", "encode", "encoded", "shard-write", "shard-rename", "shard-renamed",
    "record-write", "record-link", "record-linked", "seal-link", "seal-linked",
]  # fmt: skip
KILLS = 30  # at random moments; tests/test_storage has a hundred more of each kind
LATEST_HIT = {"seal-link": 1, "checkpoint-write": 2, "checkpoint-rename": 2, "optimizer-step": 7}


def run(command: str, config: Path, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {} if fault is None else {"TOPK_DISTILL_FAULT": fault}
    return warm_process.run(pipeline, command, config, environment=environment)


def run_to_the_end(command: str, config: Path) -> None:
    done = run(command, config)
    assert done.returncode == 0, done.stderr


def tree(store: Path) -> dict[str, str]:
    """Sha256 of every file that the store names; temporary leftovers of a kill are not part of it."""
    named = [store / "plan.json", store / "remap", store / "sealed.json"]
    for folder in ("tokenizer", "commits", "shards"):
        named += [path for path in (store / folder).rglob("*") if path.is_file()]
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in named
        if not any(part.startswith((".", "tmp")) for part in path.relative_to(store).parts)
    }


def curve(run_directory: Path) -> list[dict[str, object]]:
    """Metrics without the fields that measure time."""
    lines = (run_directory / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIME_KEYS} for line in lines]


def killed_then_finished(command: str, config: Path, point: str) -> None:
    hit = random.Random(f"{SEED}:{point}").randint(1, LATEST_HIT.get(point, 3))
    stopped = run(command, config, fault=f"{point}:{hit}")
    print(f"killed at {point}:{hit}, exit {stopped.returncode}")
    assert stopped.returncode == -9, f"{point}:{hit} was never reached:\n{stopped.stderr}"
    assert f"fault point {point}:{hit} reached" in stopped.stderr
    run_to_the_end(command, config)


def write_extract_config(folder: Path, teacher: Path, corpus: Path) -> Path:
    config = {
        "store": str(folder / "store"),
        "teacher": {"path": str(teacher), "dtype": "float32"},
        "corpus": [{"source": "jsonl", "path": str(corpus)}],
        "rendering": {"window": 64},
        "target": {"kind": "hybrid", "k": 8, "draws": 4},
        "heldout": {"fraction": 0.15},
        "documents_per_shard": 8,
        "batch_size": 4,
    }
    return write_config(folder / "extract.yaml", config)


def write_train_config(folder: Path, teacher: Path, store: Path) -> Path:
    config = {
        "store": str(store),
        "run": str(folder / "run"),
        "student": {"init": "layers_of_teacher", "path": str(teacher), "layers": 1},
        "steps": 8,
        "tokens_per_step": 256,
        "tokens_per_batch": 128,
        "dtype": "float32",
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every": 3},
        "validation": {"every": 4, "sequences": 4},
    }
    return write_config(folder / "train.yaml", config)


def write_config(path: Path, config: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, tiny_corpus: Path
) -> tuple[Path, Path]:
    """Store and run directory that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    extraction = write_extract_config(folder, tiny_teacher_dir, tiny_corpus)
    training = write_train_config(folder, tiny_teacher_dir, folder / "store")
    for command, config in (("extract", extraction), ("train", training)):
        subprocess.run([sys.executable, "-m", "pipeline", command, config], check=True, timeout=300)
    return folder / "store", folder / "run"


@pytest.mark.parametrize("point", EXTRACT_POINTS)
def test_extract_killed_and_run_again_gives_the_same_bytes(
    point: str, uninterrupted: tuple[Path, Path], tmp_path: Path, tiny_teacher_dir: Path, tiny_corpus: Path
) -> None:
    config = write_extract_config(tmp_path, tiny_teacher_dir, tiny_corpus)
    killed_then_finished("extract", config, point)
    assert tree(tmp_path / "store") == tree(uninterrupted[0])


@pytest.mark.parametrize("point", TRAIN_POINTS)
def test_train_killed_and_run_again_gives_the_same_curve_and_model(
    point: str, uninterrupted: tuple[Path, Path], tmp_path: Path, tiny_teacher_dir: Path
) -> None:
    store, reference = uninterrupted
    config = write_train_config(tmp_path, tiny_teacher_dir, store)
    killed_then_finished("train", config, point)
    assert curve(tmp_path / "run") == curve(reference)
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (reference / weights).read_bytes()


def kill_after(started: WarmProcess, seconds: float) -> bool:
    """Kill a process unless it ends before; tell whether it was killed."""
    started.process.join(seconds)
    started.process.kill()
    return started.wait().returncode == -9


@pytest.mark.torture
@pytest.mark.parametrize("workers", [1, 2])
def test_extract_killed_at_random_moments(
    workers: int, uninterrupted: tuple[Path, Path], tmp_path: Path, tiny_teacher_dir: Path, tiny_corpus: Path
) -> None:
    """At most six kills to a store, then the end: no point is named, so nothing is left out."""
    for trial in ("cold", "warm"):
        started = time.perf_counter()
        run_to_the_end("extract", write_extract_config(tmp_path / trial, tiny_teacher_dir, tiny_corpus))
    alone = time.perf_counter() - started
    moments = random.Random(f"{SEED}:{workers}")
    stores = killed = 0
    while killed < KILLS:
        stores += 1
        config = write_extract_config(tmp_path / str(stores), tiny_teacher_dir, tiny_corpus)
        for _ in range(6 // workers):
            processes = [WarmProcess(pipeline, "extract", config) for _ in range(workers)]
            killed += sum(kill_after(process, moments.uniform(0.3, 1.0) * alone) for process in processes)
            if (tmp_path / str(stores) / "store" / "sealed.json").exists():
                break
        run_to_the_end("extract", config)
        assert tree(tmp_path / str(stores) / "store") == tree(uninterrupted[0])
        print(f"{killed} killed", flush=True)
    save(f"kill -9 of `pipeline extract` at random moments, {workers} at a time", started=started, seed=SEED,
         killed=killed, stores=stores)  # fmt: skip


@pytest.mark.torture
def test_extract_killed_at_every_point(
    uninterrupted: tuple[Path, Path], tmp_path: Path, tiny_teacher_dir: Path, tiny_corpus: Path
) -> None:
    """At the first three hits of each point: one store for the three, so that a kill finds what another has left."""
    started = time.perf_counter()
    killed = 0
    for point in ALL_EXTRACT_POINTS:
        config = write_extract_config(tmp_path / point, tiny_teacher_dir, tiny_corpus)
        hits = range(1, 2 if point.startswith(("plan", "seal")) else 4)
        for hit in hits:
            stopped = run("extract", config, fault=f"{point}:{hit}")
            assert f"fault point {point}:{hit} reached" in stopped.stderr, stopped.stderr
            killed += stopped.returncode == -9
        run_to_the_end("extract", config)
        assert tree(tmp_path / point / "store") == tree(uninterrupted[0])
        print(point, flush=True)
    save("kill -9 of `pipeline extract` at every named point, its first three hits", started=started, killed=killed)
