"""Stores whose author lies, with every hash mended: an error of damage or harmless, and reader and verify agree.

Numbers, texts and arrays of every file. The whole battery runs in torture; a seeded sample of it, and what was once
missed, run always.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import storage_cases as cases
from forgeries import (
    MEMORY,
    Forged,
    Shard,
    array_changes,
    bodies,
    indices,
    json_forgeries,
    judge,
    layout_of,
    put_values,
    values_of,
)
from storage_cases import EXACT, TARGETS, make_plan
from torture_results import save

from storage.errors import CorruptionError
from storage.files.memory import MemoryFiles
from storage.plan import HeldoutRule
from storage.reader import StoreReader
from storage.values import canonical_json

SEED = 20261201
Case = tuple[str, Callable[[], MemoryFiles]]  # a word, and what makes the forged store
KINDS = {"temperatures": {}, "topp": {}, "sampled": {}, "exact": {"codecs": EXACT}}


def good(kind: str) -> MemoryFiles:
    """A small store of two shards, one held out."""
    store = MemoryFiles()
    target = TARGETS.get(kind, TARGETS["hybrid"])
    plan = make_plan(
        documents=8, documents_per_shard=8, heldout=HeldoutRule(fraction=0.4, seed=3), target=target, **KINDS[kind]
    )
    cases.write_store(store, plan, longest=12)
    return store


def of_json(forged: Forged, store: MemoryFiles) -> Iterator[Case]:
    content = {name: json.loads(data) for name, data in cases.contents(store).items() if name.endswith(".json")}
    seal, record = content["sealed.json"], content["commits/000000.json"]
    for known in (seal, record):
        del known["sha256"]
    del record["directory"]
    for word, change in json_forgeries(seal):
        yield f"seal {word}", lambda change=change: forged.put_together(change_seal=change)
    for word, change in json_forgeries(record):

        def of_record(number, given, change=change):
            return given if number else change(given)

        yield f"record {word}", lambda change=of_record: forged.put_together(change_record=change)
    for word, change in json_forgeries(forged.plan):

        def of_plan(change=change):
            other = forged.copy()
            other.plan = change(other.plan)
            return other.put_together()

        yield f"plan {word}", of_plan
    for name in [name for name in forged.shards[0].files if name.endswith("zarr.json")]:
        for word, change in json_forgeries(json.loads(forged.shards[0].files[name])):

            def of_metadata(name=name, change=change):
                other = forged.copy()
                files = other.shards[0].files
                files[name] = canonical_json(change(json.loads(files[name])))
                return other.put_together()

            yield f"{name} {word}", of_metadata


def of_arrays(forged: Forged, rng: random.Random, *, flips: int) -> Iterator[Case]:
    names = [name.split("/")[0] for name in forged.shards[0].files if name.endswith("/zarr.json")]
    for name in names:
        for word, values in array_changes(values_of(forged.shards[0], name)):
            yield f"{name} {word}", _with(forged, lambda shard, n=name, v=values: put_values(shard, n, v))
        path = f"{name}/{layout_of(forged.shards[0], name).key}"
        for word, data in (*indices(forged.shards[0], name), *bodies(forged.shards[0], name, rng, flips)):
            yield f"{path} {word}", _with(forged, lambda shard, p=path, d=data: shard.files.update({p: d}))


def _with(forged: Forged, change: Callable[[Shard], None]) -> Callable[[], MemoryFiles]:
    def make() -> MemoryFiles:
        other = forged.copy()
        change(other.shards[0])
        return other.put_together()

    return make


def study(
    cases_: Iterator[Case] | list[Case], *, sequences: int, memory: bool = False
) -> tuple[dict[str, int], list[str]]:
    """Judge cases: how many were refused by both, by verify alone, harmless; and what is wrong."""
    counted, faults = {"refused": 0, "by_verify_alone": 0, "harmless": 0}, []
    for word, make in cases_:
        try:
            verdict = judge(make(), memory=memory)
        except Exception as error:
            faults.append(f"{word}: {type(error).__name__}: {error}")
            continue
        fault = verdict.fault(sequences=sequences)
        if fault is not None:
            faults.append(f"{word}: {fault}")
        counted["refused" if verdict.reader else "by_verify_alone" if verdict.verify else "harmless"] += 1
    return counted, faults


@pytest.fixture(scope="module", params=KINDS)
def forged(request) -> tuple[Forged, MemoryFiles, int]:
    store = good(request.param)
    whole = judge(store)
    assert (whole.verify, whole.reader) == ("", "")
    assert whole.sequences > 5
    return Forged(store), store, whole.sequences


def test_what_is_put_together_unchanged_is_the_store_itself(forged):
    taken_apart, store, _ = forged
    assert cases.tree(taken_apart.copy().put_together()) == cases.tree(store)


def test_a_sample_of_json_forgeries(forged):
    taken_apart, store, sequences = forged
    sample = random.Random(SEED).sample(list(of_json(taken_apart, store)), 40)
    counted, faults = study(sample, sequences=sequences, memory=True)
    assert faults == []
    assert counted["refused"] > 30


def test_a_sample_of_array_forgeries(forged):
    taken_apart, _, sequences = forged
    sample = random.Random(SEED).sample(list(of_arrays(taken_apart, random.Random(SEED), flips=2)), 60)
    counted, faults = study(sample, sequences=sequences)
    assert faults == []
    assert counted["refused"] > 20


@pytest.mark.torture
def test_every_json_forgery(forged, request):
    started = time.perf_counter()
    taken_apart, store, sequences = forged
    counted, faults = study(of_json(taken_apart, store), sequences=sequences)
    assert faults == []
    save(f"forged JSON, {request.node.callspec.params['forged']}", started=started, **counted)


@pytest.mark.torture
def test_every_array_forgery(forged, request):
    started = time.perf_counter()
    taken_apart, _, sequences = forged
    counted, faults = study(of_arrays(taken_apart, random.Random(SEED), flips=60), sequences=sequences)
    assert faults == []
    save(f"forged arrays, {request.node.callspec.params['forged']}", started=started, seed=SEED, **counted)


# What must be found, each by its own words. Most of it was once missed ------------------------------------------------


def counts(**changed: object) -> Callable[[Forged], MemoryFiles]:
    """Record, and with it the seal, states other counts of shard 0."""

    def forge(forged: Forged) -> MemoryFiles:
        forged.shards[0].record["counts"].update(changed)
        return forged.put_together()

    return forge


def seal(name: str, value: object) -> Callable[[Forged], MemoryFiles]:
    """The seal alone states something else of shard 0."""

    def change(content):
        content["shards"][0][name] = value
        return content

    return lambda forged: forged.put_together(change_seal=change)


def objects(change: Callable[[dict], object]) -> Callable[[Forged], MemoryFiles]:
    """The record of shard 0 lists other files."""

    def change_record(number, record):
        if number == 0:
            change(record["objects"])
        return record

    return lambda forged: forged.put_together(change_record=change_record)


def array(name: str, change: Callable) -> Callable[[Forged], MemoryFiles]:
    """An array of shard 0 has other values."""

    def forge(forged: Forged) -> MemoryFiles:
        put_values(forged.shards[0], name, change(values_of(forged.shards[0], name)))
        return forged.put_together()

    return forge


def lengths(axis: str, length: int, *, chunk: int | None = None, **changed: int) -> Callable[[Forged], MemoryFiles]:
    """Record, seal and every zarr.json of an axis agree on another length of it."""

    def forge(forged: Forged) -> MemoryFiles:
        shard = forged.shards[0]
        shard.record["counts"].update(changed)
        for name in [name.split("/")[0] for name in shard.files if name.endswith("/zarr.json")]:
            layout = layout_of(shard, name)
            if layout.axis == axis:
                other = replace(layout, length=length, chunk=chunk or length)
                shard.files[f"{name}/zarr.json"] = other.metadata_bytes()
        return forged.put_together()

    return forge


def long_chunks(forged: Forged) -> MemoryFiles:
    """A store of 8,000 tokens in one chunk."""
    shard = forged.shards[0]
    shard.record["counts"]["tokens"] = 8000
    for name in ("tokens", "token_end_byte", "has_row"):
        length = 1000 if name == "has_row" else 8000
        put_values(shard, name, np.resize(values_of(shard, name), length))
    return forged.put_together()


def put_at(place: int, value: object) -> Callable:
    def change(values: np.ndarray) -> np.ndarray:
        values[place] = value
        return values

    return change


def emptied(forged: Forged) -> MemoryFiles:
    """Record and seal agree that shard 0 is empty, and list what such a shard has; its metadata tells of more."""
    shard = forged.shards[0]
    shard.record["counts"] = dict.fromkeys(shard.record["counts"], 0) | {"head_mass": 0.0}
    shard.files = {name: data for name, data in shard.files.items() if name.endswith("zarr.json") or "_offset/" in name}
    return forged.put_together()


def smaller_k(forged: Forged) -> MemoryFiles:
    """Heads of up to 9 entries under a plan that allows 8."""
    forged.plan["target"]["k"] = 8
    for shard in forged.shards:
        shard.files["zarr.json"] = shard.files["zarr.json"].replace(b'"k":9', b'"k":8')
    return forged.put_together()


def without_head(forged: Forged) -> MemoryFiles:
    """A row gives its head to the next one of its sequence, which is not too large for it."""
    shard = forged.shards[0]
    size, rows = values_of(shard, "head_size"), values_of(shard, "row_offset").tolist()
    pairs = [row for first, end in pairwise(rows) for row in range(first, end - 1) if size[row] + size[row + 1] <= 9]
    size[pairs[0] + 1] += size[pairs[0]]
    size[pairs[0]] = 0
    put_values(shard, "head_size", size)
    return forged.put_together()


def at_the_end(forged: Forged) -> MemoryFiles:
    """The first row of a sequence moves to its last token."""
    shard = forged.shards[0]
    bits, tokens = np.unpackbits(values_of(shard, "has_row")), values_of(shard, "token_offset")
    bits[np.flatnonzero(bits)[0]] = 0
    bits[tokens[np.flatnonzero(np.diff(tokens) > 1)[0] + 1] - 1] = 1
    put_values(shard, "has_row", np.packbits(bits))
    return forged.put_together()


def two_more_rows(packed: np.ndarray) -> np.ndarray:
    """Mark two positions more."""
    bits = np.unpackbits(packed)
    bits[np.flatnonzero(bits == 0)[:2]] = 1
    return np.packbits(bits)


def fallen(values: np.ndarray) -> np.ndarray:
    """Offsets that go back and come again."""
    values[1], values[2] = values[2] + 1, values[1]
    return values


def detour(values: np.ndarray) -> np.ndarray:
    """Offsets whose differences rise in 64 bits, though they leave the axis on the way."""
    values[1:3] = 2**63 - 1, 2**64 - 2
    return values


LIES: dict[str, tuple[str, Callable[[Forged], MemoryFiles], str]] = {
    "seal: fewer sequences": (
        "sampled",
        seal("sequences", 1),
        "it says sequences 1 of shard 0, the commit record [2-9]",
    ),
    "seal: no sequence": ("sampled", seal("sequences", 0), "it says sequences 0 of shard 0"),
    "seal: more rows": ("sampled", seal("rows", 1000), "it says rows 1000 of shard 0"),
    "seal: other tokens": ("sampled", seal("tokens", 3), "it says tokens 3 of shard 0"),
    "seal: a text": ("sampled", seal("sequences", "5"), "sequences must be a whole number .* found '5'"),
    "seal: a split": ("sampled", seal("split", ["train"]), "split must be one of train, heldout"),
    "seal: a hash": ("sampled", seal("record_sha256", "x"), "record_sha256 must be a sha256"),
    "record: no sequence": (
        "sampled",
        counts(sequences=0, tokens=0, rows=0, tail_entries=0),
        "the size|does not list|lists",
    ),
    "record: a shard of nothing": ("sampled", lengths("none", 1, sequences=0), "counts.tokens must be .* from 0 to 0"),
    "an empty shard that is none": ("sampled", emptied, "values; the commit record says"),
    "record: a text of mass": ("topp", counts(head_mass="0.9"), "counts.head_mass must be a number"),
    "record: mass beyond 1": ("topp", counts(head_mass=1.5), "counts.head_mass must be a number from 0 to 1"),
    "record: a whole mass": ("topp", counts(head_mass=1), "counts.head_mass must be a number"),
    "record: more rows than tokens": ("sampled", counts(rows=10**6), "counts.rows must be a whole number from 0"),
    "record: fewer heads than rows": ("topp", counts(head_entries=3), "counts.head_entries must be a whole number"),
    "record: heads beyond k": ("topp", counts(head_entries=10**5), "counts.head_entries must be a whole number"),
    "record: a file less": ("topp", objects(lambda listed: listed.pop("entropy/c/0")), "does not list 'entropy/c/0'"),
    "record: a file more": (
        "topp",
        objects(lambda listed: listed.update({"x/c/0": listed["zarr.json"]})),
        "lists 'x/c/0'",
    ),
    "record: a file outside": (
        "topp",
        objects(lambda listed: listed.update({"../../plan.json": listed["zarr.json"]})),
        "lists '../../plan.json'",
    ),
    "record: 10^15 bytes": (
        "topp",
        objects(lambda listed: listed["tokens/c/0"].update(size=10**15)),
        "the size of tokens/c/0 must be",
    ),
    "10^12 sequences": (
        "sampled",
        lengths("sequence", 10**12, sequences=10**12),
        "counts.sequences must be .* from 0 to 16777216",
    ),
    "10^12 tokens": ("sampled", lengths("token", 10**12, tokens=10**12), "the size of tokens/c/0 must be"),
    "a chunk as long as a shard": ("sampled", long_chunks, "the longest that the format allows is"),
    "an array of another length": (
        "sampled",
        array("document", lambda values: values[:-1]),
        "it states . values; the commit record says",
    ),
    "offsets that fall": ("sampled", array("token_offset", fallen), "offsets do not rise"),
    "offsets beyond 64 bits": ("sampled", array("row_offset", detour), "offsets do not rise"),
    "offsets that begin late": ("sampled", array("row_offset", put_at(0, 1)), "offsets do not rise"),
    "more marks than rows": ("sampled", array("has_row", two_more_rows), "has_row and row_offset disagree"),
    "a row at the last token": ("sampled", at_the_end, "the last token of a sequence has a row"),
    "bits beyond the last token": ("sampled", array("has_row", put_at(-1, 255)), "bits beyond the last token"),
    "a head larger than k": ("topp", smaller_k, "head_size goes from . to 9; it may be 1 to 8"),
    "a row without a head": ("topp", without_head, "head_size goes from 0 to"),
    "sizes of heads": ("topp", array("head_size", lambda values: np.roll(values, 1)), "do not add up to head_offset"),
    "counts of draws": ("sampled", array("count", lambda values: values + 1), "counts do not add up to 7 draws"),
    "documents of another shard": ("sampled", array("document", put_at(0, 8)), "it has documents beyond 0 to 7"),
    "no number": ("topp", array("entropy", put_at(3, np.nan)), "entropy is NaN"),
    "no log-probability": ("exact", array("logprob", put_at(3, np.nan)), "log-probabilities go from nan"),
    "a rank beyond the vocabulary": ("topp", array("head_ids", put_at(3, 300)), "rank 300 lies outside"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie):
    kind, forge, message = LIES[lie]
    taken_apart = Forged(good(kind))
    store = forge(taken_apart)
    verdict = judge(store, memory=True)
    assert re.search(message, verdict.reader), verdict
    assert re.search(message, verdict.verify), verdict
    assert verdict.peak < MEMORY


def test_an_empty_shard_proves_that_it_is_when_the_store_is_opened():
    """No sequence of it will ever be asked for, and those of other shards would have other numbers."""
    with pytest.raises(CorruptionError, match="values; the commit record says"):
        StoreReader(emptied(Forged(good("sampled"))))
