"""The reader: sequences of a store by number, in any order, and not one damaged row.

Data path: seal -> records -> verified shards -> chunks -> **`SequenceBatch`** -> training. Opening reads plan, remap,
seal and the split's records; a shard's metadata are read and checked when it is first used, each array's object before
its first value is, and the tokenizer's files when they are asked for. State is never found by listing a directory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.cache import BoundedCache
from storage.commit.damage import written_by
from storage.commit.manifest import LARGEST_TOKENIZER, Manifest, tokenizer_hashes
from storage.commit.open_shard import FOREIGN, CommittedObjects, DamageError, OpenShard, chunk_cache, no_stamps
from storage.commit.records import CommitRecord, Seal, SealedShard
from storage.errors import CorruptionError, IdentityError, UnfinishedError, UsageError
from storage.files import open_files
from storage.files.base import StorePath
from storage.format.arrays import array_specs
from storage.format.decode import Slices, decode_batch
from storage.plan import SPLITS, Plan, Split
from storage.rows import SequenceBatch
from storage.segments import row_starts
from storage.threads import Each, default_threads, in_threads

Indices = Sequence[int] | NDArray[np.integer]
Run = tuple[SealedShard, int, int]  # neighbouring sequences in one shard: it, the first, the end
CACHE_BYTES = 256 * 2**20
ROWS_FOR_THREADS = 8192  # a read of fewer gains little, and memory that threads free is slower to be used again
OPEN_BYTES = 32 * 2**20  # of the metadata of shards that is kept: about 40 kB each, and 32 bytes for each sequence


class StoreReader:
    """A store open for reading one of its splits. Threads may share it: one loads at a time, all decode.

    Args:
        split: `train` or `heldout`; sequences of the other split cannot be reached.
        allow_partial: read an unsealed store as the set of shards that are committed now.
        cache_bytes: bound on what is kept in memory of shards: decoded chunks and checked files.
        threads: that a large `read` may use; None for one per core, at most 4. The result is the same.
        expected_digest: that the store must have; None for any. It vouches for all that the reader gives.

    Attributes:
        plan: what the store was made from and what its rows hold.
        remap: uint32 [V], token id of each frequency rank.
        digest: sha256 (hex) of the seal; of a partial store, of the seal that its frozen set of shards would have.
        shards: the shards of this split that are read, in order.
        rows, tokens: target rows and tokens of the split.
        starts: int64 [shards + 1], number of the first sequence of each shard, and of all sequences.

    Raises:
        UsageError: no store there, or it is not sealed and `allow_partial` is not given.
        IdentityError: the store has another digest than the expected one.
        CorruptionError: a file of the store is missing, empty, short, altered, swapped or foreign. It names the shard,
            the file, the documents, and the command that repairs it. All reading methods raise it too.
    """

    def __init__(
        self,
        path: StorePath,
        *,
        split: Split = "train",
        allow_partial: bool = False,
        cache_bytes: int = CACHE_BYTES,
        threads: int | None = None,
        expected_digest: str | None = None,
    ) -> None:
        if split not in SPLITS:
            raise UsageError(f"split {split!r} is neither 'train' nor 'heldout'")
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}; a reader needs at least 1")
        self._files = open_files(path)
        self._manifest = Manifest.open(self._files)
        self._cache = chunk_cache(cache_bytes)
        self._threads = default_threads() if threads is None else threads
        self._loading = threading.Lock()  # held while shards are opened and chunks loaded, not while rows are decoded
        self._checked: dict[int, NDArray[np.int64]] = {}  # of shards that were used, half a kilobyte each
        self._open: BoundedCache[OpenShard] = BoundedCache(OPEN_BYTES, lambda shard: min(shard.nbytes, OPEN_BYTES))
        self.plan: Plan = self._manifest.plan
        self.split: Split = split
        self.remap: NDArray[np.uint32] = self._manifest.remap()
        seal = self._sealed(allow_partial)
        self.digest: str = seal.digest
        if expected_digest is not None and self.digest != expected_digest:
            raise IdentityError(
                f"the store has the digest {self.digest}, expected is {expected_digest}",
                where=str(self._files),
                fix="name the store with that digest; `pipeline status` prints a store's own",
            )
        self.shards: tuple[SealedShard, ...] = tuple(item for item in seal.shards if item.split == split)
        self.rows: int = sum(item.rows for item in self.shards)
        self.tokens: int = sum(item.tokens for item in self.shards)
        self.starts: NDArray[np.int64] = row_starts(np.array([item.sequences for item in self.shards], np.int64))
        for item in self.shards:
            if item.sequences == 0:
                self._shard(item)  # nothing will be read from it, so this is where it has to prove that it is empty

    def _sealed(self, allow_partial: bool) -> Seal:
        seal = self._manifest.seal()
        if seal is not None:
            for item in seal.shards:  # before any of their numbers is used
                if item.split == self.split:
                    self._manifest.require_sealed(item)
            return seal
        records = [record for spec in self._manifest.shards if (record := self._manifest.record(spec)) is not None]
        if not allow_partial:
            raise UnfinishedError(
                f"the store is not finished: {len(records)} of {len(self._manifest.shards)} shards are committed"
                " and it is not sealed",
                where=str(self._files),
                fix=f"run the same `{written_by(self.plan)}` again to finish it",
            )
        return Seal.of(self.plan.store_id, records)

    def __len__(self) -> int:
        """Return the number of sequences of the split."""
        return int(self.starts[-1])

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the teacher's tokenizer files by name, as they were; each is checked by its hash here."""
        found: dict[str, bytes] = {}
        for name in tokenizer_hashes(self.plan):
            found[name] = self._manifest.tokenizer_file(name, most=LARGEST_TOKENIZER - sum(map(len, found.values())))
        return found

    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each sequence, int64 [S]. Opens every shard of the split."""
        parts = []
        for item in self.shards:
            with self._loading:
                parts.append(np.diff(self._shard(item).token_offset))
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def read(self, indices: Indices, *, targets: bool = True, scaled: bool = True) -> SequenceBatch:
        """Return sequences by their number in the split, in the order asked.

        Args:
            indices: numbers in range(len(self)); repeats are allowed.
            targets: False reads no head, tail or value of a row: heads and tails are empty, values 0.
            scaled: False leaves log-probabilities as they are stored: the codec gives back what it was given, but the
                heads do not have the mass that `tail_logit` leaves them.

        Raises:
            IndexError: a number is out of range.
            CorruptionError: as above; nothing is returned then.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(wanted) and (int(wanted.min()) < 0 or int(wanted.max()) >= len(self)):
            raise IndexError(f"sequence numbers {wanted.min()} to {wanted.max()}; the split has {len(self)}")
        runs = list(self._runs(wanted))
        with in_threads(self._threads_for(wanted) if targets else 1) as each:
            cuts = self._load(runs, each, targets=targets) or [self._nothing()]
            try:
                return decode_batch(self.plan, cuts, self.remap, targets=targets, scaled=scaled, each=each)
            except ValueError as error:
                for run, cut in zip(runs, cuts, strict=True):
                    self._decode_alone(run[0], cut, targets=targets)
                raise AssertionError("damage in a batch, but in none of its parts") from error

    def _threads_for(self, wanted: NDArray[np.int64]) -> int:
        return self._threads if len(wanted) * self.rows > len(self) * ROWS_FOR_THREADS else 1

    def _runs(self, wanted: NDArray[np.int64]) -> Iterator[Run]:
        """Cut sequence numbers into runs of neighbours in one shard: (shard, first, end) with numbers inside it."""
        if len(wanted) == 0:
            return
        position = np.searchsorted(self.starts, wanted, side="right") - 1
        new = (np.diff(wanted) != 1) | (np.diff(position) != 0)
        edges = [0, *(np.flatnonzero(new) + 1).tolist(), len(wanted)]
        for start, end in pairwise(edges):
            first = int(wanted[start] - self.starts[position[start]])
            yield self.shards[int(position[start])], first, first + end - start

    def _load(self, runs: Sequence[Run], each: Each, *, targets: bool) -> list[Slices]:
        """Return the stored values of each run. An array is loaded by one thread, from every shard that it is in."""

        def load(name: str) -> list[Sequence[NDArray[Any]]]:
            found: list[Sequence[NDArray[Any]]] = []
            for shard, (item, first, end) in zip(shards, runs, strict=True):
                try:
                    found.append(shard.sequences(name, first, end, targets=targets) if name in shard.specs else ())
                except DamageError as error:
                    raise self._damaged(item, error) from error
            return found

        with self._loading:
            shards = [self._shard(item) for item, _, _ in runs]
            names = list(dict.fromkeys(name for shard in shards for name in shard.specs))
            loaded = dict(zip(names, each(load, names), strict=True))
        return [{name: loaded[name][index] for name in shard.specs} for index, shard in enumerate(shards)]

    def _decode_alone(self, item: SealedShard, cut: Slices, *, targets: bool) -> None:
        try:
            decode_batch(self.plan, [cut], self.remap, targets=targets)
        except ValueError as error:
            raise self._damaged(item, DamageError(f"its rows: {error}")) from error

    def _nothing(self) -> Slices:
        """Return the slices of no sequence."""
        nothing: dict[str, list[NDArray[Any]]] = {}
        for spec in array_specs(self.plan, end_bytes=True, even=False).values():
            shape = (0,) if spec.ranks is None else (spec.ranks, 0)
            nothing[spec.name] = [np.zeros((1,) if spec.axis == "sequence_edge" else shape, spec.dtype)]
        return nothing

    def _shard(self, item: SealedShard) -> OpenShard:
        shard = self._open.get(item.shard)
        if shard is None:
            record = self._manifest.sealed_record(item)
            try:
                shard = OpenShard(self.plan, record, self._objects(record), self._cache)
            except DamageError as error:
                raise self._damaged(item, error) from error
            self._open.put(item.shard, shard)
        return shard

    def _objects(self, record: CommitRecord) -> CommittedObjects:
        """Return the files of a shard. The first time, its directory must hold no others: those would never be read."""
        checked = self._checked.get(record.shard)
        if checked is None:
            for name in sorted((self._files.tree(record.path) or {}).keys() - record.objects.keys()):
                raise DamageError(FOREIGN, name)
            checked = self._checked[record.shard] = no_stamps(record)
        return CommittedObjects(self._files, record, self._cache, checked)

    def _damaged(self, item: SealedShard, error: DamageError) -> CorruptionError:
        spec = self._manifest.shards[item.shard]
        record = self._manifest.sealed_record(item)
        name = record.path if error.name is None else f"{record.path}/{error.name}"
        return self._manifest.damage.shard(spec, str(error), name=name, whole=error.problem == FOREIGN)
