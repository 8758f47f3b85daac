"""Looking into a store: rows as text, and rows as files for other tools."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from pipeline.cli import main
from pipeline.commands.looking import FILE_FORMS
from pipeline.export import FileFormat, export_store
from pipeline.inspect import TokenText, open_store, sample_sequences
from storage.errors import UsageError
from storage.exchange.arrow import schema, to_table
from storage.reader import StoreReader


@pytest.fixture
def reader(tiny_store: Path) -> StoreReader:
    return open_store(tiny_store, "train")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["inspect", *(str(argument) for argument in arguments)], prog_name="pipeline")
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_rows_say_what_the_store_holds(reader: StoreReader, tiny_tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    for item in sample_sequences(reader, count=3, rows=4, candidates=8):
        batch = reader.read([item.number])
        tokens = batch.tokens.tolist()
        assert item.text == tokenizer.decode(tokens)
        assert (item.tokens, item.rows) == (len(tokens), batch.rows)
        assert item.head_mass == pytest.approx(np.exp(batch.logprob).sum() / batch.rows, abs=1e-4)
        for row in item.shown:
            at = int(np.flatnonzero(np.flatnonzero(batch.has_row) == row.position)[0])
            head = batch.logprob[8 * at : 8 * at + 8]
            assert [candidate.probability for candidate in row.candidates] == pytest.approx(np.exp(head).tolist())
            assert sum(candidate.probability for candidate in row.candidates) == pytest.approx(row.head_mass, abs=1e-3)
            assert tokenizer.decode(tokens[: row.position + 1]).endswith(row.context.lstrip("\ufffd"))
            assert row.next_probability == pytest.approx(float(np.exp(batch.next_logprob[at])))
            assert sum(count for _, count in row.tail) == 4
            follows = [candidate for candidate in row.candidates if candidate.follows]
            if follows:
                assert follows[0].text == row.next_text
                assert follows[0].probability == pytest.approx(row.next_probability, rel=0.1)  # quantised


def test_sample_depends_on_the_seed_alone_and_grows_by_appending(reader: StoreReader) -> None:
    three = sample_sequences(reader, count=3, seed=5)
    assert sample_sequences(reader, count=3, seed=5) == three
    assert sample_sequences(reader, count=5, seed=5)[:3] == three
    assert [item.number for item in sample_sequences(reader, count=3, seed=6)] != [item.number for item in three]
    assert len({item.number for item in sample_sequences(reader, count=10_000)}) == len(reader)


def test_text_of_a_token_keeps_the_space_that_decoders_drop(tiny_store: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    text = TokenText({"tokenizer.json": tokenizer.to_str().encode()})
    assert text.join([2]) == "cat"
    assert text.after(1, 2) == " cat"
    assert text.after(2, 3) == "s"


def test_store_without_a_fast_tokenizer() -> None:
    with pytest.raises(UsageError, match=r"carries no tokenizer\.json"):
        TokenText({"vocab.txt": b""})


def test_text_on_the_terminal(tiny_store: Path) -> None:
    out = run(tiny_store, "--sample", 2, "--rows", 3)
    assert out.count("\nsequence ") + out.startswith("sequence ") == 2
    assert out.count("p(next)") == 6
    assert run(tiny_store, "--sample", 2, "--rows", 3) == out
    assert run(tiny_store, "--sample", 2, "--rows", 3, "--seed", 1) != out
    assert run(tiny_store, "--split", "heldout", "--sample", 1).startswith("sequence ")


def test_all_forms_hold_the_same_rows(tiny_store: Path, reader: StoreReader, tmp_path: Path) -> None:
    expected = to_table(reader)
    run(tiny_store, "--format", "parquet", "--output", tmp_path / "rows.parquet")
    run(tiny_store, "--format", "arrow", "--output", tmp_path / "rows.arrow")
    run(tiny_store, "--format", "row-jsonl", "--output", tmp_path / "rows.jsonl")
    assert pq.read_table(tmp_path / "rows.parquet").equals(expected)
    with pa.ipc.open_file(tmp_path / "rows.arrow") as file:
        assert file.read_all().equals(expected)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert pa.Table.from_pylist(lines, schema=schema()).equals(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.arrow", "rows.jsonl", "rows.parquet"]


def test_sample_of_rows_keeps_the_numbers_of_its_sequences(tiny_store: Path, reader: StoreReader) -> None:
    numbers = {item.number for item in sample_sequences(reader, count=2, seed=3)}
    rows = [
        json.loads(line) for line in run(tiny_store, "--format", "row-jsonl", "--sample", 2, "--seed", 3).splitlines()
    ]
    assert {row["sequence"] for row in rows} == numbers
    assert rows[0].keys() == set(schema().names)


def test_json_has_no_infinity(reader: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = reader.read([0])
    batch.next_logprob[0] = -math.inf
    monkeypatch.setattr(reader, "read", lambda numbers: batch)
    export_store(reader, "row-jsonl", tmp_path / "rows.jsonl", sequences=[0])
    first = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)
    assert first["next_logprob"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "arrow"], "arrow is a binary form"),
        (["--format", "parquet"], "name a file with --output"),
        (["--output", "OUT"], "text goes to the terminal only"),
        (["--format", "row-jsonl", "--output", "TAKEN"], "the file exists already"),
        (["--sample", "0"], "--sample"),
    ],
)
def test_misuse(arguments: list[str], words: str, tiny_store: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    places = {"OUT": str(tmp_path / "out"), "TAKEN": str(tmp_path / "taken")}
    result = CliRunner().invoke(main, ["inspect", str(tiny_store), *(places.get(item, item) for item in arguments)])
    assert result.exit_code == 2
    assert words in result.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_stays_behind_when_writing_fails(
    reader: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(numbers: object) -> None:
        raise UsageError("stop")

    monkeypatch.setattr(reader, "read", broken)
    with pytest.raises(UsageError, match="stop"):
        export_store(reader, "parquet", tmp_path / "rows.parquet")
    assert list(tmp_path.iterdir()) == []


def test_the_commands_offer_the_forms_that_there_are() -> None:
    assert list(get_args(FileFormat)) == FILE_FORMS
