"""One committed shard, open for reading: verified files, chunks on demand, slices by sequence.

Data path: commit record, files -> **open shard** -> slices of stored values -> `decode.decode_batch`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from storage.cache import BoundedCache
from storage.commit.records import CommitRecord
from storage.errors import CorruptionError
from storage.files.base import Files
from storage.format.arrays import ArraySpec, array_specs, is_even
from storage.format.chunks import ArrayLayout, decode_index, decode_inner
from storage.format.encode import GROUP, axis_lengths, read_group
from storage.plan import Plan
from storage.rows import OFFSETS
from storage.values import sha256

ChunkCache = BoundedCache[Any]  # decoded chunks (arrays), and checked files (memoryviews)
LARGE_CHUNK = 1 << 16  # bytes
FOREIGN = "a foreign file"  # in a shard's directory, beside those of its record
FILE_BYTES = 1000  # of memory that an open shard takes for each of its files, measured


class DamageError(ValueError):
    """Damage found inside a shard, not yet told which shard it is.

    Args:
        problem: what is wrong.
        name: the file or array inside the shard's directory; None if the damage is in how they go together.
    """

    def __init__(self, problem: str, name: str | None = None) -> None:
        super().__init__(problem if name is None else f"{name}: {problem}")
        self.problem = problem
        self.name = name


class Objects(Protocol):
    """Where an open shard gets its bytes from. Both methods raise DamageError for bytes that are not as committed."""

    def whole(self, name: str) -> bytes:
        """Return a whole file."""
        ...

    def part(self, name: str, start: int, size: int) -> bytes | memoryview:
        """Return `size` bytes of a file from `start`."""
        ...


def no_stamps(record: CommitRecord) -> NDArray[np.int64]:
    """Return what `CommittedObjects` knows of files none of which was checked: zeros."""
    return np.zeros(len(record.objects), np.int64)


def chunk_cache(limit: int) -> ChunkCache:
    """Return a cache for open shards that holds up to `limit` bytes."""
    return BoundedCache(limit, lambda value: int(value.nbytes))


class CommittedObjects:
    """The files that a commit record names, each checked for size and sha256 before its first use.

    After that, parts come from the bytes that were checked while the cache holds them, and else are read alone as long
    as the file is the one that was checked (inode, size, modification time); chunks carry their own crc32c besides.

    Args:
        cache: for files that were checked, shared between shards.
        checked: int64, for each file the hash of its stamp once it was checked, else 0; new ones are noted here.
    """

    def __init__(
        self, files: Files, record: CommitRecord, cache: ChunkCache, checked: NDArray[np.int64] | None = None
    ) -> None:
        self._files = files
        self._record = record
        self._cache = cache
        self._checked = no_stamps(record) if checked is None else checked
        self._number = {name: number for number, name in enumerate(record.objects)}

    def whole(self, name: str) -> bytes:
        """Read a file and check it against the record."""
        expected = self._record.objects[name]
        try:
            found = self._files.read_stamped(f"{self._record.path}/{name}", most=expected.size)
        except CorruptionError as error:
            raise DamageError(error.what, name) from error
        if found is None:
            raise DamageError("the file is missing", name)
        data, stamp = found
        if len(data) != expected.size:
            size = f"it has {len(data)} bytes" if data else "it is empty"
            raise DamageError(f"{size}; the commit record says {expected.size}", name)
        if sha256(data) != expected.sha256:
            raise DamageError("its sha256 is not the one in the commit record", name)
        self._checked[self._number[name]] = hash(stamp)
        return data

    def part(self, name: str, start: int, size: int) -> bytes | memoryview:
        """Read a part of a file; all of it the first time, or when the file has been replaced."""
        key = (self._record.shard, name)
        whole: memoryview | None = self._cache.get(key)
        stamp = int(self._checked[self._number[name]])
        if whole is None and stamp:
            data = self._files.read_range(f"{self._record.path}/{name}", start, size, stamp)
            if data is not None:
                return data
        if whole is None:
            whole = memoryview(self.whole(name))
            self._cache.put(key, whole)
        return whole[start : start + size]


class OpenShard:
    """A shard whose metadata has been checked against plan and record.

    Args:
        objects: reads its files and checks them against the record.
        cache: for decoded chunks, shared between shards.

    Attributes:
        nbytes: of memory that it holds for as long as it is open: what the record says, offsets, indices of chunks.

    Raises:
        DamageError: here and in every method, for content that is not as committed.
    """

    def __init__(self, plan: Plan, record: CommitRecord, objects: Objects, cache: ChunkCache) -> None:
        self._number = record.shard
        self._objects = objects
        self._cache = cache
        self._sizes = {name: item.size for name, item in record.objects.items()}
        self._indices: dict[str, NDArray[np.uint64]] = {}
        self.specs = array_specs(
            plan,
            end_bytes="token_end_byte/zarr.json" in record.objects,
            even=is_even(plan, rows=record.counts.rows, head=record.counts.head_entries),
        )
        lengths = axis_lengths(record.counts)
        try:
            read_group(objects.whole(GROUP), plan, record.spec())
        except DamageError:
            raise
        except ValueError as error:
            raise DamageError(str(error), GROUP) from error
        self._counts = record.counts
        self._documents = record.first_document, record.end_document
        self.layouts = {name: self._layout(spec, lengths[spec.axis]) for name, spec in self.specs.items()}
        self._edges = {name: self._offsets(name, lengths[axis]) for axis, name in OFFSETS.items() if name in self.specs}
        indices = sum(layout.index_bytes for layout in self.layouts.values())  # each is kept from its first use on
        edges = sum(values.nbytes for values in self._edges.values())
        self.nbytes = FILE_BYTES * len(record.objects) + indices + edges

    def _layout(self, spec: ArraySpec, length: int) -> ArrayLayout:
        name = f"{spec.name}/zarr.json"
        try:
            layout = ArrayLayout.from_metadata(
                self._objects.whole(name),
                axis=spec.axis,
                dtype=spec.dtype,
                ranks=spec.ranks,
                by_rank=spec.by_rank,
                second=spec.second,
            )
        except DamageError:
            raise
        except ValueError as error:
            raise DamageError(str(error), name) from error
        if layout.length != length:
            raise DamageError(f"it states {layout.length} values; the commit record says {length}", name)
        longest = spec.layout(length, tokens=self._counts.tokens, rows=self._counts.rows).chunk
        if layout.chunk > longest:
            raise DamageError(
                f"it states chunks of {layout.chunk}; the longest that the format allows is {longest}", name
            )
        size = self._sizes.get(f"{spec.name}/{layout.key}", 0)
        if length and layout.index_bytes > size:
            raise DamageError(f"it states {layout.chunks} chunks; the object has {size} bytes", name)
        return layout

    def _offsets(self, name: str, length: int) -> NDArray[np.int64]:
        values = np.concatenate(self.values(name, 0, self.layouts[name].length))  # uint64: differences would wrap
        if values[0] != 0 or values[-1] != length or np.any(values[1:] < values[:-1]):
            raise DamageError(f"offsets do not rise from 0 to {length}", name)
        return values.astype(np.int64)

    def values(self, name: str, start: int, end: int) -> list[NDArray[Any]]:
        """Return stored values of an array, positions start to end - 1, in pieces: one from each chunk that has some.

        A piece is [N], [N, ranks], or by rank [ranks, N]. It may be a view of the cache: do not write to it.
        """
        layout = self.layouts[name]
        if start >= end:
            empty = (0, *layout.chunk_shape[1:])
            return [np.zeros(empty[::-1] if layout.by_rank else empty, layout.dtype)]
        pieces = []
        for number in range(start // layout.chunk, -(-end // layout.chunk)):
            begin, chunk = number * layout.chunk, self._chunk(name, number)
            cut = slice(max(start - begin, 0), end - begin)
            piece = chunk[:, cut] if layout.by_rank else chunk[cut]
            # As a view, a small piece would keep its whole chunk in memory.
            small = chunk.nbytes > LARGE_CHUNK and 2 * piece.nbytes < chunk.nbytes
            pieces.append(piece.copy() if small else piece)
        return pieces

    def _chunk(self, name: str, number: int) -> NDArray[Any]:
        key = (self._number, name, number)
        kept: NDArray[Any] | None = self._cache.get(key)
        if kept is not None:
            return kept
        layout = self.layouts[name]
        path = f"{name}/{layout.key}"
        try:
            offset, size = self._index(name)[number].tolist()
            decoded = decode_inner(self._objects.part(path, offset, size), layout)
        except DamageError:
            raise
        except ValueError as error:
            raise DamageError(str(error), path) from error
        self._cache.put(key, decoded)
        return decoded

    def _index(self, name: str) -> NDArray[np.uint64]:
        index = self._indices.get(name)
        if index is None:
            layout = self.layouts[name]
            path = f"{name}/{layout.key}"
            size = self._sizes[path]
            tail = self._objects.part(path, size - layout.index_bytes, layout.index_bytes)
            index = self._indices[name] = decode_index(tail, layout, size)
        return index

    @property
    def token_offset(self) -> NDArray[np.int64]:
        """Where each sequence begins on the token axis, and the end of the last."""
        return self._edges["token_offset"]

    def sequences(self, name: str, first: int, end: int, *, targets: bool = True) -> list[NDArray[Any]]:
        """Return what an array holds of sequences first to end - 1, in pieces as `values` does; offsets in one.

        Without targets nothing is read on the row, head and tail axes: every row is there, but empty.
        """
        spec = self.specs[name]
        if not targets and (spec.axis in ("row", "head", "tail") or name in (OFFSETS["head"], OFFSETS["tail"])):
            return [np.zeros(self._length_without_targets(spec, first, end), spec.dtype)]
        if name in self._edges:
            return [self._edges[name][first : end + 1]]
        if name == "document":
            return self._numbers(name, first, end)
        if spec.axis == "sequence":
            return self.values(name, first, end)
        if spec.axis == "token_byte":
            return [self._bits(name, *self._span("token_offset", first, end))]
        return self.values(name, *self._span(OFFSETS[spec.axis], first, end))

    def _length_without_targets(self, spec: ArraySpec, first: int, end: int) -> int:
        if spec.axis == "sequence_edge":
            return end - first + 1
        start, stop = self._span("row_offset", first, end)
        return stop - start if spec.axis == "row" and spec.ranks is None else 0

    def _span(self, offsets: str, first: int, end: int) -> tuple[int, int]:
        edges = self._edges[offsets]
        return int(edges[first]), int(edges[end])

    def _numbers(self, name: str, first: int, end: int) -> list[NDArray[Any]]:
        """Return numbers of documents, which must be the shard's."""
        pieces = self.values(name, first, end)
        least, beyond = self._documents
        for piece in pieces:
            if np.any((piece < least) | (piece >= beyond)):
                raise DamageError(
                    f"it has documents beyond {least} to {beyond - 1}", f"{name}/{self.layouts[name].key}"
                )
        return pieces

    def _bits(self, name: str, start: int, end: int) -> NDArray[np.bool_]:
        packed = np.concatenate(self.values(name, start // 8, -(-end // 8)))
        bits = np.unpackbits(packed).view(bool)
        if end == self._counts.tokens and np.any(bits[start % 8 + end - start :]):
            raise DamageError("its bits beyond the last token are not 0", f"{name}/{self.layouts[name].key}")
        return bits[start % 8 : start % 8 + end - start]
