"""The remap: token ids renumbered by frequency, so that frequent ids are small and compress well.

Data path: token counts of a sample of the corpus -> **remap** -> ids and tokens in shards, which are ranks. It is
built at plan time, lies in the store's file `remap`, and its hash is in the plan. Worth 15 to 20% of a store.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from storage.format.chunks import decode_chunk, encode_chunk


def build_remap(counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return the token id of each frequency rank, uint32 [V], from token counts [V].

    Ranks follow falling count, then rising id; ids that were never seen follow in id order.
    """
    return np.argsort(-counts.astype(np.int64), kind="stable").astype(np.uint32)


def invert(remap: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the rank of each token id, uint32 [V]."""
    rank = np.empty(len(remap), dtype=np.uint32)
    rank[remap] = np.arange(len(remap), dtype=np.uint32)
    return rank


def is_permutation(remap: NDArray[np.uint32]) -> bool:
    """Tell whether every id below V occurs exactly once."""
    if len(remap) == 0:
        return False
    return bool(np.array_equal(np.sort(remap), np.arange(len(remap))))


def remap_sha256(remap: NDArray[np.uint32]) -> str:
    """Return the hash that a plan holds: sha256 (hex) of the values as little-endian uint32.

    It covers the values, not the compressed file, so that it does not depend on a library version.
    """
    return hashlib.sha256(remap.astype("<u4").tobytes()).hexdigest()


def encode_remap(remap: NDArray[np.uint32]) -> bytes:
    """Return the content of the file `remap`: one pcodec chunk of uint32 followed by its crc32c."""
    return encode_chunk(remap.astype("<u4"))


def decode_remap(data: bytes, vocab_size: int) -> NDArray[np.uint32]:
    """Read the file `remap`. Raises ValueError unless it holds a permutation of range(vocab_size)."""
    remap = decode_chunk(data, np.dtype("<u4"), vocab_size)
    if not is_permutation(remap):
        raise ValueError(f"not a permutation of the {vocab_size} token ids")
    return remap
