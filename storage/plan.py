"""The plan: the immutable description of a store, written first, from which its identity follows.

Data path: config -> **plan** -> shards. Everything in `Plan` except `recorded` is semantic: two plans with different
semantic fields describe different stores. `recorded` (workers, device, library versions, paths) may differ freely.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from storage.errors import UsageError

Json = Any  # a JSON value: dict, list, str, int, float, bool or None
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
FORMAT_VERSION = 1
COLUMN_AXES = ("row", "sequence")
COLUMN_DTYPES = ("uint8", "uint16", "uint32", "uint64", "float16", "float32")
_COLUMN_NAME = re.compile("[a-z][a-z0-9_]{0,62}")
LARGEST_DRAWS = 65_535  # a shard holds counts of draws as uint16


def canonical_json(value: Json) -> bytes:
    """Return the one byte string of a JSON value: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """What is kept of the teacher's distribution at each position.

    Attributes:
        kind: `topk` (exact head of k), `topp` (exact head of mass p, at most k), `sampled` (samples only) or `hybrid`
            (exact head of k, and samples of the tail).
        k: most entries of an exact head; 0 for `sampled`.
        p: mass that the head of `topp` reaches unless k ends it first; None for other kinds.
        draws: samples per row, drawn with replacement from what is outside of the head; 0 for exact kinds.
        seed: key of the counter-based random numbers behind the draws.
        temperatures: temperatures other than 1, rising, for which tail mass and entropy are stored too.
    """

    kind: Literal["topk", "topp", "sampled", "hybrid"]
    k: int
    p: float | None = None
    draws: int = 0
    seed: int = 0
    temperatures: tuple[float, ...] = ()

    def check(self) -> None:
        """Check that the fields fit the kind. Raises ValueError."""
        if self.kind == "sampled" and self.k != 0:
            raise ValueError(f"kind sampled has no exact head, found k: {self.k}; kind hybrid has both")
        if self.kind != "sampled" and self.k < 1:
            raise ValueError(f"kind {self.kind} needs k > 0, found k: {self.k}; kind sampled stores no head")
        if self.kind == "topp" and self.p is None:
            raise ValueError("kind topp needs p, the mass that its head reaches, such as p: 0.95")
        if self.kind != "topp" and self.p is not None:
            raise ValueError(f"p belongs to kind topp, found p: {self.p} with kind {self.kind}")
        if self.p is not None and not 0.0 < self.p <= 1.0:
            raise ValueError(f"p must be above 0 and at most 1, found p: {self.p}")
        if self.kind in ("topk", "topp") and self.draws != 0:
            raise ValueError(f"kind {self.kind} draws no samples, found draws: {self.draws}; kind hybrid has both")
        if self.kind in ("sampled", "hybrid") and not 0 < self.draws <= LARGEST_DRAWS:
            raise ValueError(f"kind {self.kind} needs draws from 1 to {LARGEST_DRAWS}, found draws: {self.draws}")
        self._check_temperatures()

    def describe(self) -> str:
        """Say in words what a row holds."""
        head = {
            "topk": f"{self.k} exact entries",
            "topp": f"exact entries up to mass {self.p}, at most {self.k}",
            "sampled": f"{self.draws} draws of the whole distribution",
            "hybrid": f"{self.k} exact entries, {self.draws} tail draws",
        }[self.kind]
        stored = ", ".join(f"{value:g}" for value in (1.0, *self.temperatures))
        return f"{self.kind}: {head}" + (f"; temperatures {stored}" if self.temperatures else "")

    def _check_temperatures(self) -> None:
        values = self.temperatures
        if self.kind == "sampled" and values:
            raise ValueError("temperatures say how an exact head and its tail share the mass; kind sampled has no head")
        if not all(math.isfinite(value) and value > 0.0 and value != 1.0 for value in values):
            raise ValueError(f"temperatures must be above 0 and other than 1 (always stored), found {list(values)}")
        if any(right <= left for left, right in pairwise(values)):
            raise ValueError(f"temperatures must rise, found {list(values)}")


