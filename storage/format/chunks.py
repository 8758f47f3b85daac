"""One array as one Zarr v3 object, directly: inner chunks, the sharding index, checksums, and zarr.json.

Data path: numpy array -> **chunks** -> object bytes in a shard directory, and back, a chunk at a time.

What is written is plain Zarr v3 with the sharding codec, and a test holds it against zarr-python. It is done here
because the layout is two dozen lines, zarr-python spends far more time around a chunk than in it, its zarr.json differs
between versions (and directory names are content hashes), and because a reader that accepts exactly one form of
metadata cannot be led to run another codec: numcodecs registers pickle among others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray
from pcodec import ChunkConfig, PagingSpec, standalone

from storage.values import Json, canonical_json, parse_json

PCODEC_LEVEL = 11
SMALLEST_PAGE = 512  # rows
LARGEST_PAGE = 1 << 18  # values, the default of pcodec and numcodecs
ZSTD_LEVEL = 9
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
DTYPES = {name: np.dtype(code) for name, code in (
    ("uint8", "u1"), ("uint16", "<u2"), ("uint32", "<u4"), ("uint64", "<u8"), ("float16", "<f2"), ("float32", "<f4"),
)}  # fmt: skip


def poison(dtype: np.dtype[Any]) -> Any:
    """Return the fill value: NaN or all ones, so that a lost chunk cannot pass for data."""
    return np.nan if dtype.kind == "f" else np.iinfo(dtype).max


def _crc(data: bytes | memoryview) -> bytes:
    return int(google_crc32c.value(bytes(data))).to_bytes(CRC_BYTES, "little")


def encode_chunk(values: NDArray[Any], *, by_rank: bool = False) -> bytes:
    """Compress one chunk (pcodec; zstd for 8-bit types, which pcodec refuses) and append its crc32c.

    Args:
        values: [N], or [rows, ranks].
        by_rank: store rank after rank, and let pcodec model ranks 0, 1, 2-3, 4-7, ... apart: their values differ.
            A decoder sees an ordinary pcodec file of the transposed values.
    """
    if values.dtype.itemsize == 1:
        packed = zstd.compress(values.tobytes(), ZSTD_LEVEL)
    else:
        config = ChunkConfig(compression_level=PCODEC_LEVEL, paging_spec=_paging(values, by_rank))
        packed = standalone.simple_compress(np.ascontiguousarray(values.T if by_rank else values).reshape(-1), config)
    return bytes(packed) + _crc(packed)


def _paging(values: NDArray[Any], by_rank: bool) -> PagingSpec:
    """Give each group of ranks a model of its own, if there are enough values to pay for its header."""
    if not by_rank or len(values) < SMALLEST_PAGE:
        return PagingSpec.equal_pages_up_to(LARGEST_PAGE)
    rows, ranks = values.shape
    edges = [0, *(1 << power for power in range(ranks.bit_length()) if 1 << power < ranks), ranks]
    return PagingSpec.exact_page_sizes([(end - start) * rows for start, end in pairwise(edges)])


def decode_chunk(data: bytes | memoryview, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    """Check the crc32c and decompress into exactly `length` values; never allocates more than that.

    Raises:
        ValueError: the checksum, the content or its length is wrong.
    """
    body, crc = bytes(data[:-CRC_BYTES]), bytes(data[-CRC_BYTES:])
    if _crc(body) != crc:
        raise ValueError("crc32c of a chunk does not agree with its content")
    out = np.empty(length, dtype=dtype)
    try:
        if dtype.itemsize == 1:
            if _zstd_content_size(body) != length:
                raise ValueError(f"a chunk does not hold the expected {length} values")
            zstd.decompress(body, out)
        else:
            progress = standalone.simple_decompress_into(body, out)
            if progress.n_processed != length or not progress.finished:
                raise ValueError(f"a chunk does not hold the expected {length} values")
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"a chunk cannot be decompressed: {error}") from error
    return out


def _zstd_content_size(frame: bytes) -> int | None:
    """Read the size that a zstd frame states (RFC 8878, 3.1.1.1): numcodecs leaves a too long output unfilled."""
    if len(frame) < 6:
        return None
    size_flag, single_segment, dictionary_flag = frame[4] >> 6, frame[4] >> 5 & 1, frame[4] & 3
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[dictionary_flag]
    width = (single_segment, 2, 4, 8)[size_flag]
    if width == 0:
        return None
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """Shape and chunking of one array: all that varies in its zarr.json.

    Attributes:
        axis: name of its axis, or of the first of two.
        dtype: type of its values.
        length: of that axis.
        chunk: positions of that axis in each inner chunk; the last chunk is padded with poison.
        ranks: length of a second axis, which is never cut; None for a flat array.
        by_rank: whether the array is stored with its axes swapped, rank after rank.
        second: name of the second axis.
    """

    axis: str
    dtype: np.dtype[Any]
    length: int
    chunk: int
    ranks: int | None = None
    by_rank: bool = False
    second: str = "rank"

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of an inner chunk in memory."""
        return (self.chunk,) if self.ranks is None else (self.chunk, self.ranks)

    @property
    def key(self) -> str:
        """Name of the object inside the array's directory."""
        return "c/0" if self.ranks is None else "c/0/0"

    @property
    def chunks(self) -> int:
        """Number of inner chunks; an empty array has none, and no object."""
        return -(-self.length // self.chunk)

    @property
    def index_bytes(self) -> int:
        """Size of the index at the end of the object."""
        return self.chunks * INDEX_ENTRY_BYTES + CRC_BYTES

    def metadata(self) -> dict[str, Json]:
        """Return the content of zarr.json."""
        compress = (
            [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}]
            if self.dtype.itemsize == 1
            else [{"name": "numcodecs.pcodec", "configuration": {"level": PCODEC_LEVEL}}]
        )
        sharding = {
            "chunk_shape": self._shape(self.chunk),
            "codecs": [*compress, {"name": "crc32c"}],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": self._shape(self.length),
            "data_type": self.dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": self._shape(self.chunk * max(1, self.chunks))},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if self.dtype.kind == "f" else int(poison(self.dtype)),
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "dimension_names": self._shape(self.axis, self.second),
        }

    def _shape(self, length: Json, ranks: Json = None) -> list[Json]:
        """Return a length along the axis, and with two axes all ranks, in the order in which they are stored."""
        if self.ranks is None:
            return [length]
        pair = [length, self.ranks if ranks is None else ranks]
        return pair[::-1] if self.by_rank else pair

    def metadata_bytes(self) -> bytes:
        """Return zarr.json as bytes."""
        return canonical_json(self.metadata())

    @classmethod
    @lru_cache(maxsize=1024)  # arrays on the same axis have the same zarr.json
    def from_metadata(
        cls,
        data: bytes,
        *,
        axis: str,
        dtype: np.dtype[Any],
        ranks: int | None = None,
        by_rank: bool = False,
        second: str = "rank",
    ) -> ArrayLayout:
        """Read a zarr.json, accepting only what this module would have written for some length and chunk.

        Raises:
            ValueError: any other metadata, other codecs included.
        """
        try:
            content = parse_json(data)
            index = 1 if by_rank else 0
            length = content["shape"][index]
            chunk = content["codecs"][0]["configuration"]["chunk_shape"][index]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"zarr.json is not an array of this format: {error!r}") from error
        if type(length) is not int or type(chunk) is not int or not 0 < chunk <= max(1, length):
            raise ValueError(f"zarr.json states length {length!r} and chunk {chunk!r}")
        layout = cls(axis=axis, dtype=dtype, length=length, chunk=chunk, ranks=ranks, by_rank=by_rank, second=second)
        if layout.metadata_bytes() != data:
            raise ValueError("zarr.json has codecs or fields that this format does not have")
        return layout


