"""kill -9 anywhere, then the same command: the same store byte for byte, the same loss curve to the last digit.

Everything runs through the command line in processes of their own, on a tiny real teacher.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SEED = 20261122
TIME_KEYS = {"seconds", "tokens_per_second"}
EXTRACT_POINTS = ["teacher-batch", "encode", "shard-write", "shard-rename", "record-link", "seal-link"]
TRAIN_POINTS = ["checkpoint-write", "checkpoint-rename", "optimizer-step"]
LATEST_HIT = {"seal-link": 1, "checkpoint-write": 2, "checkpoint-rename": 2, "optimizer-step": 7}


def run(command: str, config: Path, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if fault is not None:
        environment["TOPK_DISTILL_FAULT"] = fault
    return subprocess.run(
        [sys.executable, "-m", "pipeline", command, str(config)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


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
    run_to_the_end("extract", write_extract_config(folder, tiny_teacher_dir, tiny_corpus))
    run_to_the_end("train", write_train_config(folder, tiny_teacher_dir, folder / "store"))
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


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(20))
def test_extract_killed_at_random_moments(
    seed: int, uninterrupted: tuple[Path, Path], tmp_path: Path, tiny_teacher_dir: Path, tiny_corpus: Path
) -> None:
    """Five kills at random moments per seed, then the end: no point is named, so nothing is left out."""
    config = write_extract_config(tmp_path, tiny_teacher_dir, tiny_corpus)
    moments = random.Random(f"{SEED}:{seed}")
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "extract", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=moments.uniform(1.0, 8.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    run_to_the_end("extract", config)
    assert tree(tmp_path / "store") == tree(uninterrupted[0])
