"""A fixed sample of documents, tokenised before any weight is hashed or loaded.

Data path: corpus, tokenizer -> **sample** -> plan. The remap, the size of shards and the estimate follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from stages.corpus import Corpus
from stages.corpus.facts import Fact, Tally
from stages.corpus.rendering import Rendering
from stages.corpus.tokenize import render
from storage.errors import UsageError

SAMPLE_TOKENS = 200_000
FIRST_ROUND = 16  # documents


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a fixed sample of documents holds.

    Attributes:
        documents, sequences, tokens, rows: how much was sampled.
        counts: int64 [V], how often each token id occurs in it.
        tally: what a user should know of, over these documents.
    """

    documents: int
    sequences: int
    tokens: int
    rows: int
    counts: NDArray[np.int64]
    tally: Tally


def take_sample(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> Sample:
    """Tokenise documents spread over the corpus until about SAMPLE_TOKENS tokens are counted, or all of them.

    Raises:
        UsageError: the corpus is smaller than the sample and gives no row at all.
    """
    counts = np.zeros(rendering.vocab_size, dtype=np.int64)
    documents = sequences = tokens = rows = 0
    tally = Tally()
    for numbers in sample_rounds(len(corpus)):
        for sequence in render(corpus.documents(numbers), tokenizer, rendering, tally):
            counts += np.bincount(sequence.tokens, minlength=rendering.vocab_size)
            sequences += 1
            tokens += len(sequence)
            rows += int(sequence.has_row.sum())
        documents += len(numbers)
        if tokens >= SAMPLE_TOKENS:
            break
    if rows == 0:
        raise UsageError(
            f"no target row in {documents} documents: {tally.documents[Fact.LEFT_OUT]} have a prompt that fills "
            "rendering.window, the others are shorter than rendering.min_tokens or than two tokens",
            where="corpus",
            fix="check the field that holds the text, rendering.min_tokens, and for prompts window and too_long",
        )
    return Sample(documents=documents, sequences=sequences, tokens=tokens, rows=rows, counts=counts, tally=tally)


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
