"""Rows as JSON Lines, one line per sequence: for reading by eye, and for trainers that take top-k logits as JSON.

Data path: `SequenceBatch` -> **one JSON object per sequence** -> a file.

The keys `tokens`, `labels`, `loss_mask`, `topk_logits`, `topk_token_ids` and `log_sum_exp_logits` are the ones that
NeMo-Aligner's compute_topk_logits.py writes; the others say where the sequence is from and what else its rows hold, and
are named as the columns of `storage.exchange.arrow.schema`.

Axis legend: S sequences, R rows, N positions of a sequence that have a next token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.rows import SequenceBatch
from storage.segments import row_starts, sigmoid
from storage.values import Json

NEMO_ALIGNER_KEYS = ("tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", "log_sum_exp_logits")
KEYS = frozenset((*NEMO_ALIGNER_KEYS, "window_start", "sample_ids", "sample_counts"))  # and those of the Arrow schema
DECIMALS = 4  # of numbers: finer than what quantised log-probabilities and half-precision logsumexp carry


def sequence_lines(batch: SequenceBatch, *, numbers: Sequence[int], padding: int) -> Iterator[bytes]:
    """Return a line of JSON for each sequence, with its line end.

    Every list but `temperatures` is as long as `tokens`, the sequence without its last token; `labels` are the tokens
    that follow. `topk_logits` minus `log_sum_exp_logits` are log-probabilities. `sample_ids` and `sample_counts` are
    there if the batch has draws; `temperatures`, and `tail_mass_T` and `entropy_T` at each, if it has temperatures. An
    added column is a list if it has a value per row, else one value. A position without a row has loss_mask 0, and
    zeros elsewhere; null stands for what is not finite.

    Args:
        numbers: the number of each [S].
        padding: entries of 0 that stand at a position without a row, so that lists of lists can be rectangular.
    """
    head, tail = row_starts(batch.head_size), row_starts(batch.tail_size)
    logit = _rounded(batch.logprob + np.repeat(batch.logsumexp, batch.head_size))
    of_row = _of_row(batch)
    of_sequence = {name: _plain(values) for name, values in (batch.sequence_columns or {}).items()}
    for sequence, number in enumerate(numbers):
        start, end = batch.token_offset[sequence : sequence + 2]
        first = int(batch.row_offset[sequence])
        has_row = batch.has_row[start : end - 1]
        row = np.where(has_row, first + np.cumsum(has_row) - 1, -1).tolist()
        line: dict[str, Json] = {
            "document": int(batch.document[sequence]),
            "sequence": int(number),
            "window_start": int(batch.window_start[sequence]),
            "tokens": batch.tokens[start : end - 1].tolist(),
            "labels": batch.tokens[start + 1 : end].tolist(),
            "loss_mask": has_row.astype(int).tolist(),
            "topk_logits": _lists(logit, head, row, [0.0] * padding),
            "topk_token_ids": _lists(batch.head_ids.tolist(), head, row, [0] * padding),
        }
        if batch.draws:
            line["sample_ids"] = _lists(batch.tail_ids.tolist(), tail, row, [])
            line["sample_counts"] = _lists(batch.count.tolist(), tail, row, [])
        if batch.temperatures:
            line["temperatures"] = list(batch.temperatures)
        line |= {name: [values[at] for at in row] for name, values in of_row.items()}
        line |= {name: values[sequence] for name, values in of_sequence.items()}
        yield json.dumps(line, allow_nan=False).encode() + b"\n"


def _of_row(batch: SequenceBatch) -> dict[str, list[Any]]:
    """Return the single values of rows by key, lists [R + 1]; the last item stands at positions without a row."""
    numbers: dict[str, NDArray[Any]] = {
        "log_sum_exp_logits": batch.logsumexp,
        "tail_mass": sigmoid(batch.tail_logit),
        "entropy": batch.entropy,
        "next_logprob": batch.next_logprob,
    }
    if batch.tail_logit_T is not None and batch.entropy_T is not None:
        numbers |= {"tail_mass_T": sigmoid(batch.tail_logit_T), "entropy_T": batch.entropy_T}
    lists = {name: _rounded(_with_zeros(values)) for name, values in numbers.items()}
    return lists | {name: _plain(_with_zeros(values)) for name, values in (batch.row_columns or {}).items()}


def _with_zeros(values_R: NDArray[Any]) -> NDArray[Any]:
    """Return the values with zeros behind them, [R + 1]; there may be a second axis."""
    return np.concatenate([values_R, np.zeros_like(values_R, shape=(1, *values_R.shape[1:]))])


def _rounded(values: NDArray[Any]) -> list[Any]:
    return _plain(np.round(values.astype(np.float64), DECIMALS))


def _plain(values: NDArray[Any]) -> list[Any]:
    """Return values as JSON has them: null stands for NaN and infinity."""
    objects = values.astype(object)
    objects[~np.isfinite(values)] = None
    plain: list[Any] = objects.tolist()
    return plain


def _lists(values: list[Any], starts_R: NDArray[np.int64], row_N: list[int], absent: list[Any]) -> list[list[Any]]:
    """Cut the entries of each position's row out of all entries."""
    return [values[starts_R[at] : starts_R[at + 1]] if at >= 0 else absent for at in row_N]
