"""One battery over the table of sources, and what each of them refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.corpus import SOURCES, Corpus, Source, SourceSpec, open_corpus
from storage.errors import UsageError
from storage.plan import canonical_json

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


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


@pytest.mark.parametrize("kind", SOURCES)
def test_source_reads_any_range(kind: str, tmp_path: Path, topic_texts: list[str]) -> None:
    source = SOURCES[kind](WRITERS[kind](tmp_path, TEXTS))
    expected = topic_texts if kind == "topics" else TEXTS
    assert len(source) == len(expected)
    for first, end in ((0, len(expected)), (0, 1), (len(expected) - 1, len(expected)), (37, 83), (5, 5)):
        assert source.read(first, end) == expected[first:end]


@pytest.mark.parametrize("kind", SOURCES)
def test_identity_follows_content_not_place(kind: str, tmp_path: Path) -> None:
    here, there, other = tmp_path / "here", tmp_path / "there", tmp_path / "other"
    for directory in (here, there, other):
        directory.mkdir()
    identity = SOURCES[kind](WRITERS[kind](here, TEXTS)).identity
    assert canonical_json(identity) == canonical_json(SOURCES[kind](WRITERS[kind](there, TEXTS)).identity)
    assert str(tmp_path) not in json.dumps(identity)
    if kind != "topics":
        assert identity != SOURCES[kind](WRITERS[kind](other, [*TEXTS[:-1], "else"])).identity


def test_dataset_from_a_directory_of_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path, TEXTS)
    source = SOURCES["dataset"](SourceSpec(source="dataset", path=str(tmp_path), field="body"))
    assert source.read(0, len(TEXTS)) == TEXTS


def test_dataset_dict_on_disk_takes_the_split(tmp_path: Path) -> None:
    parts = {"train": datasets.Dataset.from_dict({"text": ["a"]}), "test": datasets.Dataset.from_dict({"text": ["b"]})}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    source = SOURCES["dataset"](SourceSpec(source="dataset", path=str(tmp_path / "saved"), split="test"))
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


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": ', "broken JSON line"),
        ('{"text": null}', "field 'text' is null"),
        ('{"text": 3}', "field 'text' is int"),
        ('["a"]', "a line holds list"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"body": "a"}', "no field 'text'; the fields are 'body'"),
    ],
)
def test_bad_json_line_is_named(line: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(UsageError, match=what) as caught:
        open_one(SourceSpec(source="jsonl", path=str(path)))
    assert caught.value.where == f"{path}, line 3"


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
    with pytest.raises(UsageError, match="no text") as caught:
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


def test_unknown_dataset_offline() -> None:
    with pytest.raises(UsageError, match="cannot load dataset 'nobody/nothing'"):
        open_one(SourceSpec(source="dataset", path="nobody/nothing"))


def test_unknown_source() -> None:
    with pytest.raises(UsageError, match="unknown source 'csv'"):
        open_one(SourceSpec(source="csv"))


def test_a_changed_file_is_another_identity(tmp_path: Path) -> None:
    spec = write_text(tmp_path, ["a", "b"])

    def identity() -> Source:
        return SOURCES["text"](spec)

    before = identity().identity
    shutil.copy(tmp_path / "001.txt", tmp_path / "002.txt")
    assert identity().identity != before
