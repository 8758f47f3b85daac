"""plan.json as anyone may have written it: what no plan may hold is refused, by readers and by the writer alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import storage_cases as cases

from storage.commit.manifest import read_plan
from storage.errors import CorruptionError, UsageError
from storage.files.local import LocalFiles
from storage.plan import HeldoutRule, Plan, TargetSpec
from storage.values import canonical_json
from storage.writer import StoreWriter

PLAN = cases.make_plan(target=TargetSpec(kind="topp", k=6, p=0.5, temperatures=(0.5, 2.0)))
ABOUT = {"axis": "row", "dtype": "float32"}
WRONG: list[tuple[str, Any, str]] = [
    ("format_version", True, "format_version must be a whole number"),
    ("format_version", 1.0, "format_version must be a whole number"),
    ("format_version", "1", "format_version must be a whole number"),
    ("format_version", 0, "format_version must be a whole number"),
    ("target.kind", "top-k", "kind must be a name, such as topk, topp, sampled, hybrid, found 'top-k'"),
    ("target.kind", ["topk"], "kind must be a name"),
    ("target.k", -1, "k must be a whole number from 0 to 4294967295, found -1"),
    ("target.k", 6.0, "k must be a whole number"),
    ("target.k", True, "k must be a whole number"),
    ("target.k", "6", "k must be a whole number"),
    ("target.k", 2**32, "k must be a whole number"),
    ("target.k", 0, "kind topp needs k > 0"),
    ("target.p", None, "kind topp needs p"),
    ("target.p", "0.5", "p must be a number, found '0.5'"),
    ("target.p", True, "p must be a number, found True"),
    ("target.p", 10**400, "p must be a number"),
    ("target.p", 0.0, "p must be above 0 and at most 1"),
    ("target.p", 1.5, "p must be above 0 and at most 1"),
    ("target.draws", -1, "draws must be a whole number"),
    ("target.draws", 1, "kind topp draws no samples"),
    ("target.seed", -1, "seed must be a whole number"),
    ("target.seed", 2**64, "seed must be a whole number"),
    ("target.temperatures", ["2"], "each of temperatures must be a number"),
    ("target.temperatures", [True], "each of temperatures must be a number"),
    ("target.temperatures", [1.0], "from 0.01 to 100 and be other than 1"),
    ("target.temperatures", [0.009], "from 0.01 to 100 and be other than 1"),
    ("target.temperatures", [100.5], "from 0.01 to 100 and be other than 1"),
    ("target.temperatures", [2.0, 0.5], "temperatures must rise"),
    ("heldout.fraction", "0.2", "heldout.fraction must be a number"),
    ("heldout.fraction", True, "heldout.fraction must be a number"),
    ("heldout.fraction", 1.0, "heldout.fraction must be at least 0 and below 1"),
    ("heldout.fraction", -0.1, "heldout.fraction must be at least 0 and below 1"),
    ("heldout.seed", 0.5, "heldout.seed must be a whole number"),
    ("vocab_size", 0, "vocab_size must be a whole number"),
    ("vocab_size", 300.0, "vocab_size must be a whole number"),
    ("documents", -1, "documents must be a whole number"),
    ("documents", 10**30, "documents must be a whole number"),
    ("documents", 10**9, "documents_per_shard 6 makes more than 1000000 shards"),
    ("documents_per_shard", 0, "documents_per_shard must be a whole number"),
    ("documents_per_shard", True, "documents_per_shard must be a whole number"),
    ("corpus", ["a.txt"], "each source of corpus must be a section of keys, found 'a.txt'"),
    ("teacher", "name", "teacher must be a section of keys, found 'name'"),
    ("teacher.files", [], "teacher.files must be a section"),
    ("teacher.files", {"config.json": 3}, "teacher.files: config.json must be a sha256"),
    ("rendering", None, "rendering must be a section"),
    ("batching", [], "batching must be a section"),
    ("recorded", 3, "recorded must be a section"),
    ("recorded", {"teacher": "name"}, "recorded.teacher must be a section"),
    ("derived_from", [], "derived_from must be a section"),
    ("tokenizer", [], "tokenizer must be a section"),
    ("tokenizer.files", [], "tokenizer.files must be a section"),
    ("tokenizer.files", {"../evil": "00" * 32}, "tokenizer.files: '../evil' is not a plain file name"),
    ("tokenizer.files", {"tokenizer.json": 3}, "tokenizer.files: tokenizer.json must be a sha256"),
    ("remap_sha256", "00", "remap_sha256 must be a sha256"),
    ("codecs", {}, "codecs must hold logprob alone"),
    ("codecs.logprob", "exact", "codecs.logprob must be a section"),
    ("codecs.logprob", {"id": "sqrt-delta"}, "codecs.logprob must be {'id'"),
    ("codecs.logprob", {}, "codecs.logprob.id must be the name of a codec, found None"),
    ("codecs.logprob", {"id": ["exact"]}, "codecs.logprob.id must be the name of a codec"),
    ("codecs.logprob.log_step", 1, "codecs.logprob must be {'id'"),
    ("codecs.logprob.log_step", "1", "log_step must be a number"),
    ("codecs.logprob.log_step", 10**400, "int too large"),
    ("codecs.logprob.row_step", 2.0, "row_step 2.0 must be"),
    ("codecs.logprob.other", 2.0, "other"),
    ("columns", [], "columns must be a section"),
    ("columns", {"mine": "row"}, "columns: 'mine' must be a section"),
    ("columns", {"Mine": ABOUT}, "a name is a letter"),
    ("columns", {"mine": {**ABOUT, "dtype": "float64"}}, "column mine"),
    ("columns", {"mine": {**ABOUT, "axis": 1}}, "column mine"),
]
ONLY_WRITTEN: list[tuple[str, Any, str]] = [  # a Plan in memory cannot be so
    ("target", None, "target must be a section"),
    ("target", {"kind": "topk"}, "target has no field draws"),
    ("target.temperatures", 2.0, "target.temperatures must be a list"),
    ("target.other", 1, "target has an unknown field 'other'"),
    ("target.p", 1, "the store id says"),
    ("heldout", 0.1, "heldout must be a section"),
    ("corpus", {}, "corpus must be a list"),
    ("other", 1, "plan.json has an unknown field 'other'"),
    ("columns", {}, "the store id says"),
]


def as_file(content: Mapping[str, Any]) -> bytes:
    """The file of a plan, with the hashes that it should have."""
    semantic = {name: value for name, value in content.items() if name != "recorded"}
    content = {**content, "store_id": hashlib.sha256(canonical_json(semantic)).hexdigest()}
    content["sha256"] = hashlib.sha256(canonical_json(content)).hexdigest()
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"


def put(content: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """The same JSON object with another value at a path."""
    return {**content, path[0]: put(content[path[0]], path[1:], value) if path[1:] else value}


def put_in_plan(plan: Plan, path: list[str], value: Any) -> Plan:
    name, *rest = path
    if name in ("target", "heldout"):
        return replace(plan, **{name: replace(getattr(plan, name), **{rest[0]: value})})
    return replace(plan, **{name: put(getattr(plan, name), rest, value) if rest else value})


def read(folder, data: bytes) -> Plan:
    (folder / "plan.json").write_bytes(data)
    return read_plan(LocalFiles(folder))


def test_a_good_plan_written_by_hand_is_read(tmp_path):
    assert read(tmp_path, as_file({**PLAN.semantic(), "recorded": PLAN.recorded})) == PLAN


def test_of_a_kind_that_the_format_does_not_name_the_numbers_say_what_rows_hold(tmp_path):
    plan = replace(PLAN, target=TargetSpec(kind="other", k=6, p=0.5, draws=3, temperatures=(2.0,)))
    assert read(tmp_path, plan.to_json()) == plan
    assert plan.target.describe() == ("other: exact entries up to mass 0.5, at most 6, 3 tail draws; temperatures 1, 2")
    for wrong, words in (
        ({"k": 0, "draws": 0}, "kind other needs k > 0, or k: 0 without p and draws > 0"),
        ({"k": 0, "p": 0.5}, "kind other needs k > 0, or k: 0 without p and draws > 0"),
        ({"k": 0, "temperatures": (2.0,)}, "kind other has no head"),
    ):
        with pytest.raises(ValueError, match=words):
            TargetSpec(**{"kind": "other", "draws": 3, **wrong}).check()


@pytest.mark.parametrize(("field", "value", "words"), WRONG + ONLY_WRITTEN)
def test_what_no_plan_may_hold_is_damage(field, value, words, tmp_path):
    content = put({**PLAN.semantic(), "recorded": PLAN.recorded}, field.split("."), value)
    with pytest.raises(CorruptionError) as caught:
        read(tmp_path, as_file(content))
    assert words in caught.value.what
    assert caught.value.where == str(tmp_path / "plan.json")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", [*PLAN.semantic(), "recorded"])
def test_no_field_may_be_missing(name, tmp_path):
    content = {**PLAN.semantic(), "recorded": PLAN.recorded}
    del content[name]
    with pytest.raises(CorruptionError, match=name):
        read(tmp_path, as_file(content))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b'"x"', b"{" * 9, b"[" * 10**6, b'{"a": NaN}', b"\xff"])
def test_what_is_no_plan_at_all_is_damage(data, tmp_path):
    with pytest.raises(CorruptionError, match=r"plan\.json is damaged"):
        read(tmp_path, data)


@pytest.mark.parametrize(("field", "value", "words"), WRONG)
def test_the_writer_refuses_the_same(field, value, words, tmp_path):
    plan = put_in_plan(PLAN, field.split("."), value)
    with pytest.raises(UsageError) as caught:
        StoreWriter.create(tmp_path / "s", plan, remap=cases.make_remap(), tokenizer_files=cases.TOKENIZER_FILES)
    assert words in caught.value.what
    assert not (tmp_path / "s").exists()


def test_a_codec_from_the_future_is_a_usage_error(tmp_path):
    content = put({**PLAN.semantic(), "recorded": {}}, ["codecs", "logprob"], {"id": "wavelet"})
    with pytest.raises(UsageError, match="unknown log-probability codec 'wavelet'"):
        read(tmp_path, as_file(content))


def test_whole_numbers_and_floats_are_the_same_plan():
    target = TargetSpec(kind="topp", k=6, p=1, temperatures=[2, 50])
    assert target.temperatures == (2.0, 50.0)
    whole = replace(PLAN, target=target, heldout=HeldoutRule(fraction=0))
    exact = TargetSpec(kind="topp", k=6, p=1.0, temperatures=(2.0, 50.0))
    floats = replace(PLAN, target=exact, heldout=HeldoutRule(fraction=0.0))
    assert whole.store_id == floats.store_id
    assert Plan.from_json(whole.to_json()) == floats


def test_shards_are_listed_once():
    assert PLAN.shards() is PLAN.shards()


def test_the_faintest_fraction_makes_one_heldout_shard():
    plan = replace(PLAN, heldout=HeldoutRule(fraction=5e-324))
    plan.check()
    assert [(shard.split, shard.end_document) for shard in plan.shards()[-2:]] == [("train", 24), ("heldout", 24)]


@pytest.mark.parametrize(("seed", "heldout"), [(0, [7, 15, 18, 20, 25, 36]), (7, [3, 4, 7, 8, 12, 18, 20, 26, 33, 35])])
def test_what_is_held_out_is_what_it_was(seed, heldout):
    """Golden: evaluation and later runs work out again what a store held out."""
    assert [number for number in range(40) if HeldoutRule(fraction=0.2, seed=seed).holds_out(number)] == heldout
    more = HeldoutRule(fraction=0.3, seed=seed)
    assert all(more.holds_out(number) for number in heldout), "a larger share holds out the same and more"
    assert not any(HeldoutRule(seed=seed).holds_out(number) for number in range(1000))
