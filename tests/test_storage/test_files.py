"""What a store needs of its files, asked of every class of `Files`; and the seam: nobody else knows where they lie."""

from __future__ import annotations

import ast
import threading
from pathlib import Path

import pytest

from storage.errors import CorruptionError, UsageError
from storage.files import open_files
from storage.files.base import Files, Stamp
from storage.files.local import LocalFiles
from storage.files.memory import MemoryFiles

ROOT = Path(__file__).parent.parent.parent
DIRECTORY = {"zarr.json": b"{}", "entropy/c/0": b"12345"}


@pytest.fixture
def files(fresh) -> Files:
    """A store that is prepared and empty."""
    files = open_files(fresh)
    files.prepare("tmp", "commits", "shards")
    return files


def test_nothing_is_there_before_and_after_it_is_prepared(fresh):
    files = open_files(fresh)
    for _ in range(2):
        assert files.read("commits/0") is None
        assert files.read_stamped("commits/0") is None
        assert files.read_range("commits/0", 0, 1, 7) is None
        assert not files.exists("commits/0")
        assert files.entries("commits") == set()
        assert files.tree("commits/0") is None
        assert not files.root_is_file()
        files.prepare("commits")
        files.prepare("commits")


def test_a_file_is_created_once(files):
    assert files.create("commits/0", b"first", point="record")
    assert not files.create("commits/0", b"second", durable=False)
    assert files.create("plan.json", b"")
    assert (files.read("commits/0"), files.read("plan.json")) == (b"first", b"")
    assert (files.exists("commits/0"), files.exists("commits"), files.exists("commits/00")) == (True, True, False)
    assert files.entries("tmp") == set()
    assert "plan.json" in files.entries()
    assert files.entries("commits") == {"0"}
    files.settle("commits")


def test_a_file_that_is_too_large_is_not_read(files):
    files.create("commits/0", b"12345")
    assert files.read("commits/0", most=5) == b"12345"
    for read in (files.read, files.read_stamped):
        with pytest.raises(CorruptionError, match="it has 5 bytes, more than the 4 that it may have"):
            read("commits/0", most=4)


