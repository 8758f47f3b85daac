"""FORMAT.md is true: its snippets run, its table is the code's, its constants are the code's."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import storage_cases as cases
from storage_cases import zarr_quietly

import storage
from storage.arrays import CHUNK_UNITS, array_specs
from storage.chunks import SMALLEST_PAGE
from storage.codecs import CODECS
from storage.codecs.sqrt_delta import SqrtDelta
from storage.plan import FORMAT_VERSION, Plan, TargetSpec
from storage.reader import StoreReader
from storage.shard import group_metadata

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


@pytest.mark.parametrize("target", [TargetSpec(kind="hybrid", k=6, draws=4), TargetSpec(kind="topk", k=6)])
def test_the_table_of_arrays_is_complete(target):
    table = TEXT[TEXT.index("| array |") :]
    rows = re.findall(r"^\| (\w+) \| ([\w, ;]+) \| ([\w' ]+) \| (.*) \|$", table[: table.index("\n\n")], re.MULTILINE)
    documented = {
        name: (axis, dtype) for name, axis, dtype, meaning in rows[1:] if target.draws or "with draws" not in meaning
    }
    specs = array_specs(cases.make_plan(target=target), end_bytes=True, even=True)
    assert documented.keys() == specs.keys()
    for name, (axis, dtype) in documented.items():
        assert specs[name].axis in re.split(r"[,; ]+", axis)
        if re.fullmatch(r"u?int\d+|float\d+", dtype):
            assert specs[name].dtype.name == dtype


def test_plan_fields_and_group_attributes_are_named():
    for name in Plan.__dataclass_fields__:
        assert name in TEXT
    plan = cases.make_plan()
    for name in group_metadata(plan, plan.shards()[0])["attributes"]["topk_distill"]:
        assert f"`{name}`" in TEXT


def test_codecs_and_constants():
    for name in CODECS:
        assert f"`{name}`" in TEXT
    assert (SqrtDelta().root_step, SqrtDelta().log_step) == (0.02, 0.125)
    assert f"/ {CHUNK_UNITS})" in TEXT
    assert f"{SMALLEST_PAGE} rows" in TEXT
    assert f"version {FORMAT_VERSION}" in TEXT.splitlines()[0]
