"""What the tests share, under one worker or many: see conftest.py."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch


def test_it_is_made_once_for_all_who_ask(made_once):
    made, together = [], Barrier(4)

    def make(directory):
        made.append(directory)
        (directory / "content").write_text("x")

    def ask(_):
        together.wait()
        return made_once("asked-for-by-four", make)

    with ThreadPoolExecutor(4) as askers:
        (path,) = set(askers.map(ask, range(4)))
    assert len(made) == 1
    assert [file.name for file in path.iterdir()] == ["content"]


def test_what_fails_half_way_is_made_anew(made_once):
    def fail(directory):
        (directory / "half").write_text("x")
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        made_once("fails-at-first", fail)
    path = made_once("fails-at-first", lambda directory: (directory / "whole").write_text("x"))
    assert [file.name for file in path.iterdir()] == ["whole"]


def test_torch_computes_with_one_thread_so_that_workers_do_not_fight():
    assert torch.get_num_threads() == int(os.environ.get("TOPK_DISTILL_TEST_THREADS", "1"))
