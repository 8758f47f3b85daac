"""Every bit, every length, every swap, foreign files: all found, and not one wrong row."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from damage_study import Damage
from torture_results import save

SEED = 20261122

SAMPLES: dict[str, Callable[[Damage], None]] = {
    "bits": lambda study: study.bits(every=150, whole_every=60),
    "lengths": lambda study: study.lengths(every=40, whole_every=60),
    "swaps": lambda study: study.swaps(every=8, whole_every=40),
    "whole shards swapped": lambda study: study.shard_swaps(),
    "foreign files": lambda study: study.foreign(sorted((study.path / "shards").iterdir())[:1]),
    "bits under an open reader": lambda study: study.under_an_open_reader(40),
}
EVERYTHING: dict[str, Callable[[Damage], None]] = {
    "every bit of every file flipped": lambda study: study.bits(),
    "every file cut to every length, taken away, made longer": lambda study: study.lengths(),
    "every pair of files swapped": lambda study: study.swaps(),
    "every pair of shards, and of records, swapped": lambda study: study.shard_swaps(),
    "seven kinds of foreign files in every directory of every shard": lambda study: study.foreign(),
    "random bits flipped under an open reader, inode and time kept": lambda study: study.under_an_open_reader(4000),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample(memory, name):
    study = Damage(memory, shards=3 if "swap" in name else 2, seed=SEED)
    SAMPLES[name](study)
    assert study.found.findings == []
    assert study.found.damages > 5


@pytest.mark.torture
@pytest.mark.parametrize("name", EVERYTHING)
def test_all(memory, name):
    started = time.perf_counter()
    study = Damage(memory, shards=4 if "shards," in name else 2, seed=SEED)
    EVERYTHING[name](study)
    assert study.found.findings == []
    save(name, started=started, seed=SEED, damages=study.found.damages, by_whole_verify_and_reader=study.found.whole,
         files=len(study.content))  # fmt: skip
