"""Verification: is every byte of a store what was committed, and does every row mean something? Changes nothing.

The full check reads everything: hashes, checksums, decoding, invariants of rows. The quick one reads plan, remap,
tokenizer, seal and records, and compares the names and sizes of files.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from storage.commit.aside import left_aside
from storage.commit.claims import Claims
from storage.commit.manifest import LARGEST_TOKENIZER, Manifest, tokenizer_hashes, tokenizer_name
from storage.commit.open_shard import FOREIGN, CommittedObjects, DamageError, OpenShard, chunk_cache
from storage.commit.records import (
    COMMITS,
    DIRECTORIES,
    PLAN,
    REMAP,
    SEAL,
    SHARDS,
    TOKENIZER,
    CommitRecord,
    Seal,
    record_name,
)
from storage.errors import CorruptionError, DistillError
from storage.files import open_files
from storage.files.base import QUARANTINE, TEMPORARY, Files, StorePath
from storage.format.decode import decode_batch
from storage.format.encode import counts_of
from storage.format.validate import check_batch
from storage.plan import ShardSpec

HEAD_MASS_TOLERANCE = 1e-5  # sums may be rounded otherwise on another machine


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One damage.

    Attributes:
        shard: its index; None for files of the whole store.
        name: file or directory inside the store.
        message: what is wrong.
        foreign: it is a file that the shard does not have, beside all that it has.
    """

    shard: int | None
    name: str
    message: str
    foreign: bool = False


