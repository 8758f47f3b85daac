"""Arithmetic on rows in flat arrays, against loops over rows."""

from __future__ import annotations

from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.segments import interleave, rank_in_row, row_starts

SIZES = st.lists(st.integers(0, 5), max_size=9)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
@given(sizes=SIZES)
def test_starts_and_ranks(sizes, dtype):
    size_R = np.array(sizes, dtype)
    starts = row_starts(size_R)
    assert starts.dtype == np.int64
    assert starts.tolist() == [sum(sizes[:row]) for row in range(len(sizes) + 1)]
    assert rank_in_row(size_R).tolist() == list(chain.from_iterable(range(size) for size in sizes))


def test_marks_are_sizes():
    assert row_starts(np.array([True, False, True, True])).tolist() == [0, 1, 1, 2, 3]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=9))
def test_heads_come_before_tails(sizes):
    head_size_R, tail_size_R = np.array(sizes, np.int32).reshape(-1, 2).T
    head_H, tail_C = np.arange(head_size_R.sum(), dtype=np.uint32), 100 + np.arange(tail_size_R.sum(), dtype=np.uint32)
    heads, tails = iter(head_H.tolist()), iter(tail_C.tolist())
    expected = [entry for head, tail in sizes for entry in (*islice(heads, head), *islice(tails, tail))]
    found = interleave(head_H, head_size_R, tail_C, tail_size_R)
    assert found.dtype == np.uint32
    assert found.tolist() == expected
