"""One battery over the table of sources, and what each of them refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.corpus import SOURCES, Corpus, Source, SourceSpec, open_corpus
from stages.input_files import FileState, unchanged
from storage.errors import IdentityError, StorageUnavailableError, UsageError
from storage.values import canonical_json

TEXTS = [f"text number {number}, é 語\nsecond line" for number in range(300)]


def write_text(directory: Path, texts: list[str]) -> SourceSpec:
    for number, text in enumerate(texts):
        (directory / f"{number:03}.txt").write_bytes(text.encode())
    return SourceSpec(source="text", path=str(directory / "*.txt"))


def write_jsonl(directory: Path, texts: list[str]) -> SourceSpec:
    half = len(texts) // 2
    for name, part in (("a", texts[:half]), ("b", texts[half:])):
        lines = [json.dumps({"number": n, "body": text}) for n, text in enumerate(part)]
        (directory / f"{name}.jsonl").write_text("\n\n".join(lines) + "\n")  # empty lines are no documents
    return SourceSpec(source="jsonl", path=str(directory / "*.jsonl"), field="body")


def write_parquet(directory: Path, texts: list[str]) -> SourceSpec:
    half = len(texts) // 2
    for name, part in (("a", texts[:half]), ("b", texts[half:])):
        table = pa.table({"number": list(range(len(part))), "body": part})
        pq.write_table(table, directory / f"{name}.parquet", row_group_size=40)
    return SourceSpec(source="parquet", path=str(directory / "*.parquet"), field="body")


def write_dataset(directory: Path, texts: list[str]) -> SourceSpec:
    datasets.Dataset.from_dict({"body": texts}).save_to_disk(str(directory / "saved"))
    return SourceSpec(source="dataset", path=str(directory / "saved"), field="body")


def write_nothing(directory: Path, texts: list[str]) -> SourceSpec:
    return SourceSpec(source="topics")


WRITERS: dict[str, Callable[[Path, list[str]], SourceSpec]] = {
    "text": write_text,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "dataset": write_dataset,
    "topics": write_nothing,
}


FILE_KINDS = [kind for kind, source in SOURCES.items() if source.path and kind != "dataset"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


@pytest.mark.parametrize("kind", SOURCES)
def test_source_reads_any_range(kind: str, tmp_path: Path, topic_texts: list[str]) -> None:
    source = SOURCES[kind].open(WRITERS[kind](tmp_path, TEXTS))
    expected = topic_texts if kind == "topics" else TEXTS
    assert len(source) == len(expected)
    for first, end in ((0, len(expected)), (0, 1), (len(expected) - 1, len(expected)), (37, 83), (5, 5)):
        assert source.read(first, end) == expected[first:end]


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "topics"])
def test_a_byte_order_mark_is_no_part_of_a_text(kind: str, tmp_path: Path) -> None:
    corpus = open_corpus([WRITERS[kind](tmp_path, ["\ufeffWith a mark.", "Without \ufeff one.", "\ufeff\ufeffTwo."])])
    documents = list(corpus.documents(range(3)))
    assert [document.text for document in documents] == ["With a mark.", "Without \ufeff one.", "\ufeffTwo."]
    assert [document.byte_order_mark for document in documents] == [True, False, True]


@pytest.mark.parametrize("kind", SOURCES)
def test_identity_follows_content_not_place(kind: str, tmp_path: Path) -> None:
    here, there, other = tmp_path / "here", tmp_path / "there", tmp_path / "other"
    for directory in (here, there, other):
        directory.mkdir()
    identity = SOURCES[kind].open(WRITERS[kind](here, TEXTS)).identity
    assert canonical_json(identity) == canonical_json(SOURCES[kind].open(WRITERS[kind](there, TEXTS)).identity)
    assert str(tmp_path) not in json.dumps(identity)
    if kind != "topics":
        assert identity != SOURCES[kind].open(WRITERS[kind](other, [*TEXTS[:-1], "else"])).identity


def test_dataset_from_a_directory_of_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path, TEXTS)
    source = SOURCES["dataset"].open(SourceSpec(source="dataset", path=str(tmp_path), field="body"))
    assert source.read(0, len(TEXTS)) == TEXTS


def test_dataset_dict_on_disk_takes_the_split(tmp_path: Path) -> None:
    parts = {"train": datasets.Dataset.from_dict({"text": ["a"]}), "test": datasets.Dataset.from_dict({"text": ["b"]})}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    source = SOURCES["dataset"].open(SourceSpec(source="dataset", path=str(tmp_path / "saved"), split="test"))
    assert source.read(0, 1) == ["b"]


def test_corpus_numbers_documents_through(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    specs = [write_jsonl(tmp_path / "x", TEXTS[:200]), write_parquet(tmp_path / "y", TEXTS[200:])]
    corpus = open_corpus(specs)
    wanted = [0, 1, 99, 100, 199, 200, 250, 299]
    assert [(item.number, item.text) for item in corpus.documents(wanted)] == [(n, TEXTS[n]) for n in wanted]
    assert [item.text for item in corpus.documents(range(300))] == TEXTS


def open_one(spec: SourceSpec) -> Corpus:
    return open_corpus([spec])


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_missing_file_and_empty_pattern(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such file: .*absent\.x"):
        open_one(SourceSpec(source=kind, path=str(tmp_path / "absent.x")))
    with pytest.raises(UsageError, match=r"no file matches the pattern .*\*\.x"):
        open_one(SourceSpec(source=kind, path=str(tmp_path / "*.x")))
    with pytest.raises(UsageError, match="is a directory"):
        open_one(SourceSpec(source=kind, path=str(tmp_path)))


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="corpus is empty") as caught:
        open_one(SourceSpec(source="jsonl", path=str(tmp_path / "empty.jsonl")))
    assert "empty.jsonl" in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_absent_field_lists_the_fields(kind: str, tmp_path: Path) -> None:
    spec = WRITERS[kind](tmp_path, TEXTS)
    with pytest.raises(UsageError, match=r"no (field|column) 'nope'; the (fields|columns) are .*'body'"):
        open_one(SourceSpec(source=kind, path=spec.path, field="nope"))


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_null_and_numbers_in_a_column(kind: str, tmp_path: Path) -> None:
    texts = [*TEXTS, None, "last"]
    table = pa.table({"text": pa.array(texts, pa.string()), "number": list(range(len(texts)))})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=40)
        path = tmp_path / "a.parquet"
    else:
        datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
        path = tmp_path / "saved"
    with pytest.raises(UsageError, match="column 'text' is null") as caught:
        open_one(SourceSpec(source=kind, path=str(path)))
    assert caught.value.where is not None
    assert caught.value.where.endswith(f"row {len(TEXTS)}")
    with pytest.raises(UsageError, match=r"column 'number' holds .*int64.*, not text"):
        open_one(SourceSpec(source=kind, path=str(path), field="number"))


def test_dataset_refuses_a_column_of_mixed_types(tmp_path: Path) -> None:
    """The JSON loader of `datasets` would turn each text into a quoted JSON string."""
    (tmp_path / "mixed.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(UsageError, match="not text"):
        open_one(SourceSpec(source="dataset", path=str(tmp_path)))


def test_text_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8 text: byte 0xe9 at position 3"):
        open_one(SourceSpec(source="text", path=str(tmp_path / "latin.txt")))


def test_broken_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UsageError, match="not a readable Parquet file"):
        open_one(SourceSpec(source="parquet", path=str(tmp_path / "a.parquet")))


def test_damaged_parquet_is_found_at_opening(tmp_path: Path) -> None:
    """One flipped byte in a compressed page, and bytes that are not UTF-8: file and row group are named."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=40, compression="zstd")
    data = bytearray(path.read_bytes())
    page = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[page + 30 : page + 60] = bytes(30)
    path.write_bytes(data)
    with pytest.raises(UsageError, match="not a readable Parquet file") as caught:
        open_one(SourceSpec(source="parquet", path=str(path)))
    assert caught.value.where == f"{path}, row group 2"

    latin = pa.array([b"good", b"caf\xe9"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": latin}), path, row_group_size=1)
    with pytest.raises(UsageError, match="Invalid UTF8") as caught:
        open_one(SourceSpec(source="parquet", path=str(path)))
    assert caught.value.where == f"{path}, row group 1"


def test_every_source_is_written_for_these_tests() -> None:
    assert WRITERS.keys() == SOURCES.keys()


def touch(path: Path) -> None:
    """Move the time of change on by a second: a test is faster than the clock of some file systems."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))


@pytest.mark.parametrize("kind", FILE_KINDS)
@pytest.mark.parametrize("read_before", [False, True])
def test_a_file_edited_after_the_scan_is_refused(kind: str, read_before: bool, tmp_path: Path) -> None:
    """Same length or not: offsets and hash belong to the file that was scanned."""
    source = SOURCES[kind].open(WRITERS[kind](tmp_path, TEXTS))
    if read_before:
        assert source.read(0, 2) == TEXTS[:2]
    WRITERS[kind](tmp_path, [text.replace("text", "TEXT") for text in TEXTS])
    edited = min(path for path in tmp_path.iterdir())
    touch(edited)
    with pytest.raises(IdentityError, match="changed while it was being read") as caught:
        source.read(0, 2)
    assert caught.value.where == str(edited)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_file_replaced_after_the_scan_is_refused(kind: str, tmp_path: Path) -> None:
    """By another inode of the same size and time, as `cp -p` and `mv` leave it."""
    source = SOURCES[kind].open(WRITERS[kind](tmp_path, TEXTS))
    edited = min(path for path in tmp_path.iterdir())
    shutil.copy2(edited, tmp_path / "copy")
    (tmp_path / "copy").replace(edited)
    with pytest.raises(IdentityError, match="changed while it was being read"):
        source.read(0, 1)


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_file_edited_with_its_time_of_modification_set_back_is_refused(kind: str, tmp_path: Path) -> None:
    """In place and of the same size, as a repair by `rsync --inplace --times` leaves it."""
    source = SOURCES[kind].open(WRITERS[kind](tmp_path, TEXTS))
    edited = min(path for path in tmp_path.iterdir())
    before, content = edited.stat(), edited.read_bytes()
    edited.write_bytes(content.replace(b"text", b"TEXT"))
    while (after := edited.stat()).st_mtime_ns != before.st_mtime_ns or after.st_ctime_ns == before.st_ctime_ns:
        os.utime(edited, ns=(before.st_atime_ns, before.st_mtime_ns))  # until the file system's clock has moved on
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    with pytest.raises(IdentityError, match="changed while it was being read"):
        source.read(0, 1)


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_file_that_vanishes_after_the_scan(kind: str, tmp_path: Path) -> None:
    source = SOURCES[kind].open(WRITERS[kind](tmp_path, TEXTS))
    gone = min(path for path in tmp_path.iterdir())
    gone.unlink()
    with pytest.raises(StorageUnavailableError, match="No such file") as caught:
        source.read(0, 1)
    assert caught.value.where == str(gone)
    assert caught.value.exit_code == 5


def test_an_edit_during_the_read_outranks_what_the_read_says(tmp_path: Path) -> None:
    """A line cut in two by an edit is reported as the edit."""
    path = tmp_path / "a.jsonl"
    path.write_text("{}")

    def edit_and_fail() -> None:
        with unchanged(FileState.of(path)):
            path.write_text("{")
            raise UsageError("broken JSON line")

    with pytest.raises(IdentityError, match="changed while it was being read"):
        edit_and_fail()


@pytest.mark.parametrize("kind", [*FILE_KINDS, "dataset"])
@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("~nouser/x.txt", "no home directory is known for '~nouser/x.txt'"),
        ("x" * 5000, "too long for the system: 'xxx"),
        ("a\0b", "is not a path: embedded null"),
    ],
    ids=["home", "long", "null"],
)
def test_paths_that_cannot_be(kind: str, path: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        open_one(SourceSpec(source=kind, path=path))
    assert caught.value.where == "path"


def test_a_single_saved_dataset_has_one_split(tmp_path: Path) -> None:
    for name, split in (("named", datasets.Split.TEST), ("unnamed", None)):
        datasets.Dataset.from_dict({"text": ["a"]}, split=split).save_to_disk(str(tmp_path / name))
    open_one(SourceSpec(source="dataset", path=str(tmp_path / "named"), split="test"))
    open_one(SourceSpec(source="dataset", path=str(tmp_path / "unnamed")))
    for name, found, asked in (("named", "test", "train"), ("unnamed", "train", "test"), ("named", "test", "test[")):
        with pytest.raises(
            UsageError, match=rf"holds split '{found}', asked for is split '{re.escape(asked)}'"
        ) as told:
            open_one(SourceSpec(source="dataset", path=str(tmp_path / name), split=asked))
        assert told.value.fix is not None
        assert f"set split: '{found}'" in told.value.fix


@pytest.mark.parametrize(
    ("split", "texts"),
    [
        ("train[:10]", TEXTS[:10]),
        ("train[-7:]", TEXTS[-7:]),
        ("train[10%:12%]", TEXTS[30:36]),
        ("test[:2]+train[5:6]", ["x", "y", TEXTS[5]]),
    ],
)
def test_parts_of_a_split_of_saved_datasets(split: str, texts: list[str], tmp_path: Path) -> None:
    """In the words of `datasets`, as for a directory of Parquet files: the same texts, hence the same identity."""
    parts = {"train": TEXTS, "test": ["x", "y", "z"]}
    (tmp_path / "files").mkdir()
    for name, part in parts.items():
        pq.write_table(pa.table({"text": part}), tmp_path / "files" / f"{name}.parquet")
    saved = {name: datasets.Dataset.from_dict({"text": part}, split=name) for name, part in parts.items()}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "dict"))
    places = ["files", "dict"]
    if "test" not in split:
        saved["train"].save_to_disk(str(tmp_path / "one"))
        places.append("one")
    found = [open_one(SourceSpec(source="dataset", path=str(tmp_path / place), split=split)) for place in places]
    assert [[document.text for document in corpus.documents(range(len(corpus)))] for corpus in found] == [
        texts for _ in places
    ]
    assert len({canonical_json(corpus.sources[0].identity) for corpus in found}) == 1


def test_unknown_dataset_offline() -> None:
    with pytest.raises(UsageError, match="cannot load dataset 'nobody/nothing'"):
        open_one(SourceSpec(source="dataset", path="nobody/nothing"))


def test_unknown_source() -> None:
    with pytest.raises(UsageError, match="unknown source 'csv'"):
        open_one(SourceSpec(source="csv"))


def test_a_changed_file_is_another_identity(tmp_path: Path) -> None:
    spec = write_text(tmp_path, ["a", "b"])

    def identity() -> Source:
        return SOURCES["text"].open(spec)

    before = identity().identity
    shutil.copy(tmp_path / "001.txt", tmp_path / "002.txt")
    assert identity().identity != before
