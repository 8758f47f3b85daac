"""FORMAT.md is true: its snippets run, its table is the code's, its constants are the code's."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import storage_cases as cases
from storage_cases import zarr_quietly

import storage
from storage.codecs import CODECS
from storage.codecs.sqrt_delta import SqrtDelta
from storage.commit.bounds import LARGEST_SEQUENCES, LARGEST_TOKENS
from storage.commit.manifest import LARGEST_TOKENIZER
from storage.format.arrays import CHUNK_UNITS, array_specs
from storage.format.chunks import LARGEST_METADATA, LARGEST_OVERHEAD, SMALLEST_PAGE
from storage.format.decode import scale_heads
from storage.format.encode import group_metadata
from storage.plan import FORMAT_VERSION, LARGEST_WINDOW, Plan, TargetSpec
from storage.reader import StoreReader
from storage.rows import ARRAYS
from storage.target import LARGEST_K, LARGEST_VOCABULARY
from storage.values import LARGEST_DEPTH, canonical_json

TEXT = (Path(storage.__file__).parent / "FORMAT.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_there_are_snippets_of_five_lines():
    assert len(SNIPPETS) == 3
    for snippet in SNIPPETS[:2]:
        assert len([line for line in snippet.splitlines() if line]) <= 5


def test_snippets_run_and_agree_with_the_reader(tmp_path, sealed, monkeypatch, capsys):
    shutil.copytree(sealed, tmp_path / "demo" / "store")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in SNIPPETS:
        with zarr_quietly():
            exec(snippet, names)
    printed = capsys.readouterr().out
    assert "next_logprob" in printed
    assert (tmp_path / "rows.parquet").exists()
    reader = StoreReader(sealed)
    batch = reader.read(range(reader.shards[0].sequences))
    k = reader.plan.target.k
    np.testing.assert_allclose(names["logprob"], batch.logprob.reshape(-1, k), atol=2e-6)
    assert f"{batch.head_ids.reshape(-1, k)[:3]}" in printed


def _table_of_arrays() -> list[tuple[str, str, str, str]]:
    """Name, axis, dtype and meaning of each array."""
    table = TEXT[TEXT.index("| array |") :]
    rows = re.findall(r"^\| (\w+) \| ([\w, ;]+) \| ([\w' ]+) \| (.*) \|$", table[: table.index("\n\n")], re.MULTILINE)
    return rows[1:]


def test_the_table_of_arrays_is_the_one_of_the_fields():
    words = {"bits": "uint8", "logprob": "the codec's"}
    conditions = {
        "k": "; only with k > 0",
        "draws": "; only with draws",
        "temperatures": "; only with temperatures",
        "end_bytes": "; absent if the input was token ids",
    }
    table = {name: about for name, *about in _table_of_arrays()}
    assert table.keys() == {item.name for item in ARRAYS}
    for item in ARRAYS:
        axis, dtype, meaning = table[item.name]
        assert ("token_byte" if item.stored == "bits" else item.axis) in re.split(r"[,; ]+", axis), item
        assert ("temperature" in axis) == item.by_temperature, item
        assert dtype == words.get(item.stored, item.stored), item
        stated = [owner for owner, condition in conditions.items() if meaning.endswith(condition)]
        assert stated == ([item.only_with] if item.only_with else []), item


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", cases.TARGETS)
def test_the_table_of_arrays_is_complete(kind, codec):
    target = cases.TARGETS[kind]
    absent = {"only with k > 0": not target.k, "only with draws": not target.draws}
    absent["only with temperatures"] = not target.temperatures
    documented = {
        name: (axis, dtype)
        for name, axis, dtype, meaning in _table_of_arrays()
        if not any(gone and condition in meaning for condition, gone in absent.items())
    }
    plan = cases.make_plan(target=target, codecs={"logprob": CODECS[codec]().parameters()})
    specs = array_specs(plan, end_bytes=True, even=True)
    assert documented.keys() == specs.keys()
    for name, (axis, dtype) in documented.items():
        assert specs[name].axis in re.split(r"[,; ]+", axis)
        if dtype == "real":
            assert specs[name].dtype.name == ("float32" if codec == "exact" else "float16")
        if re.fullmatch(r"u?int\d+|float\d+", dtype):
            assert specs[name].dtype.name == dtype


def test_plan_fields_are_named():
    for name in Plan.__dataclass_fields__:
        assert name in TEXT


def test_the_example_of_metadata_is_what_is_written():
    """Also what it says of 8-bit types and floats."""
    example = json.loads(re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)[0])
    plan = cases.make_plan(target=TargetSpec(kind="topk", k=32), vocab_size=5000)
    specs = array_specs(plan, end_bytes=True, even=True)
    assert specs["head_ids"].layout(9000, tokens=9000, rows=9000).metadata_bytes() == canonical_json(example)
    bits = specs["has_row"].layout(100, tokens=800, rows=700).metadata()["codecs"][0]["configuration"]["codecs"]
    assert canonical_json(bits[:-1])[1:-1].decode().replace(" ", "") in TEXT.replace(" ", "")
    assert specs["entropy"].layout(9, tokens=9, rows=9).metadata()["fill_value"] == "NaN"


def test_the_example_of_a_group_is_what_is_written():
    plan = cases.make_plan()
    text = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)[1]
    example = json.loads(text.replace("REMAP", plan.remap_sha256).replace("STORE", plan.store_id))
    assert group_metadata(plan, plan.shards()[0]) == example


def test_the_bounds_are_the_code_s():
    table = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", TEXT[TEXT.index("## Bounds") :], re.MULTILINE))
    for name, constant in {
        "JSON": LARGEST_DEPTH,
        "V": LARGEST_VOCABULARY,
        "`k`, seeds, `documents`": LARGEST_K,
        "`rendering.window`": LARGEST_WINDOW,
        "tokenizer files": LARGEST_TOKENIZER,
        "sequences of a shard": LARGEST_SEQUENCES,
        "tokens of a shard": LARGEST_TOKENS,
        "zarr.json": LARGEST_METADATA,
        "object": LARGEST_OVERHEAD,
    }.items():
        power = constant.bit_length() - 1
        words = {f"{constant}", f"2^{power}", f"2^{power + 1} - 1"}
        assert any(re.search(rf"(?<![\d^]){re.escape(word)}(?!\d)", table[name]) for word in words), (name, words)


def test_the_chunks_of_an_axis():
    """An empty axis has the chunk length 1; a cut may come out in fewer chunks than it was meant to."""
    specs = array_specs(cases.make_plan(), end_bytes=True, even=False)
    empty = specs["entropy"].layout(0, tokens=0, rows=0).metadata()
    assert empty["chunk_grid"]["configuration"]["chunk_shape"] == [1]
    few = specs["head_ids"].layout(10, tokens=0, rows=7 * CHUNK_UNITS)
    assert (few.chunk, few.chunks) == (2, 5)


def test_codes_beyond_the_largest_are_refused_and_heads_without_mass_left_alone():
    codec, size = SqrtDelta(), np.array([2], np.int32)
    for decode in (lambda codes: codec.decode(codes, size), lambda codes: codec.decode_ranks(codes[:, None])):
        assert decode(np.array([65000, 535], np.uint16)).size == 2
        with pytest.raises(ValueError, match="sum beyond 65535"):
            decode(np.array([65000, 536], np.uint16))
    low = np.array([-105.0, -300.0], np.float32)
    np.testing.assert_array_equal(scale_heads(low, size, np.zeros(1, np.float32)), low)
    assert np.isclose(np.exp(scale_heads(low + 25, size, np.zeros(1, np.float32)).astype(float)).sum(), 0.5)


def test_the_table_of_kinds_is_what_a_plan_allows():
    kinds = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", TEXT, re.MULTILINE)
    assert {kind for kind, *_ in kinds} == {target.kind for target in cases.TARGETS.values()}
    for kind, k, p, draws in kinds:
        for has_k, has_p, has_draws in itertools.product((0, 1), repeat=3):
            target = TargetSpec(kind=kind, k=5 * has_k, p=0.5 if has_p else None, draws=5 * has_draws)
            legal = (has_k, has_p, has_draws) == (k != "0", p != "null", draws != "0")
            with nullcontext() if legal else pytest.raises(ValueError, match=kind):
                target.check()


def test_codecs_and_constants():
    for name in CODECS:
        assert f"`{name}`" in TEXT
    assert (SqrtDelta().root_step, SqrtDelta().log_step, SqrtDelta().row_step) == (0.02, 0.125, 1 / 64)
    assert f"/ {CHUNK_UNITS})" in TEXT
    assert f"{SMALLEST_PAGE} rows" in TEXT
    assert f"version {FORMAT_VERSION}" in TEXT.splitlines()[0]
