"""A student of two tiny layers, and steps of random sequences with random rows, for tests of single steps."""

from __future__ import annotations

import math

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from stages.batches.steps import Step, StepShape, microbatches
from stages.losses import FusedLinearKDLoss
from stages.models.packed import use_packed_attention
from stages.student.model import Student
from stages.training.step import Learner
from storage.rows import SequenceBatch

HIDDEN = 16


def make_learner(
    *, vocabulary: int, kd_ratio: float = 0.7, dtype: torch.dtype = torch.float32, chunk_size: int = 4, seed: int = 0
) -> Learner:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    use_packed_attention(model, "sdpa")
    loss = FusedLinearKDLoss(chunk_size=chunk_size, vocab_size=vocabulary)
    return Learner(student=Student.of(model, dtype), loss=loss, kd_ratio=kd_ratio)


def make_sequences(sizes: list[int], *, vocabulary: int, seed: int = 0, with_rows: bool = True) -> SequenceBatch:
    """Random sequences; each row has a head of 3 and 2 samples drawn twice and once. All positions or none have one."""
    random = np.random.default_rng(seed)
    offset = np.concatenate([[0], np.cumsum(sizes)])
    row_offset = with_rows * np.concatenate([[0], np.cumsum(np.array(sizes) - 1)])
    rows = int(row_offset[-1])
    has_row = np.full(offset[-1], with_rows)
    has_row[offset[1:] - 1] = False
    ids = np.array([random.permutation(vocabulary)[:5] for _ in range(rows)]).reshape(rows, 5)
    return SequenceBatch(
        tokens=random.integers(0, vocabulary, offset[-1]).astype(np.uint32),
        token_offset=offset,
        row_offset=row_offset,
        head_offset=3 * row_offset,
        tail_offset=2 * row_offset,
        document=np.arange(len(sizes)),
        window_start=np.zeros(len(sizes), np.int64),
        token_end_byte=None,
        has_row=has_row,
        head_size=np.full(rows, 3, np.int32),
        tail_size=np.full(rows, 2, np.int32),
        head_ids=ids[:, :3].reshape(-1).astype(np.uint32),
        logprob=np.log(np.tile([0.5, 0.2, 0.1], rows)).astype(np.float32),
        tail_ids=ids[:, 3:].reshape(-1).astype(np.uint32),
        count=np.tile([2, 1], rows).astype(np.uint16),
        tail_logit=np.full(rows, math.log(0.2 / 0.8), np.float32),
        logsumexp=np.zeros(rows, np.float32),
        entropy=np.full(rows, 1.5, np.float32),
        next_logprob=np.full(rows, -1.0, np.float32),
        draws=3,
    )


def make_step(
    sizes: list[int],
    *,
    vocabulary: int,
    tokens_per_batch: int,
    with_targets: bool = True,
    with_rows: bool = True,
) -> Step:
    shape = StepShape(tokens_per_step=10**6, tokens_per_batch=tokens_per_batch, with_targets=with_targets)
    sequences = make_sequences(sizes, vocabulary=vocabulary, with_rows=with_rows)
    batches = microbatches(sequences, shape)
    return Step(batches=batches, tokens=len(sequences.tokens), rows=sequences.rows, cursor=len(sizes))