@dataclass(frozen=True, kw_only=True)
class HeldoutRule:
    """Which documents are held out: those whose keyed hash falls below `fraction`.

    The hash is the first 8 bytes of sha256(f"{seed}:{document}") as a big-endian integer, divided by 2**64.
    """

    fraction: float = 0.0
    seed: int = 0

    def holds_out(self, document: int) -> bool:
        """Tell whether document number `document` belongs to the held-out split."""
        digest = hashlib.sha256(f"{self.seed}:{document}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.fraction * 2.0**64


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """One unit of work: the documents of `split` with first_document <= number < end_document."""

    index: int
    split: Split
    first_document: int
    end_document: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The semantic description of a store, plus what is recorded about how it was made.

    Attributes:
        teacher: name, revision, sha256 of each weight and config file, dtype, attention, softcap, logit scale.
        tokenizer: sha256 of each file, `vocabulary_sha256` of the token -> id map, special tokens.
        vocab_size: number of real tokens; ids lie below it. The teacher's head may have more (padded) rows.
        corpus: sources with file hashes or dataset fingerprints, in order.
        documents: number of documents before filters.
        rendering: field, BOS/EOS policy, window and overlap in tokens, filters.
        target: what is stored per position.
        heldout: the rule that separates held-out documents.
        documents_per_shard: document numbers covered by one training shard.
        batching: the batch composition rule (bf16 forwards depend on it).
        codecs: codec id with parameters, by array name.
        remap_sha256: sha256 of the remap's values (frequency rank -> token id) as little-endian uint32.
        derived_from: digest and id of the store that this one was converted from, and how; None if a teacher wrote it.
        columns: values that a conversion added, by name: `{"axis": "row" or "sequence", "dtype": ...}`.
        recorded: free to differ, never compared.
    """

    teacher: Mapping[str, Json]
    tokenizer: Mapping[str, Json]
    vocab_size: int
    corpus: tuple[Mapping[str, Json], ...]
    documents: int
    rendering: Mapping[str, Json]
    target: TargetSpec
    heldout: HeldoutRule
    documents_per_shard: int
    batching: Mapping[str, Json]
    codecs: Mapping[str, Mapping[str, Json]]
    remap_sha256: str
    derived_from: Mapping[str, Json] | None = None
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    recorded: Mapping[str, Json] = field(default_factory=dict)

    def semantic(self) -> dict[str, Json]:
        """Return the fields that make up the identity, as plain JSON values."""
        values = asdict(self)
        del values["recorded"]
        if not values["columns"]:
            del values["columns"]  # a plan without columns says nothing of them
        return json.loads(canonical_json(values))  # type: ignore[no-any-return]

    @cached_property
    def store_id(self) -> str:
        """Sha256 (hex) of the canonical JSON of the semantic fields."""
        return hashlib.sha256(canonical_json(self.semantic())).hexdigest()

    def to_json(self) -> bytes:
        """Return the content of plan.json: all fields, the store id and a sha256 of the rest, indented for people."""
        content = {**self.semantic(), "recorded": self.recorded, "store_id": self.store_id}
        content["sha256"] = hashlib.sha256(canonical_json(content)).hexdigest()
        return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Plan:
        """Read plan.json.

        Raises:
            UsageError: it is a whole plan, of another format version.
            ValueError, KeyError, TypeError, AttributeError: these are not the bytes of a plan.
        """
        content = json.loads(data)
        own = content.pop("sha256")
        if hashlib.sha256(canonical_json(content)).hexdigest() != own:
            raise ValueError("its own sha256 does not agree with its content")
        if content["format_version"] != FORMAT_VERSION:
            raise UsageError(
                f"the store has format version {content['format_version']!r}, this program reads {FORMAT_VERSION}",
                where="plan.json: format_version",
                fix="use the version of topk-distill that wrote it, or a newer one",
            )
        stated = content.pop("store_id")
        content["target"] = TargetSpec(
            **{**content["target"], "temperatures": tuple(content["target"]["temperatures"])}
        )
        content["heldout"] = HeldoutRule(**content["heldout"])
        content["corpus"] = tuple(content["corpus"])
        plan = cls(**content)
        check_columns(plan.columns)
        if plan.store_id != stated:
            raise ValueError(f"the store id says {stated}, the content is {plan.store_id}")
        if plan.to_json() != data:
            raise ValueError("it is not in the one form in which plans are written")
        return plan

    def shards(self) -> tuple[ShardSpec, ...]:
        """List every shard: training shards in document order, then held-out ones.

        A held-out shard covers a document range wide enough to hold about as many held-out documents as a training
        shard holds training documents.
        """
        specs: list[ShardSpec] = []
        for split, step in (("train", self.documents_per_shard), ("heldout", self._heldout_step())):
            if step is None:
                continue
            for first in range(0, self.documents, step):
                end = min(first + step, self.documents)
                specs.append(ShardSpec(index=len(specs), split=split, first_document=first, end_document=end))  # type: ignore[arg-type]
        return tuple(specs)

    def _heldout_step(self) -> int | None:
        if self.heldout.fraction <= 0.0:
            return None
        return max(self.documents_per_shard, round(self.documents_per_shard / self.heldout.fraction))

    def documents_of(self, shard: ShardSpec) -> list[int]:
        """Document numbers of a shard, in order: its range, restricted to its split."""
        numbers = range(shard.first_document, shard.end_document)
        wanted = shard.split == "heldout"
        return [number for number in numbers if self.heldout.holds_out(number) == wanted]


def check_columns(columns: Mapping[str, Mapping[str, str]]) -> None:
    """Check the names, axes and types of columns. Raises ValueError."""
    for name, about in columns.items():
        if not _COLUMN_NAME.fullmatch(name):
            raise ValueError(f"column {name!r}: a name is a letter, then up to 62 of a-z, 0-9 and _")
        if about.keys() != {"axis", "dtype"} or about["axis"] not in COLUMN_AXES or about["dtype"] not in COLUMN_DTYPES:
            raise ValueError(f"column {name}: {dict(about)} is no axis of {COLUMN_AXES} and dtype of {COLUMN_DTYPES}")


def difference(stored: Plan, wanted: Plan) -> list[str]:
    """One line per semantic field in which two plans differ: `path: stored -> wanted`."""
    lines: list[str] = []
    for item in fields(Plan):
        if item.name != "recorded":
            _compare(item.name, stored.semantic().get(item.name), wanted.semantic().get(item.name), lines)
    return lines


def _compare(path: str, stored: Json, wanted: Json, lines: list[str]) -> None:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted(stored.keys() | wanted.keys()):
            _compare(f"{path}.{key}", stored.get(key), wanted.get(key), lines)
    elif isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        for index, (left, right) in enumerate(zip(stored, wanted, strict=True)):
            _compare(f"{path}[{index}]", left, right, lines)
    elif stored != wanted:
        lines.append(f"{path}: {stored!r} -> {wanted!r}")
