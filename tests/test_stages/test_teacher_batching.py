"""Batches: every sequence once, within the limits, in an order that only the plan decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from stages.corpus.tokenize import TokenWindow
from stages.teacher.batching import Batching, pad, resolve_batching


def sequence(length: int, number: int = 0) -> TokenWindow:
    return TokenWindow(
        document=number,
        window_start=0,
        tokens=np.arange(1, length + 1, dtype=np.uint32),
        token_end_byte=np.zeros(length, np.uint32),
        has_row=np.arange(length) < length - 1,
    )


@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    sequences=st.none() | st.integers(1, 5),
    padded_tokens=st.none() | st.integers(1, 100),
)
@example(lengths=[10, 10, 10], sequences=None, padded_tokens=20)
def test_each_sequence_once_within_limits(lengths: list[int], sequences: int | None, padded_tokens: int | None) -> None:
    rule = Batching(sequences=sequences, padded_tokens=padded_tokens, chunk_size=1)
    batches = list(rule.batches([sequence(length) for length in lengths]))
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert order == sorted(order, key=lambda index: (-lengths[index], index))
    for batch in batches:
        assert sequences is None or len(batch) <= sequences
        assert padded_tokens is None or len(batch) == 1 or len(batch) * lengths[batch[0]] <= padded_tokens
    for batch in batches[:-1]:  # one more would not have fitted
        more = len(batch) + 1
        assert more == (sequences or 0) + 1 or more * lengths[batch[0]] > (padded_tokens or 10**9)


def test_auto_and_given_sizes() -> None:
    cpu = torch.device("cpu")
    auto = resolve_batching(None, None, vocab_size=49_152, device=cpu)
    assert auto == Batching(sequences=None, padded_tokens=4096, chunk_size=1365)
    assert resolve_batching(3, 7, vocab_size=10, device=cpu) == Batching(sequences=3, padded_tokens=None, chunk_size=7)
    assert resolve_batching(None, None, vocab_size=10, device=torch.device("cuda")).padded_tokens == 16_384
    assert auto.to_plan()["padded_tokens"] == 4096


@pytest.mark.parametrize("lengths", [[3], [4, 2, 1]])
def test_padding_is_on_the_right(lengths: list[int]) -> None:
    ids_BT = pad([sequence(length) for length in lengths], torch.device("cpu"))
    assert ids_BT.dtype == torch.int64
    for row, length in enumerate(lengths):
        assert ids_BT[row].tolist() == [*range(1, length + 1), *[0] * (max(lengths) - length)]
