"""Does a store return right rows, an error, or, what must never be, wrong rows?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from storage.errors import DistillError
from storage.reader import StoreReader
from storage.rows import SequenceBatch

Fingerprints = Mapping[int, str]  # by shard


def fingerprint(batch: SequenceBatch) -> str:
    """Hash of every value of a batch, with names, types and shapes."""
    found = hashlib.sha256()
    for item in fields(batch):
        value = getattr(batch, item.name)
        for name, part in value.items() if isinstance(value, Mapping) else [(item.name, value)]:
            array = np.asarray([] if part is None else part)
            if array.dtype.hasobject:
                raise TypeError(f"{name} is not numbers: teach this function to compare it")
            found.update(f"{item.name} {name} {part is None} {array.dtype} {array.shape};".encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


@dataclass
class Reading:
    """What reading a whole store gave.

    Attributes:
        right, wrong: shards whose rows are, or are not, those of the reference.
        errors: what was raised instead, by shard; -1 for opening.
    """

    right: list[int] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)
    errors: dict[int, DistillError] = field(default_factory=dict)


def fingerprints(path: Path) -> dict[int, str]:
    """Fingerprint of every shard of a good store."""
    found: dict[int, str] = {}
    for split in ("train", "heldout"):
        reader = StoreReader(path, split=split)
        found |= {shard: fingerprint(reader.read(indices)) for shard, indices in _sequences(reader)}
    return found


def read_again(reader: StoreReader, reference: Fingerprints, reading: Reading) -> None:
    """Read every shard of an open reader and add what came."""
    for shard, indices in _sequences(reader):
        try:
            right = fingerprint(reader.read(indices)) == reference[shard]
        except DistillError as error:
            reading.errors[shard] = error
        else:
            (reading.right if right else reading.wrong).append(shard)


def read_store(path: Path, reference: Fingerprints, *, allow_partial: bool = False) -> Reading:
    """Open a store and read all of it, shard by shard. Anything but right rows and our errors goes through."""
    reading = Reading()
    for split in ("train", "heldout"):
        try:
            reader = StoreReader(path, split=split, allow_partial=allow_partial)
            reader.tokenizer_files()  # checked when they are asked for
        except DistillError as error:
            reading.errors[-1] = error
            return reading
        read_again(reader, reference, reading)
    return reading


def _sequences(reader: StoreReader) -> list[tuple[int, range]]:
    """Numbers of the sequences of each shard of the reader's split."""
    found, start = [], 0
    for item in reader.shards:
        found.append((item.shard, range(start, start + item.sequences)))
        start += item.sequences
    return found