def encode_array(values: NDArray[Any], layout: ArrayLayout) -> bytes:
    """Return the object of an array: its chunks one after another, then the index (offset, size) and its crc32c.

    Args:
        values: [length], or [length, ranks].
        layout: of the array; not empty.
    """
    parts: list[bytes] = []
    index = np.zeros((layout.chunks, 2), dtype="<u8")
    position = 0
    for number in range(layout.chunks):
        piece = values[number * layout.chunk : (number + 1) * layout.chunk]
        if len(piece) < layout.chunk:
            padded = np.full(layout.chunk_shape, poison(layout.dtype), layout.dtype)
            padded[: len(piece)] = piece
            piece = padded
        parts.append(encode_chunk(np.ascontiguousarray(piece, dtype=layout.dtype), by_rank=layout.by_rank))
        index[number] = position, len(parts[-1])
        position += len(parts[-1])
    stored = index.tobytes()
    return b"".join([*parts, stored, _crc(stored)])


def decode_inner(data: bytes | memoryview, layout: ArrayLayout) -> NDArray[Any]:
    """Decode one inner chunk of an array as it is stored, padding included. Raises ValueError.

    Returns:
        [chunk], [chunk, ranks], or by rank [ranks, chunk].
    """
    flat = decode_chunk(data, layout.dtype, math.prod(layout.chunk_shape))
    return flat.reshape(layout.chunk_shape[::-1] if layout.by_rank else layout.chunk_shape)


def decode_index(data: bytes | memoryview, layout: ArrayLayout, size: int) -> NDArray[np.uint64]:
    """Read the index: offset and size of each chunk, [chunks, 2].

    Args:
        data: the last `layout.index_bytes` of the object.
        size: bytes of the whole object.

    Raises:
        ValueError: the checksum is wrong, or the chunks do not tile the object.
    """
    body, crc = bytes(data[:-CRC_BYTES]), bytes(data[-CRC_BYTES:])  # copies: a view would keep the whole object alive
    if len(data) != layout.index_bytes or _crc(body) != crc:
        raise ValueError("crc32c of the chunk index does not agree with its content")
    index = np.frombuffer(body, dtype="<u8").reshape(-1, 2)
    ends = np.cumsum(index[:, 1])
    if not np.array_equal(index[:, 0], ends - index[:, 1]) or int(ends[-1]) + layout.index_bytes != size:
        raise ValueError("the chunk index does not tile the object")
    return index
