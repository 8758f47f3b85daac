"""What can be known about an extraction before any weight is hashed or loaded.

Data path: configuration -> **survey** -> plan. It opens and checks corpus, model directory and tokenizer, and tokenises
a fixed sample of documents, from which the remap, the shard size and the estimate follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pipeline.config.extract import ExtractConfig
from pipeline.reading import Reading, open_reading, require_hidden_states
from stages.corpus import Corpus
from stages.corpus.tokenize import Rendering, render
from stages.devices import resolve_device, resolve_dtype
from stages.targets import KINDS
from stages.targets.rows import require_k
from storage.errors import UsageError

SAMPLE_TOKENS = 200_000
FIRST_ROUND = 16  # documents


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a fixed sample of documents holds.

    Attributes:
        documents, tokens, rows: how much was sampled.
        counts: int64 [V], how often each token id occurs in it.
    """

    documents: int
    tokens: int
    rows: int
    counts: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Everything about an extraction that can be known without hashing or loading weights."""

    reading: Reading
    sample: Sample
    device: torch.device
    dtype: torch.dtype

    def scaled(self, sampled: int) -> int:
        """Extrapolate a count over the sample to the whole corpus."""
        return round(sampled * len(self.reading.corpus) / self.sample.documents)

    @property
    def is_exact(self) -> bool:
        """Whether the sample is the whole corpus."""
        return self.sample.documents == len(self.reading.corpus)


def survey(config: ExtractConfig, *, weights: bool = False) -> Survey:
    """Open and check corpus, model directory and tokenizer, and tokenise the sample.

    Args:
        weights: require (and fetch) the teacher's weights too.

    Raises:
        UsageError: anything that the configuration names is missing or unfit, or no document gives a row.
    """
    if not KINDS[config.target.kind].from_candidates:
        otherwise = f", or target.kind: {' or '.join(name for name, kind in KINDS.items() if kind.from_candidates)}"
        task = f"target.kind: {config.target.kind}"
        require_hidden_states(config.teacher.backend, task, key="teacher.backend", otherwise=otherwise)
    reading = open_reading(config.corpus, config.rendering, config.teacher, weights=weights)
    require_k(config.target.spec().k, reading.vocab_size, key="target.k")
    device = resolve_device(config.device)
    return Survey(
        reading=reading,
        sample=take_sample(reading.corpus, reading.tokenizer, reading.rendering),
        device=device,
        dtype=resolve_dtype(config.teacher.dtype, device),
    )


def take_sample(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> Sample:
    """Tokenise documents spread over the corpus until about SAMPLE_TOKENS tokens are counted, or all of them.

    Raises:
        UsageError: the corpus is smaller than the sample and gives no row at all.
    """
    counts = np.zeros(rendering.vocab_size, dtype=np.int64)
    documents = tokens = rows = 0
    for numbers in sample_rounds(len(corpus)):
        for sequence in render(corpus.documents(numbers), tokenizer, rendering):
            counts += np.bincount(sequence.tokens, minlength=rendering.vocab_size)
            tokens += len(sequence)
            rows += int(sequence.has_row.sum())
        documents += len(numbers)
        if tokens >= SAMPLE_TOKENS:
            break
    if rows == 0:
        raise UsageError(
            f"no target row in {documents} documents: each is shorter than rendering.min_tokens or than two tokens",
            where="corpus",
            fix="check the field that holds the text, and rendering.min_tokens",
        )
    return Sample(documents=documents, tokens=tokens, rows=rows, counts=counts)


def sample_rounds(count: int) -> Iterator[list[int]]:
    """Yield all numbers below `count`, each once, in rounds of 16, 16, 32, 64, ... rising numbers.

    Whatever rounds are taken, their numbers are spread evenly (golden-section steps), and within a round neighbours
    are read together.
    """
    step = max(1, round(count * 0.618034))
    while math.gcd(step, count) != 1:
        step += 1
    first, end = 0, FIRST_ROUND
    while first < count:
        yield sorted(index * step % count for index in range(first, min(end, count)))
        first, end = end, 2 * end
