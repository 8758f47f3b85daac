"""Which sequences the teacher sees together: a pure function of the plan and the sequences.

The plan states the rule, because forwards in low precision depend in their last bits on what is computed together.

Axis legend: B sequences of a batch, T tokens of its longest one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from stages.corpus.tokenize import TokenWindow
from storage.values import Json

TOKENS_PER_BATCH = {"cpu": 4096}
TOKENS_PER_BATCH_ELSEWHERE = 16_384
LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Batching:
    """The rule: sequences of a shard sorted by falling length, cut into batches, rows computed in chunks.

    Attributes:
        sequences: most sequences in a batch, or None.
        padded_tokens: most tokens in a batch, padding included, or None. One sequence is always allowed.
        chunk_size: positions whose full-vocabulary logits exist at one time.
        length_borders: lengths, rising, whose two sides are never in one batch: the teacher computes them differently.
    """

    sequences: int | None
    padded_tokens: int | None
    chunk_size: int
    length_borders: tuple[int, ...] = ()

    def to_plan(self) -> dict[str, Json]:
        """Return the `batching` field of a plan."""
        rule: dict[str, Json] = {"order": "length falling, then document and window", **asdict(self)}
        borders = rule.pop("length_borders")
        return {**rule, "length_borders": list(borders)} if borders else rule

    def batches(self, sequences: Sequence[TokenWindow]) -> Iterator[list[int]]:
        """Yield the indices of the sequences of each batch."""
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))  # stable: ties keep their order
        batch: list[int] = []
        for index in order:
            if batch and not self._admits(len(batch) + 1, len(sequences[batch[0]]), len(sequences[index])):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _admits(self, count: int, longest: int, length: int) -> bool:
        if bisect_left(self.length_borders, longest) != bisect_left(self.length_borders, length):
            return False
        if self.sequences is not None and count > self.sequences:
            return False
        return self.padded_tokens is None or count * longest <= self.padded_tokens


def resolve_batching(
    batch_size: int | None,
    chunk_size: int | None,
    *,
    vocab_size: int,
    device: torch.device,
    length_borders: tuple[int, ...] = (),
) -> Batching:
    """Fill in what the configuration leaves to us (None): batches by tokens, chunks of about 256 MiB of logits."""
    return Batching(
        sequences=batch_size,
        padded_tokens=TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH_ELSEWHERE) if batch_size is None else None,
        chunk_size=max(1, LOGITS_BYTES // (4 * vocab_size)) if chunk_size is None else chunk_size,
        length_borders=length_borders,
    )


def pad(sequences: Sequence[TokenWindow], device: torch.device) -> Tensor:
    """Return ids_BT, int64, padded on the right with id 0: no position before the padding sees it."""
    ids_BT = np.zeros((len(sequences), max(len(sequence) for sequence in sequences)), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = sequence.tokens
    return torch.from_numpy(ids_BT).to(device)
