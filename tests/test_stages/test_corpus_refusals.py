"""What a corpus is refused for, and how it is told: by record, all at once, and as what a file is."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.corpus import SOURCES, Corpus, SourceSpec, open_corpus
from storage.errors import UsageError

FILE_KINDS = [kind for kind, source in SOURCES.items() if source.path and kind != "dataset"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def open_one(spec: SourceSpec) -> Corpus:
    return open_corpus([spec])


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": ', "broken JSON line"),
        ('{"text": null}', "field 'text' is null"),
        ('{"text": 3}', "field 'text' is int"),
        ('["a"]', "a line holds list"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"body": "a"}', "no field 'text'; the fields are 'body'"),
        ("[" * 100_000, "nested too deeply"),
        (
            '{"text": "a", "deep": ' + "[" * 3000 + "]" * 3000 + "}",
            "nested too deeply.*\n.*\n.*leave the nested field out",
        ),
    ],
    ids=lambda value: value[:30],
)
def test_bad_json_line_is_named(line: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(UsageError, match=what) as caught:
        open_one(SourceSpec(source="jsonl", path=str(path)))
    assert caught.value.where == f"{path}, line 3"


def test_numbers_of_any_length_beside_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "number": ' + "9" * 5000 + ', "real": 1e999999}\n')
    corpus = open_one(SourceSpec(source="jsonl", path=str(tmp_path / "a.jsonl")))
    assert [document.text for document in corpus.documents([0])] == ["a"]


LINES = b'{"text": "one"}\n{"text": "two"}\n'
OBJECTS = json.dumps([{"text": "one"}, {"text": "two"}])
TABLE = pa.table({"text": ["one", "two"]})


def parquet_bytes() -> bytes:
    stream = pa.BufferOutputStream()
    pq.write_table(TABLE, stream)
    return bytes(stream.getvalue())


OTHER_KINDS: dict[str, tuple[bytes, str, str]] = {
    "gzip": (gzip.compress(LINES), "compressed with gzip", "gunzip"),
    "zstd": (pa.compress(LINES, codec="zstd", asbytes=True), "compressed with zstd", "zstd -d"),
    "bzip2": (bz2.compress(LINES), "compressed with bzip2", "bunzip2"),
    "xz": (lzma.compress(LINES), "compressed with xz", "unxz"),
    "UTF-16": ("\ufeff{}".encode("utf-16-le"), "UTF-16 text", "iconv"),
    "Parquet": (parquet_bytes(), "a Parquet file", "source: parquet"),
    "array": (b"\xef\xbb\xbf \n" + OBJECTS.encode(), "one JSON array", "jq -c '.\\[\\]'"),
    "indented": (json.dumps({"text": "one"}, indent=1).encode(), "JSON, which this source", "jq -c"),
}


@pytest.mark.parametrize("kind", FILE_KINDS)
@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_file_of_another_kind_is_told_as_what_it_is(name: str, kind: str, tmp_path: Path) -> None:
    """Not as a broken line, page or character; JSON as text files is text like any other."""
    content, what, fix = OTHER_KINDS[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    spec = SourceSpec(source=kind, path=str(path))
    if (kind, name) == ("parquet", "Parquet") or (kind == "text" and name in ("array", "indented")):
        assert len(open_one(spec)) > 0
        return
    with pytest.raises(UsageError, match=f"the file is {what}.*\n  where: {path}\n  fix: .*{fix}"):
        open_one(spec)


CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_conversations_are_told_how_to_become_text(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if kind == "jsonl":
        path.write_text(json.dumps({"messages": CONVERSATION}) + "\n")
    elif kind == "parquet":
        pq.write_table(pa.table({"messages": [CONVERSATION]}), path)
    else:
        datasets.Dataset.from_dict({"messages": [CONVERSATION]}).save_to_disk(str(path))
    with pytest.raises(UsageError, match=r"'messages'.*\n.*\n  fix: conversations.*apply_chat_template\(messages"):
        open_one(SourceSpec(source=kind, path=str(path), field="messages"))


def test_all_bad_lines_are_told_together(tmp_path: Path) -> None:
    """Of all files, in order, with their number: what is mended by one look is not found one run at a time."""
    bad = ['{"text": null}', '{"text": ', '{"other": 1}', "[]"]
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "good"}', bad[0], bad[1], '{"text": "good"}', bad[2]]))
    (tmp_path / "b.jsonl").write_text("\n".join(['{"text": "good"}', *bad]))
    with pytest.raises(UsageError, match=r"^7 records cannot be read: line 2: field 'text' is null") as caught:
        open_one(SourceSpec(source="jsonl", path=str(tmp_path / "*.jsonl")))
    told = caught.value.what
    for part in ("; line 3: broken JSON", "; line 5: no field", f"; {tmp_path}/b.jsonl, line 2: field", "; and 2 more"):
        assert part in told
    assert caught.value.where == str(tmp_path / "a.jsonl")
    assert caught.value.fix == "drop or repair these records"


def test_a_scan_of_nothing_but_bad_lines_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n' * 100 + "no line is read from here on")
    told = r"^100 .*: no field 'other'; the fields are 'body' in each of them: line 1; line 2; .*; and 95 more"
    with pytest.raises(UsageError, match=told) as caught:
        open_one(SourceSpec(source="jsonl", path=str(tmp_path / "a.jsonl"), field="other"))
    assert caught.value.fix == "set field to the field that holds the text"


def test_text_files_that_are_not_text_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(gzip.compress(b"text"))
    with pytest.raises(UsageError, match=r"2 records cannot be read: .*a\.txt: not UTF-8.*b\.txt: .* gzip"):
        open_one(SourceSpec(source="text", path=str(tmp_path / "*.txt")))


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_nulls_of_a_prompt_are_told_with_its_column(kind: str, tmp_path: Path) -> None:
    table = pa.table(
        {"text": [f"text {n}" for n in range(90)], "prompt": [None if n in (3, 50, 80) else "p" for n in range(90)]}
    )
    path = tmp_path / "a"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=40)
    else:
        datasets.Dataset(table).save_to_disk(str(path))
    told = "3 records cannot be read: column 'prompt' is null in each of them: row 3; row 50; row 80"
    with pytest.raises(UsageError, match=told):
        open_one(SourceSpec(source=kind, path=str(path), prompt_field="prompt"))
