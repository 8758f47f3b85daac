"""Defects planted into the store's code, to prove that the studies in this folder would find them.

Each is a small substitution in the real modules for as long as `planted` lasts: what a hurried change could bring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import storage.commit.open_shard
import storage.files.local as files
import storage.format.chunks
from storage.commit.manifest import Manifest
from storage.commit.records import SEAL, CommitRecord, Seal
from storage.files.local import LocalFiles
from storage.tools import gc
from storage.writer import StoreWriter

Substitutes = list[tuple[Any, str, Any]]  # where, name, what stands there instead


class _AnyHash(str):
    """Equal to every hash."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


class _AnyBytes(bytes):
    """Equal to every checksum."""

    __hash__ = bytes.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def _write_without_sync(path: str, data: bytes, folder: int | None = None, *, synced: bool = True) -> None:
    _WRITE_FILE(path, data, folder, synced=False)


def _write_and_sync_again(path: str, data: bytes, folder: int | None = None, *, synced: bool = True) -> None:
    with ExitStack() as opened:
        descriptor = files._open(path, files._CREATE, opened, folder)
        files._write(descriptor, data)
        try:
            files.os.fsync(descriptor)
        except OSError:
            files.os.fsync(descriptor)


def _write_tree_without_file_syncs(name: str, objects: Mapping[str, bytes], point: str, folder: int) -> None:
    with ExitStack() as opened:
        files._make_directory(name, folder, exclusively=True)
        folders = {"": files._open(name, files._DIRECTORY, opened, folder)}
        for path, data in objects.items():
            inside, _, last = path.rpartition("/")
            files._make_folders(inside, folders, opened)
            _WRITE_FILE(last, data, folders[inside], synced=False)
        for made in folders.values():
            files._sync_directory(made)


def _write_once(descriptor: int, data: bytes) -> None:
    files.os.write(descriptor, data)


def _write_as_far_as_it_goes(descriptor: int, data: bytes) -> None:
    try:
        _WRITE(descriptor, data)
    except OSError:
        return


def _no_sync(*arguments: Any) -> None:
    """Nothing."""


_WRITE, _WRITE_FILE, _TREE, _CREATE, _WRITE_DIRECTORY = (
    files._write,
    files._write_file,
    LocalFiles.tree,
    LocalFiles.create,
    StoreWriter._write_directory,
)
_AT_HAND: list[tuple[StoreWriter, CommitRecord, Mapping[str, bytes]]] = []  # the shard that is being committed


def _create_by_rename(
    self: LocalFiles, name: str, data: bytes, *, point: str | None = None, durable: bool = True
) -> bool:
    path = self.root / name
    with files.storage_errors(path), self._temporary() as (making, temporary):
        files._write_file(temporary, data, making)
        files.os.rename(temporary, path, src_dir_fd=making)
        files._sync_directory(path.parent)
    return True


def _create_in_place(
    self: LocalFiles, name: str, data: bytes, *, point: str | None = None, durable: bool = True
) -> bool:
    path = self.root / name
    with files.storage_errors(path):
        try:
            files._write_file(path, data)
        except FileExistsError:
            return False
        files._sync_directory(path.parent)
    return True


def _prepare_what_is_missing(self: LocalFiles, *directories: str) -> None:
    with files.storage_errors(self.root):
        for path in (self.root, *(self.root / name for name in directories)):
            if not path.exists():
                files._make_directory(path)
                files._sync_directory(path.parent)


def _write_directory_later(self: StoreWriter, record: CommitRecord, objects: Mapping[str, bytes]) -> None:
    _AT_HAND[:] = [(self, record, objects)]


def _create_then_write_directory(
    self: LocalFiles, name: str, data: bytes, *, point: str | None = None, durable: bool = True
) -> bool:
    created = _CREATE(self, name, data, point=point, durable=durable)
    if point == "record":
        writer, record, objects = _AT_HAND[0]
        _WRITE_DIRECTORY(writer, record, objects)
    return created


def _write_directory_and_remember(self: StoreWriter, record: CommitRecord, objects: Mapping[str, bytes]) -> None:
    _AT_HAND[:] = [(self, record, objects)]
    _WRITE_DIRECTORY(self, record, objects)


def _seal_then_create(
    self: LocalFiles, name: str, data: bytes, *, point: str | None = None, durable: bool = True
) -> bool:
    if point == "record":
        writer, record, _ = _AT_HAND[0]
        if len(writer.missing()) == 1:
            seal = Seal.of(writer.plan.store_id, [*writer._records.values(), record])
            _CREATE(self, SEAL, seal.to_json(), point="seal")
    return _CREATE(self, name, data, point=point, durable=durable)


def _tree_of_known_names(self: LocalFiles, name: str) -> dict[str, int] | None:
    found = _TREE(self, name)
    return found and {one: size for one, size in found.items() if one.endswith(("zarr.json", "c/0", "c/0/0"))}


def _record_before_claims(manifest: Manifest, path: str) -> bool:
    record = manifest.record(manifest.shards[int(path.split("/")[1].split("-")[0])])
    gc._refuse_workers(manifest.files)
    return record is not None and record.path == path


def _move_without_sync(self: LocalFiles, name: str, target: str) -> bool:
    files.os.rename(self.root / name, self.root / target)
    return True


def _bugs() -> dict[str, Substitutes]:
    """Every planted defect by its name."""
    return {
        "small files are not synced": [(files, "_write_file", _write_without_sync)],
        "the files of a shard are not synced": [(files, "_write_tree", _write_tree_without_file_syncs)],
        "directories are not synced": [(files, "_sync_directory", _no_sync)],
        "links of a dead process are not synced": [(LocalFiles, "prepare", _prepare_what_is_missing)],
        "links of a sleeping process are not synced": [(LocalFiles, "settle", _no_sync)],
        "rename instead of link for the record": [(LocalFiles, "create", _create_by_rename)],
        "the record is written in place": [(LocalFiles, "create", _create_in_place)],
        "the record comes before the data": [
            (StoreWriter, "_write_directory", _write_directory_later),
            (LocalFiles, "create", _create_then_write_directory),
        ],
        "the seal comes before the last record": [
            (StoreWriter, "_write_directory", _write_directory_and_remember),
            (LocalFiles, "create", _seal_then_create),
        ],
        "a failed sync is tried again": [(files, "_write_file", _write_and_sync_again)],
        "a short write passes for a whole one": [(files, "_write", _write_once)],
        "a full disk is not told": [(files, "_write", _write_as_far_as_it_goes)],
        "a directory that is there is trusted": [(StoreWriter, "_holds", lambda self, record: True)],
        "a seal does not look for its shards": [(StoreWriter, "_check_directories", _no_sync)],
        "garbage collection looks for claims last": [(gc, "_in_use", _record_before_claims)],
        "what is put back is not synced": [(LocalFiles, "move_directory", _move_without_sync)],
        "the reader checks no hash": [(storage.commit.open_shard, "sha256", lambda data: _AnyHash())],
        "chunks are decoded unchecked": [(storage.format.chunks, "_crc", lambda data: _AnyBytes())],
        "foreign files are not looked for": [(LocalFiles, "tree", _tree_of_known_names)],
    }


BUGS = tuple(_bugs())


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Plant a defect by its name while this lasts; None plants nothing."""
    with ExitStack() as kept:
        for where, attribute, instead in _bugs()[name] if name else []:
            kept.callback(setattr, where, attribute, getattr(where, attribute))
            setattr(where, attribute, instead)
        yield
