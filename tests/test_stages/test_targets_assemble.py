"""Rows and sequences become a batch: counts of draws, offsets, and the way back to document order."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import make_dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.corpus.tokenize import TokenWindow
from stages.targets.assemble import assemble
from stages.targets.positions import document_order, wanted_mask, wanted_positions
from stages.targets.rows import TargetRows
from storage.plan import TargetSpec
from storage.rows import NUMBERS, ArrayField, SequenceBatch
from storage.segments import merge_draws

K, M = 3, 4
TARGET = TargetSpec(kind="hybrid", k=K, draws=M)


def sequence(document: int, start: int, has_row: list[int]) -> TokenWindow:
    length = len(has_row)
    return TokenWindow(
        document=document,
        window_start=start,
        tokens=np.arange(100 * document + start, 100 * document + start + length, dtype=np.uint32),
        token_end_byte=np.arange(length, dtype=np.uint32),
        has_row=np.array(has_row, dtype=np.bool_),
    )


SEQUENCES = [sequence(0, 0, [1, 1, 0]), sequence(0, 2, [0, 1, 1, 1, 0]), sequence(2, 0, [1, 0])]


def rows_for(sequences: list[TokenWindow]) -> TargetRows:
    """Rows whose entropy tells where they belong: document * 100 + position."""
    at = wanted_positions(sequences)
    number = at.document * 100 + at.position
    rows = len(at)
    scalar = number.astype(np.float32)
    return TargetRows(
        head_size=np.full(rows, K, np.int32),
        head_ids=np.tile(np.arange(K, dtype=np.uint32), (rows, 1)),
        logprob=np.tile(np.array([-1.0, -2.0, -3.0], np.float32), (rows, 1)),
        drawn=np.tile(np.array([5, 5, 7, 9], np.uint32), (rows, 1)),
        tail_logit=np.where(number == 3, -np.inf, 0.0).astype(np.float32),
        logsumexp=scalar,
        entropy=scalar,
        next_logprob=-scalar,
        tail_logit_T=np.zeros((rows, 0), np.float32),
        entropy_T=np.zeros((rows, 0), np.float32),
    )


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 6), min_size=M, max_size=M)), max_size=12))
def test_merge_draws_counts(rows: list[tuple[bool, list[int]]]) -> None:
    drawn = np.array([sorted(ids) for _, ids in rows], dtype=np.uint32).reshape(-1, M)
    empty = np.array([flag for flag, _ in rows], dtype=np.bool_)
    ids, count, size = merge_draws(drawn, empty_R=empty)
    begin = 0
    for (flag, drawn_ids), length in zip(rows, size.tolist(), strict=True):
        found = dict(zip(ids[begin : begin + length].tolist(), count[begin : begin + length].tolist(), strict=True))
        assert found == ({} if flag else Counter(drawn_ids))
        begin += length
    assert begin == len(ids)


def test_merge_draws_of_a_kind_without_any() -> None:
    ids, count, size = merge_draws(np.zeros((3, 0), np.uint32), empty_R=np.zeros(3, np.bool_))
    assert (len(ids), len(count), size.tolist()) == (0, 0, [0, 0, 0])


def test_wanted_positions_and_mask() -> None:
    at = wanted_positions(SEQUENCES)
    assert at.document.tolist() == [0, 0, 0, 0, 0, 2]
    assert at.position.tolist() == [0, 1, 3, 4, 5, 0]
    assert at.next_token.tolist() == [1, 2, 4, 5, 6, 201]
    assert wanted_mask(SEQUENCES).int().tolist() == [[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("computed", [[0, 1, 2], [1, 0, 2], [2, 1, 0]])
def test_any_order_of_computation_gives_the_same_batch(computed: list[int]) -> None:
    rows = rows_for([SEQUENCES[index] for index in computed])
    batch = assemble(SEQUENCES, rows.take(document_order(SEQUENCES, computed)), TARGET)
    assert batch.entropy.tolist() == [0, 1, 3, 4, 5, 200]
    assert batch.token_offset.tolist() == [0, 3, 8, 10]
    assert batch.row_offset.tolist() == [0, 2, 5, 6]
    assert batch.head_offset.tolist() == [0, 6, 15, 18]
    assert batch.tail_size.tolist() == [3, 3, 0, 3, 3, 3]
    assert batch.tail_offset.tolist() == [0, 6, 12, 15]
    assert batch.count.tolist() == [2, 1, 1] * 5
    assert batch.tokens[:3].tolist() == [0, 1, 2]
    assert batch.window_start.tolist() == [0, 2, 0]


def test_a_number_added_to_rows_is_carried_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes it puts it into `TargetRows`; nothing else here names it."""
    added = ArrayField(name="varentropy", axis="row", dtype=np.float32, stored="real", only_with=None, absent=0)
    wide_rows, wide_batch = (
        make_dataclass(kind.__name__, [(added.name, Any)], bases=(kind,), frozen=True, kw_only=True)
        for kind in (TargetRows, SequenceBatch)
    )
    for module in ("stages.targets.assemble", "stages.targets.rows"):  # the package has a function of that name
        monkeypatch.setattr(sys.modules[module], "NUMBERS", (*NUMBERS, added))
    monkeypatch.setattr(sys.modules["stages.targets.assemble"], "SequenceBatch", wide_batch)
    rows = rows_for(SEQUENCES)
    batch: Any = assemble(SEQUENCES, wide_rows(**vars(rows), varentropy=2 * rows.entropy), TARGET)
    assert batch.varentropy.tolist() == [0, 2, 6, 8, 10, 400]
    empty: Any = assemble([], wide_rows.empty(TARGET), TARGET)
    assert empty.varentropy.shape == (0,)


def test_an_empty_shard() -> None:
    batch = assemble([], TargetRows.empty(TARGET), TARGET)
    assert (len(batch), batch.rows, len(batch.tokens)) == (0, 0, 0)
    assert batch.row_offset.tolist() == [0]
    assert batch.head_ids.dtype == np.uint32