@dataclass(kw_only=True)
class Report:
    """What a verification found.

    Attributes:
        quick: whether only names and sizes of shard files were checked.
        shards, committed: shards of the plan, and those with a good commit record.
        sealed: whether there is a good seal.
        rows: target rows that were checked (stated by records, for a quick check).
        problems: every damage.
        warnings: what should be known although it is not damage.
    """

    quick: bool
    shards: int = 0
    committed: int = 0
    sealed: bool = False
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 without damage, else the code of CorruptionError."""
        return CorruptionError.exit_code if self.problems else 0

    def add(self, error: str | DistillError, *, name: str, shard: int | None = None, foreign: bool = False) -> None:
        """Note damage."""
        message = error.what if isinstance(error, DistillError) else error
        self.problems.append(Problem(shard=shard, name=name, message=message, foreign=foreign))


def require_whole(path: StorePath, *, advice: str) -> None:
    """Check that everything committed is where it should be, by name and size.

    Args:
        advice: the last line of the message: what to do.

    Raises:
        CorruptionError: something is missing or has another size.
    """
    files = open_files(path)
    problems = verify(files, quick=True).problems
    if problems:
        raise CorruptionError(
            f"the store is damaged: {problems[0].name}: {problems[0].message}",
            where=f"{files}, {len(problems)} problems in all",
            fix=advice,
        )


def verify(path: StorePath, *, quick: bool = False) -> Report:
    """Check a store.

    Args:
        quick: check records, names and sizes only.

    Raises:
        UsageError: there is no store.
        StorageUnavailableError: it cannot be read.
    """
    report = Report(quick=quick)
    files = open_files(path)
    _check_directories(files, report)
    if report.problems:
        return report
    try:
        manifest = Manifest.open(files)
    except CorruptionError as error:
        report.add(error, name=PLAN)
        return report
    report.shards = len(manifest.shards)
    remap = _check_parts(manifest, report)
    seal = _check_seal(manifest, report)
    known = set[str]()
    for spec in manifest.shards:
        record = _check_record(manifest, spec, seal, report)
        if record is not None:
            report.committed += 1
            known.add(_check_shard(manifest, record, None if quick else remap, report))
    _warn_of_strangers(files, manifest, known, report)
    if seal is None and not report.problems:
        report.warnings.append(f"not sealed: {report.committed} of {report.shards} shards are committed")
    return report


def _check_directories(files: Files, report: Report) -> None:
    for name in DIRECTORIES:
        try:
            files.require_directory(name)
        except CorruptionError as error:
            report.add(error, name=name)


def _check_parts(manifest: Manifest, report: Report) -> NDArray[np.uint32] | None:
    """Check remap and tokenizer; return the remap if it is good."""
    most = LARGEST_TOKENIZER
    for name in tokenizer_hashes(manifest.plan):
        try:
            most -= len(manifest.tokenizer_file(name, most=most))
        except CorruptionError as error:
            report.add(error, name=tokenizer_name(name))
    try:
        return manifest.remap()
    except CorruptionError as error:
        report.add(error, name=REMAP)
        return None


def _check_seal(manifest: Manifest, report: Report) -> Seal | None:
    try:
        seal = manifest.seal()
    except CorruptionError as error:
        report.add(error, name=SEAL)
        return None
    report.sealed = seal is not None
    return seal


def _check_record(manifest: Manifest, spec: ShardSpec, seal: Seal | None, report: Report) -> CommitRecord | None:
    name = record_name(spec.index)
    try:
        record = manifest.record(spec)
    except CorruptionError as error:
        report.add(error, name=name, shard=spec.index)
        return None
    found = None if seal is None else seal.shards[spec.index].contradiction(record)
    if found is not None:
        report.add(found[1], name=found[0], shard=None if found[0] == SEAL else spec.index)
    return record


def _check_shard(manifest: Manifest, record: CommitRecord, remap: NDArray[np.uint32] | None, report: Report) -> str:
    """Check a committed shard; return the name of its directory, which may have been left in `tmp`."""
    before = len(report.problems)
    sizes = manifest.files.tree(record.path)
    if sizes is None and manifest.files.exists(record.path):
        report.add("it is not a directory", name=record.path, shard=record.shard)
        return record.path
    if sizes is None:
        aside = left_aside(manifest.files, record)
        left = f": a garbage collection was cut off, and left it in {aside}; `pipeline repair` puts it back"
        report.add(f"the directory is missing{left if aside else ''}", name=record.path, shard=record.shard)
        return aside or record.path
    for name in sorted(sizes.keys() - record.objects.keys()):
        report.add(FOREIGN, name=f"{record.path}/{name}", shard=record.shard, foreign=True)
    for name, item in record.objects.items():
        if name not in sizes:
            report.add("the file is missing", name=f"{record.path}/{name}", shard=record.shard)
        elif sizes[name] != item.size:
            found = f"it has {sizes[name]} bytes" if sizes[name] >= 0 else "it is not a regular file"
            message = f"{found}; the commit record says {item.size}"
            report.add(message, name=f"{record.path}/{name}", shard=record.shard)
    if not report.quick:
        _check_content(manifest, record, remap, report, decode=len(report.problems) == before)
    report.rows += record.counts.rows
    return record.path


def _check_content(
    manifest: Manifest, record: CommitRecord, remap: NDArray[np.uint32] | None, report: Report, *, decode: bool
) -> None:
    objects = CommittedObjects(manifest.files, record, chunk_cache(0))
    told = {problem.name for problem in report.problems}
    for full, name in ((f"{record.path}/{name}", name) for name in record.objects):
        if full in told:
            continue
        try:
            objects.whole(name)
        except DamageError as error:
            decode = False
            report.add(error.problem, name=full, shard=record.shard)
    if not decode or remap is None:
        return
    try:
        _check_rows(manifest, record, objects, remap)
    except (ValueError, DistillError) as error:
        report.add(f"its rows: {error}", name=record.path, shard=record.shard)


def _check_rows(manifest: Manifest, record: CommitRecord, objects: CommittedObjects, remap: NDArray[np.uint32]) -> None:
    shard = OpenShard(manifest.plan, record, objects, chunk_cache(0))
    slices = {name: shard.sequences(name, 0, record.counts.sequences) for name in shard.specs}
    batch = decode_batch(manifest.plan, [slices], remap)
    check_batch(manifest.plan, record.spec(), batch)
    found = counts_of(manifest.plan, batch)
    if abs(found.head_mass - record.counts.head_mass) > HEAD_MASS_TOLERANCE:
        raise ValueError(f"head mass is {found.head_mass}; the commit record says {record.counts.head_mass}")


def _warn_of_strangers(files: Files, manifest: Manifest, known: set[str], report: Report) -> None:
    """Warn of files that nothing refers to. They are never read."""
    expected = {
        ".": {PLAN, REMAP, TOKENIZER, SHARDS, COMMITS, SEAL, TEMPORARY},
        TEMPORARY: set(),
        TOKENIZER: {tokenizer_name(name).split("/")[1] for name in tokenizer_hashes(manifest.plan)},
        COMMITS: {record_name(spec.index).split("/")[1] for spec in manifest.shards},
        SHARDS: set(),
    }
    for directory, names in expected.items():
        for name in sorted(files.entries(directory) - names):
            label = name if directory == "." else f"{directory}/{name}"
            if label not in known:
                report.warnings.append(f"{label}: {_stranger(files, directory, name)}")


def _stranger(files: Files, directory: str, name: str) -> str:
    if name == QUARANTINE:
        return "holds what was moved out of the way"
    if directory == TEMPORARY:
        return f"{Claims(files).about(name)}; `pipeline gc` removes such files while no worker runs"
    return "nothing refers to it"
