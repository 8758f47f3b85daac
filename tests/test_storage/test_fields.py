"""What is stated of each array of a batch, beside its field in rows.py, is all that a store needs to know of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import storage_cases as cases

import storage
from storage.format.arrays import array_specs
from storage.rows import ARRAYS, AXES, OFFSETS, SequenceBatch

ROOT = Path(storage.__file__).parents[1]
HINTS = get_type_hints(SequenceBatch)
NUMBER = re.compile(r"    next_logprob: NDArray.*\n")  # the field of rows.py that the added one is like


@pytest.mark.parametrize("item", ARRAYS, ids=lambda item: item.name)
def test_the_type_in_memory_is_the_annotated_one(item):
    hint, *optional = get_args(HINTS[item.name]) if item.absent is None else (HINTS[item.name],)
    assert optional == ([type(None)] if item.absent is None else [])
    assert get_args(get_args(hint)[1]) == (item.dtype,)


def test_every_field_but_what_holds_for_the_whole_batch_has_an_axis():
    assert set(HINTS) - set(AXES) == {"draws", "temperatures"}
    assert set(AXES) - {item.name for item in ARRAYS} == {"row_columns", "sequence_columns"}
    assert set(OFFSETS) == set(AXES.values()) - {"sequence", "sequence_edge"}


def test_a_batch_has_the_types_and_lengths_that_are_stated():
    plan = cases.make_plan(target=cases.TARGETS["temperatures"])
    batch = cases.make_batch(plan, plan.shards()[0])
    for item in ARRAYS:
        values = getattr(batch, item.name)
        assert values.dtype == item.dtype
        if item.axis in OFFSETS:
            assert len(values) == getattr(batch, OFFSETS[item.axis])[-1]
        else:
            assert len(values) == len(batch) + (item.axis == "sequence_edge")


def test_a_shard_holds_its_arrays_in_this_order():
    plan = cases.make_plan(target=cases.TARGETS["temperatures"], columns={"mine": {"axis": "row", "dtype": "uint8"}})
    assert " ".join(array_specs(plan, end_bytes=True, even=True)) == (
        "tokens has_row token_offset row_offset document window_start logsumexp entropy next_logprob token_end_byte "
        "head_offset head_size tail_logit tail_offset tail_size tail_ids count head_ids logprob tail_logit_T entropy_T "
        "column_mine"
    )


def test_a_field_added_to_rows_is_kept_with_no_other_change(tmp_path):
    """Written, verified, read, cut, joined, converted, compared and refused if it is NaN: by copies of the packages."""
    for package in ("storage", "stages"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    rows = tmp_path / "storage" / "rows.py"
    changed, added = NUMBER.subn(
        lambda found: found[0] + found[0].replace("next_logprob", "varentropy"), rows.read_text()
    )
    assert added == 1
    rows.write_text(changed)
    program = [sys.executable, str(Path(__file__).parent / "added_field.py"), str(tmp_path / "stores")]
    (tmp_path / "stores").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "kept\n"), done.stderr
