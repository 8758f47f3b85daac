"""How many threads a reader takes where it is not told."""

from __future__ import annotations

import os

import pytest

from storage.threads import default_threads, usable_cores


@pytest.mark.parametrize(
    ("system", "cores"),
    [
        ({"process_cpu_count": lambda: 3, "sched_getaffinity": lambda process: {0}, "cpu_count": lambda: 64}, 3),
        ({"sched_getaffinity": lambda process: {0, 5}, "cpu_count": lambda: 64}, 2),
        ({"cpu_count": lambda: 64}, 64),
        ({"cpu_count": lambda: None}, 1),
    ],
    ids=["from Python 3.13 on", "Linux", "macOS", "nothing is known"],
)
def test_cores_are_counted_on_every_system(monkeypatch, system, cores):
    for name in ("process_cpu_count", "sched_getaffinity", "cpu_count"):
        monkeypatch.delattr(os, name, raising=False)
    for name, function in system.items():
        monkeypatch.setattr(os, name, function, raising=False)
    assert (usable_cores(), default_threads()) == (cores, min(4, cores))
