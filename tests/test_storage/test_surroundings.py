"""Links and special files in a store: never followed, never waited for, and everybody comes to the same verdict."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import storage_cases as cases
from seam import Call, watched
from special_files import SPECIAL, neither_waits_nor_swells, precious, put_in_place, state_of
from torture_results import save

from storage.errors import CorruptionError, DistillError
from storage.reader import StoreReader
from storage.tools.convert import Conversion, convert
from storage.tools.diff import diff
from storage.tools.gc import collect_garbage
from storage.tools.repair import repair
from storage.tools.status import status
from storage.tools.verify import verify

KINDS = (*SPECIAL, "link to what was there")
OF_THE_STORE = ("tokenizer", "commits", "shards", "tmp", "quarantine")  # its directories


def read_all(store: Path) -> None:
    for split in ("train", "heldout"):
        reader = StoreReader(store, split=split, allow_partial=True)
        reader.read(range(len(reader)))
        reader.tokenizer_files()


COMMANDS: dict[str, Callable[[Path], object]] = {
    "verify --quick": lambda store: verify(store, quick=True),
    "verify": verify,
    "status": status,
    "read": read_all,
    "diff": lambda store: diff(store, store),
    "convert": lambda store: list(convert(store, store.parent / "new", Conversion(k=3))),
    "extract": cases.write_store,
    "gc": lambda store: collect_garbage(store, apply=False),
    "gc --yes": lambda store: collect_garbage(store, apply=True),
    "repair": lambda store: repair(store, apply=False),
    "repair --yes": lambda store: repair(store, apply=True),
}
NEED_A_PART = ("status", "diff", "extract", "repair")  # of the files; equal digests are enough for `diff`


@pytest.fixture
def store(memory, sealed) -> Path:
    store = Path(shutil.copytree(sealed, memory / "store"))
    (store / "quarantine").mkdir(exist_ok=True)
    return store


def run(command: str, store: Path) -> int:
    """Exit code of a command."""
    shutil.rmtree(store.parent / "new", ignore_errors=True)
    try:
        with neither_waits_nor_swells():
            done = COMMANDS[command](store)
    except DistillError as error:
        return error.exit_code if error.where and error.fix else 70
    return done.exit_code if command.startswith("verify") else 0


def names_in(store: Path) -> list[str]:
    """Every file and directory of a store, of its shards those of one; they are all alike."""
    found = {path.relative_to(store).as_posix() for path in store.rglob("*")}
    others = ("shards/", "commits/")
    return sorted({*OF_THE_STORE, *(name for name in found if not name.startswith(others) or "/000001" in name)})


def judge(store: Path, name: str, kind: str) -> list[str]:
    """Put something in place of a file or directory; return what commands do wrong."""
    whole = cases.tree(store)
    put_in_place(store / name, kind, store.parent / "aside")
    wrong = []
    codes = {command: run(command, store) for command in COMMANDS if command != "repair --yes"}
    mended_by_user = name == "plan.json" or name in OF_THE_STORE
    for command, code in codes.items():
        part_is_enough = not mended_by_user and command in NEED_A_PART
        if code not in ((0, 4) if part_is_enough else (4,)):
            wrong.append(f"{command}: exit {code}")
    if codes["extract"] == 0 and name.startswith(("commits/", "sealed", "remap", "tokenizer/")):
        wrong.append("extract: exit 0")
    code = run("repair --yes", store)
    if code != (4 if mended_by_user else 0):
        wrong.append(f"repair --yes: exit {code}")
    if not mended_by_user:
        shutil.rmtree(store / "quarantine")
        cases.write_store(store)
        if cases.tree(store) != whole or verify(store).problems:
            wrong.append("repair and extraction do not mend it")
    return wrong


SAMPLED = (
    "plan.json", "remap", "sealed.json", "tokenizer/tokenizer.json.xz", "commits/000001.json", *OF_THE_STORE,
    "shards/000001-*", "shards/000001-*/zarr.json", "shards/000001-*/head_ids", "shards/000001-*/head_ids/c/0/0",
)  # fmt: skip


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("kind", ["named pipe", "directory", "link to nothing", "sparse", "link to what was there"])
def test_all_agree_that_it_is_damage(store, name, kind):
    (path,) = store.glob(name)
    if kind == "directory" and path.is_dir():
        kind = "socket"
    assert judge(store, path.relative_to(store).as_posix(), kind) == []


@pytest.mark.torture
def test_every_kind_in_place_of_every_file(memory, sealed):
    started, cases_run, findings = time.perf_counter(), 0, []
    for name in names_in(sealed):
        for kind in KINDS:
            store = memory / "store"
            for folder in (store, memory / "aside"):
                shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(sealed, store)
            if name == "quarantine":
                (store / name).mkdir(exist_ok=True)
            if kind == "directory" and (store / name).is_dir():
                continue
            findings += [f"{kind} at {name}: {problem}" for problem in judge(store, name, kind)]
            cases_run += len(COMMANDS)
    assert findings == []
    save("a special file in place of every file and directory of a store, every command", started=started,
         commands=cases_run, kinds=len(KINDS), names_replaced=len(names_in(sealed)))  # fmt: skip


STRAYS = (
    "tmp/1-a", "tmp/discard-000001-0123456789abcdef.01234567", "tmp/claim-000001", "quarantine/shards-000001",
    "shards/000001-0123456789abcdef", "stray", "commits/stray", "shards/000001-*/stray", "tokenizer/stray",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_link_leads_to_is_never_touched(store, command):
    """A link in place of each directory of a store, and beside its files; a store whose shards are missing, too."""
    outside = precious(store.parent / "outside")
    before, shards = state_of(outside), sorted((store / "shards").iterdir())
    places = [*OF_THE_STORE, *STRAYS, f"shards/{shards[1].name}", f"shards/{shards[1].name}/head_ids"]
    for place in places:
        for damaged in (False, True):
            hostile = Path(shutil.copytree(store, store.parent / "hostile", symlinks=True))
            if damaged:
                shutil.rmtree(hostile / "shards" / shards[0].name)
                (hostile / "sealed.json").unlink()
            path = hostile / place.replace("000001-*", shards[1].name)
            if path.is_dir():
                shutil.rmtree(path)
            path.symlink_to(outside)
            run(command, hostile)
            assert state_of(outside) == before, f"{place}, damaged: {damaged}"
            shutil.rmtree(hostile)


@pytest.mark.parametrize("swapped", OF_THE_STORE)
@pytest.mark.parametrize("function", ["mkdir", "open", "link", "rename", "unlink", "rmtree"])
def test_a_directory_that_is_swapped_for_a_link_meanwhile(store, function, swapped):
    """Just before a call, by somebody who can write there: what is done is done in the directory that was opened."""
    outside = precious(store.parent / "outside")
    shutil.copytree(store / "shards", outside / "copy")
    for path in (store / swapped).iterdir():
        shutil.copytree(path, outside / path.name) if path.is_dir() else shutil.copy(path, outside)
    before, swaps = state_of(outside), []

    def swap(call: Call) -> object:
        if call.function == function and not swaps and f"/{swapped}" in f"{call.arguments}":
            swaps.append((store / swapped).rename(store.parent / "swapped"))
            (store / swapped).symlink_to(outside)
        return call.proceed()

    next((store / "shards").glob("000001-*/zarr.json")).write_bytes(b"")
    (store / "tmp" / "1-a").mkdir()
    (store / "tmp" / "1-a" / "file").write_bytes(b"left")
    with watched(swap):
        for command in ("gc --yes", "repair --yes", "extract", "gc --yes"):
            run(command, store)
    assert state_of(outside) == before


def test_a_link_is_removed_as_garbage_and_not_what_it_leads_to(store):
    outside = precious(store.parent / "outside")
    before = state_of(outside)
    for name in ("tmp/1-a", "tmp/claim-000001", "quarantine/old"):
        (store / name).symlink_to(outside)
    assert sorted(item.name for item in collect_garbage(store, apply=True)) == [
        "quarantine/old", "tmp/1-a", "tmp/claim-000001",
    ]  # fmt: skip
    assert state_of(outside) == before
    assert not list((store / "tmp").iterdir())


@pytest.mark.parametrize("name", ["commits/000001.json", "sealed.json"])
@pytest.mark.parametrize("kind", ["directory", "link to nothing"])
def test_an_unfinished_store_says_the_same_to_all(memory, name, kind):
    """Not that a shard is missing, again and again, while its name is taken."""
    store = memory / "store"
    cases.write_store(store, shards=[0, 2])
    put_in_place(store / name, kind, memory / "aside")
    assert {run(command, store) for command in ("verify", "status", "extract", "gc", "read")} == {4}
    with pytest.raises(CorruptionError, match=r"is damaged: .*it is a ") as caught:
        cases.write_store(store)
    assert f"pipeline repair {store}" in caught.value.fix
    repair(store, apply=True)
    cases.write_store(store)
    assert verify(store).sealed


def test_a_directory_of_the_store_that_is_a_link_is_told_with_what_to_do(store):
    shutil.move(store / "shards", store.parent / "elsewhere")
    (store / "shards").symlink_to(store.parent / "elsewhere")
    assert [(problem.name, problem.message) for problem in verify(store).problems] == [
        ("shards", "shards is a symbolic link, not a directory")
    ]
    for command in (StoreReader, status, cases.write_store, lambda path: repair(path, apply=True)):
        with pytest.raises(CorruptionError, match="shards is a symbolic link, not a directory") as caught:
            command(store)
        assert caught.value.where == f"{store}/shards"
        assert "put a directory itself there" in caught.value.fix


def test_the_store_itself_may_be_reached_by_a_link(store, tmp_path):
    (tmp_path / "link").symlink_to(store)
    assert verify(tmp_path / "link").problems == []
    assert collect_garbage(tmp_path / "link", apply=True) == []
    read_all(tmp_path / "link")


@pytest.mark.parametrize(
    "name", ["../outside/file", "/etc/passwd", "a/../../b", "a//b", "a/./b", "x" * 256, "a\0b", ""]
)
def test_no_name_leads_out_of_a_store(tmp_path, name):
    from storage.files import open_files

    precious(tmp_path / "outside")
    files = open_files(tmp_path / "store")
    files.prepare("tmp", "a")
    for use in (
        files.read, files.exists, files.quarantine, files.remove, files.entries, files.tree,
        lambda name: files.create(name, b"x"), lambda name: files.move_directory("a", name),
        lambda name: files.create_directory(name, {"f": b"x"}, point="shard"),
    ):  # fmt: skip
        with pytest.raises(CorruptionError, match="is not the name of a file in a store"):
            use(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "store"]
    assert files.entries("tmp") == set()


def test_directories_nested_without_end_are_told(store):
    """Neither counted nor removed by a recursion that breaks."""
    import os

    folder = os.open(store / "tmp", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    assert status(store).committed == 5
    with pytest.raises(DistillError):
        collect_garbage(store, apply=True)
    while (store / "tmp" / "d").exists():  # one level at a time: nothing else can remove it
        os.rename(store / "tmp" / "d", store / "tmp" / "top")
        if (store / "tmp" / "top" / "d").exists():
            os.rename(store / "tmp" / "top" / "d", store / "tmp" / "d")
        (store / "tmp" / "top").rmdir()