def test_of_many_that_create_a_file_at_once_one_is_told_so(files):
    begin, told = threading.Barrier(8), []

    def create(number):
        begin.wait()
        told.append((files.create("commits/0", str(number).encode()), number))

    threads = [threading.Thread(target=create, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [number for created, number in told if created]
    assert files.read("commits/0") == str(winner).encode()


def test_a_directory_is_no_file(files):
    files.create_directory("shards/a", DIRECTORY, point="shard")
    for name, told in (
        ("shards/a", "it is a directory, not a file"),
        ("shards/a/entropy", "it is a directory, not a file"),
        ("shards/a/zarr.json/x", r"shards/a/zarr\.json is a file, not a directory"),
    ):
        for read in (files.read, files.read_stamped):
            with pytest.raises(CorruptionError, match=f"^{told}") as caught:
                read(name)
            assert caught.value.where == files.place(name.removesuffix("/x"))
    files.require_directory("shards/a")
    files.require_directory("shards/none")
    with pytest.raises(CorruptionError, match=r"^shards/a/zarr\.json is a file, not a directory"):
        files.require_directory("shards/a/zarr.json")
    assert not files.create("shards/a", b"")
    assert files.entries("shards/a/zarr.json") == set()
    assert files.tree("shards/a/zarr.json") is None


def test_a_directory_is_created_once_with_all_its_files(files):
    assert files.create_directory("shards/a", DIRECTORY, point="shard")
    assert not files.create_directory("shards/a", {"zarr.json": b"other", "more": b""}, point="shard")
    files.create("shards/b", b"a file")
    assert not files.create_directory("shards/b", DIRECTORY, point="shard")
    assert files.tree("shards/a") == {"zarr.json": 2, "entropy/c/0": 5}
    assert files.tree(".") == {"shards/a/zarr.json": 2, "shards/a/entropy/c/0": 5, "shards/b": 6}
    assert files.entries("shards/a") == {"zarr.json", "entropy"}
    assert files.entries("tmp") == set()
    assert {name: files.read(f"shards/a/{name}") for name in DIRECTORY} == DIRECTORY


def test_a_part_is_read_while_the_file_is_the_same(files):
    files.create("commits/0", b"0123456789")
    data, stamp = files.read_stamped("commits/0")
    assert (data, stamp.size) == (b"0123456789", 10)
    assert files.read_stamped("commits/0")[1] == stamp
    assert files.read_range("commits/0", 3, 4, hash(stamp)) == b"3456"
    assert files.read_range("commits/0", 8, 4, hash(stamp)) == b"89"
    assert files.read_range("commits/0", 3, 4, hash(Stamp(stamp.inode + 1, 10, stamp.modified))) is None
    files.quarantine("commits/0")
    files.create("commits/0", b"0123456789")
    again = files.read_stamped("commits/0")[1]
    assert again != stamp, "the same content in another file"
    assert files.read_range("commits/0", 3, 4, hash(stamp)) is None
    assert files.read_range("commits/0", 3, 4, hash(again)) == b"3456"
    files.remove("commits/0")
    assert files.read_range("commits/0", 3, 4, hash(again)) is None


def test_what_is_quarantined_keeps_a_name_of_its_own(files):
    assert files.quarantine("shards/a") is None
    names = []
    for content in (b"first", b"second", b"third"):
        files.create("commits/0.json", content)
        names.append(files.quarantine("commits/0.json"))
        assert not files.exists("commits/0.json")
    assert names[0] == "quarantine/commits-0.json"
    assert all(name.startswith("quarantine/commits-0.json.") for name in names[1:])
    assert [files.read(name) for name in names] == [b"first", b"second", b"third"]
    files.create_directory("shards/a", DIRECTORY, point="shard")
    assert files.quarantine("shards/a") == "quarantine/shards-a"
    assert files.tree("quarantine/shards-a") == {"zarr.json": 2, "entropy/c/0": 5}
    assert files.entries("shards") == set()


def test_a_directory_moves_once_and_over_nothing(files):
    assert not files.move_directory("shards/a", "tmp/a")
    files.create_directory("shards/a", DIRECTORY, point="shard")
    assert files.move_directory("shards/a", "tmp/a")
    assert files.tree("shards/a") is None
    assert files.tree("tmp/a") == {"zarr.json": 2, "entropy/c/0": 5}
    files.create_directory("shards/a", {"zarr.json": b"other"}, point="shard")
    assert not files.move_directory("tmp/a", "shards/a")
    assert files.read("shards/a/zarr.json") == b"other"
    assert files.tree("tmp/a") == {"zarr.json": 2, "entropy/c/0": 5}


def test_files_and_directories_are_removed(files):
    for name in ("shards/a", "shards/ab"):
        files.create_directory(name, DIRECTORY, point="shard")
    files.create("commits/0", b"")
    files.remove("shards/a")
    files.remove("commits/0", durable=False)
    files.remove("commits/0")
    assert files.entries("shards") == {"ab"}
    assert files.entries("commits") == set()
    assert files.read("shards/ab/zarr.json") == b"{}"


def test_names_in_messages(files, store_at):
    assert files.place("plan.json") == f"{files}/plan.json"
    assert "store" in str(files)
    assert files.contains(files)
    assert not files.contains(open_files(store_at("store-other")))


def test_a_place_inside_of_a_store_and_one_that_is_a_file(tmp_path):
    files = open_files(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "store")
    (tmp_path / "file").write_text("x")
    for name in ("", "store", "store/deeper", "link/deeper"):
        assert files.contains(open_files(tmp_path / name)), name
    assert open_files(tmp_path / "store").contains(open_files(tmp_path / "link"))
    assert not open_files(tmp_path / "store").contains(files)
    assert not files.contains(MemoryFiles())
    assert open_files(tmp_path / "file").root_is_file()
    assert not files.root_is_file()


def test_files_are_opened_by_path_and_handed_through(tmp_path):
    files = MemoryFiles()
    assert open_files(files) is files
    assert open_files(tmp_path) == open_files(str(tmp_path)) == LocalFiles(tmp_path)
    for path in ("a/b", "a:b/c", "s3", "c:/store", "./s3", "/s3:/x"):
        assert str(open_files(path)) == str(Path(path))


@pytest.mark.parametrize("url", ["s3://bucket/a/store", "S3://bucket", "gs://b/s", "file:///tmp/s", "memory://x"])
def test_a_url_is_refused_also_after_it_was_a_path(url):
    for store in (url, Path(url)):
        with pytest.raises(UsageError, match="a store is a directory so far") as caught:
            open_files(store)
        assert caught.value.where in (url, url.replace(":///", "://"))
        assert "directory" in caught.value.fix


def tells_of_directories(source: str) -> list[str]:
    """What a module says of how a store's files lie: classes that do it, and roots."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = node.module if isinstance(node, ast.ImportFrom) else None
        for name in (*names, module):
            if name in ("LocalFiles", "MemoryFiles", "storage.files.local", "storage.files.memory"):
                found.append(f"line {node.lineno}: imports {name}")
        if isinstance(node, ast.Attribute) and node.attr in ("root", "LocalFiles", "MemoryFiles"):
            found.append(f"line {node.lineno}: .{node.attr}")
    return found


def test_nothing_else_knows_that_a_store_is_a_directory():
    modules = [
        file for package in ("storage", "pipeline", "stages", "benchmarks") for file in ROOT.glob(f"{package}/**/*.py")
    ]
    outside = [file for file in modules if ROOT / "storage/files" not in file.parents]
    assert len(outside) > 100
    assert {str(file): found for file in outside if (found := tells_of_directories(file.read_text()))} == {}


def test_the_seam_is_seen_where_it_is_broken():
    source = "from storage.files.local import LocalFiles\nimport storage.files.memory\nx = files.root / 'plan.json'\n"
    assert len(tells_of_directories(source)) == 4
