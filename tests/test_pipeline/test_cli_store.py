"""The commands on a store: gc, diff, convert, export. What they write, say, and refuse."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from pipeline.cli import main
from storage.errors import UsageError
from storage.exchange.arrow import schema, to_table
from storage.reader import StoreReader


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="pipeline")


def good(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def fails(code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.stderr
    assert result.stderr.splitlines()[0].startswith("error: ")
    return result.stderr


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(tiny_store, tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize(
    "command",
    [
        "status URL", "verify URL", "repair URL", "gc URL", "diff STORE URL", "convert URL new",
        "convert STORE URL --k 2", "inspect URL", "export URL rows.parquet", "eval . --store URL", "doctor URL",
    ],
)  # fmt: skip
def test_a_url_is_refused_and_nothing_is_made_of_it(
    command: str, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = fails(2, *command.replace("URL", "s3://bucket/store").replace("STORE", str(tiny_store)).split())
    assert "a store is a directory so far, there is none behind s3://" in told
    assert "s3://bucket/store" in told.splitlines()[1]
    assert not list(tmp_path.iterdir())


def test_gc(store: Path) -> None:
    assert good("gc", store) == "nothing to remove\n"
    (store / "tmp" / "1-a").write_bytes(b"x" * 2000)
    shown = good("gc", store)
    assert "tmp/1-a: left by a run that was cut off; 2.0 kB" in shown
    assert f"no worker may run meanwhile; to do it: pipeline gc {store} --yes" in shown
    assert json.loads(good("gc", store, "--json")) == {
        "applied": False,
        "garbage": [{"name": "tmp/1-a", "reason": "left by a run that was cut off", "bytes": 2000}],
    }
    assert "2.0 kB removed" in good("gc", store, "--yes")
    assert not (store / "tmp" / "1-a").exists()
    (store / "commits" / "000000.json").write_bytes(b"{}")
    assert f"pipeline repair {store}" in fails(4, "gc", store, "--yes")


def test_diff(tiny_store: Path, store: Path, tmp_path: Path) -> None:
    assert good("diff", tiny_store, store).startswith("equal, digest ")
    good("convert", store, tmp_path / "small", "--k", 2, "--quiet")
    result = run("diff", store, tmp_path / "small")
    assert (result.exit_code, result.stderr) == (1, "")
    assert "plan  target.k: 8 -> 2" in result.stdout
    assert "train  " in result.stdout
    assert "different, digest " in result.stdout
    found = json.loads(run("diff", store, tmp_path / "small", "--json").stdout)
    assert found["equal"] is False
    assert found["splits"]["train"]["rows_other_head"] == found["splits"]["train"]["rows"] > 0
    fails(2, "diff", store, tmp_path / "none")


def test_convert(tiny_store: Path, tmp_path: Path) -> None:
    told = run("convert", tiny_store, tmp_path / "new", "--codec", "sqrt-delta,root_step=0.01,log_step=0.1")
    assert told.exit_code == 0, told.stderr
    assert "complete, 4 shards" in told.stdout
    assert "100%  4 of 4 shards" in told.stderr or "25%  1 of 4 shards" in told.stderr
    assert StoreReader(tmp_path / "new").plan.codecs["logprob"]["root_step"] == 0.01
    events = good(
        "convert", tiny_store, tmp_path / "new", "--codec", "sqrt-delta,root_step=0.01,log_step=0.1", "--json"
    )
    (last,) = [json.loads(line) for line in events.splitlines()]
    assert (last["rows"], last["digest"]) == (0, StoreReader(tmp_path / "new").digest)
    assert "target.k" in fails(3, "convert", tiny_store, tmp_path / "new", "--k", 3)
    assert "nothing would change" in fails(2, "convert", tiny_store, tmp_path / "other")
    assert "unknown codec 'zip'" in fails(2, "convert", tiny_store, tmp_path / "other", "--codec", "zip")
    assert "'root_step' is not NAME=NUMBER" in fails(
        2, "convert", tiny_store, tmp_path / "other", "--codec", "sqrt-delta,root_step"
    )
    assert not (tmp_path / "other").exists()


def test_a_column_is_added_and_exported(tiny_store: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"document": range(40), "weight": range(40)}), tmp_path / "weights.parquet")
    added = f"weight={tmp_path / 'weights.parquet'}"
    told = run("convert", tiny_store, tmp_path / "new", "--add-column", added)
    assert (told.exit_code, "complete, 4 shards" in told.stdout) == (0, True)
    assert re.match(r" 25%  values of 1 of 4 shards looked up  [\d,]+ rows/s  .+ left\n", told.stderr)
    good("export", tmp_path / "new", tmp_path / "rows.parquet")
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table["weight"].to_pylist() == table["document"].to_pylist()
    assert table.drop_columns("weight").equals(to_table(StoreReader(tiny_store)))
    pq.write_table(pa.table({"document": range(40), "weight": [7, *range(1, 40)]}), tmp_path / "others.parquet")
    good("convert", tiny_store, tmp_path / "others", "--add-column", f"weight={tmp_path / 'others.parquet'}", "--quiet")
    told = run("diff", tmp_path / "new", tmp_path / "others").stdout
    assert "train  1 sequence with other values of column weight\n" in told
    assert "  shard 0, document 0, window at 0: 0 rows, up to 0 nats, column weight\n" in told
    assert "NAME=FILE" in fails(2, "convert", tiny_store, tmp_path / "other", "--add-column", "weight")


def test_a_converted_store_is_mended_by_the_command_that_wrote_it(tiny_store: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    convert = ("convert", tiny_store, new, "--k", 2, "--quiet")
    good(*convert)
    digest = StoreReader(new).digest
    next(new.glob("shards/000002-*/entropy/c/0")).write_bytes(b"x")
    assert "then the same `pipeline convert` again" in fails(4, "export", new, tmp_path / "rows.parquet")
    assert "run the same `pipeline convert` again" in good("repair", new, "--yes")
    assert "1 shard missing: run the same `pipeline convert` again" in good("status", new)
    assert json.loads(good("status", new, "--json"))["written_by"] == "pipeline convert"
    with pytest.raises(UsageError) as refused:
        StoreReader(new)
    assert "the same `pipeline convert` again to finish it" in str(refused.value.fix)
    good(*convert)
    assert StoreReader(new).digest == digest


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_export_to_tables(split: str, tiny_store: Path, tmp_path: Path) -> None:
    expected = to_table(StoreReader(tiny_store, split=split))
    good("export", tiny_store, tmp_path / "rows.parquet", "--split", split)
    good("export", tiny_store, tmp_path / "rows", "--to", "arrow", "--split", split)
    assert pq.read_table(tmp_path / "rows.parquet").equals(expected)
    with pa.ipc.open_file(tmp_path / "rows") as file:
        assert file.read_all().equals(expected)


def test_export_of_the_first_sequences(tiny_store: Path, tmp_path: Path) -> None:
    good("export", tiny_store, tmp_path / "rows.parquet", "--limit", 3)
    table = pq.read_table(tmp_path / "rows.parquet")
    assert set(table["sequence"].to_pylist()) == {0, 1, 2}
    good("export", tiny_store, tmp_path / "rows.jsonl", "--limit", 10_000)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(StoreReader(tiny_store))


def test_json_lines_hold_the_rows_of_a_sequence(tiny_store: Path, tmp_path: Path) -> None:
    reader = StoreReader(tiny_store)
    told = run("export", tiny_store, tmp_path / "rows.jsonl")
    assert f"{reader.rows:,} rows in " in told.stderr
    assert "held-out rows are left out: --split heldout writes them" in told.stderr
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "rows.jsonl").read_text().splitlines()
    ]
    for number, line in enumerate(lines):
        batch = reader.read([number])
        assert (line["sequence"], line["document"]) == (number, batch.document[0])
        assert (line["tokens"], line["labels"]) == (batch.tokens[:-1].tolist(), batch.tokens[1:].tolist())
        assert np.array_equal(np.array(line["loss_mask"], bool), batch.has_row[:-1])
        ids, logits = (np.array(line[name]) for name in ("topk_token_ids", "topk_logits"))
        assert ids.shape == logits.shape == (len(line["tokens"]), 8), "rectangular, also where there is no row"
        rows = np.array(line["loss_mask"], bool)
        assert np.array_equal(ids[rows].reshape(-1), batch.head_ids)
        logprob = (logits - np.array(line["log_sum_exp_logits"])[:, None])[rows]
        assert logprob.reshape(-1) == pytest.approx(batch.logprob, abs=2e-4)
        assert np.exp(logprob).sum(axis=1) + np.array(line["tail_mass"])[rows] == pytest.approx(1.0, abs=2e-3)
        assert {sum(counts) for counts in np.array(line["sample_counts"], object)[rows]} <= {4}
        assert not any(line["sample_ids"][at] for at in np.flatnonzero(~rows))
    assert not all(line["loss_mask"] == [1] * len(line["tokens"]) for line in lines), "some positions have no row"


def test_export_overwrites_nothing_and_leaves_no_part(tiny_store: Path, store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    assert "add --to" in fails(2, "export", tiny_store, folder / "rows.csv")
    for form in ("parquet", "arrow", "jsonl", "row-jsonl"):
        (folder / f"mine.{form}").write_text("mine")
        assert "exists already" in fails(2, "export", tiny_store, folder / f"mine.{form}")
        assert (folder / f"mine.{form}").read_text() == "mine"
    victim = next(store.glob("shards/000002-*/entropy/c/0"))
    victim.write_bytes(b"x")
    for form in ("parquet", "arrow", "jsonl", "row-jsonl"):
        assert "pipeline repair" in fails(4, "export", store, folder / f"rows.{form}")
        fails(5, "export", tiny_store, folder / "none" / f"rows.{form}")
    assert sorted(path.name for path in folder.iterdir()) == [
        "mine.arrow",
        "mine.jsonl",
        "mine.parquet",
        "mine.row-jsonl",
    ]


def test_an_unfinished_store_can_be_exported(store: Path, tmp_path: Path) -> None:
    (store / "sealed.json").unlink()
    (store / "commits" / "000001.json").unlink()
    good("export", store, tmp_path / "rows.parquet")
    assert pq.read_schema(tmp_path / "rows.parquet").equals(schema())
