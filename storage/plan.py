"""The plan: the immutable description of a store, written first, from which its identity follows.

Data path: config -> **plan** -> shards. Everything in `Plan` except `recorded` is semantic: two plans with different
semantic fields describe different stores. `recorded` (workers, device, library versions, paths) may differ freely.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Literal

from storage.codecs import check_codecs
from storage.errors import UsageError
from storage.target import LARGEST_SEED, LARGEST_VOCABULARY
from storage.target import TargetSpec as TargetSpec
from storage.values import (
    Json,
    as_float,
    canonical_json,
    json_differences,
    parse_json,
    require_fields,
    require_hash,
    require_list,
    require_number,
    require_section,
    require_whole,
    short,
)

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
FORMAT_VERSION = 1
COLUMN_AXES = ("row", "sequence")
COLUMN_DTYPES = ("uint8", "uint16", "uint32", "uint64", "float16", "float32")
_COLUMN_NAME = re.compile("[a-z][a-z0-9_]{0,62}")
LARGEST_DOCUMENTS = 2**63 - 1  # rows hold document numbers as int64
LARGEST_SHARDS = 1_000_000  # of training; a reader lists them all


@dataclass(frozen=True, kw_only=True)
class HeldoutRule:
    """Which documents are held out: those whose keyed hash falls below `fraction`.

    The hash is the first 8 bytes of sha256(f"{seed}:{document}") as a big-endian integer, divided by 2**64.
    """

    fraction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "fraction", as_float(self.fraction))

    def check(self) -> None:
        """Check types and ranges. Raises ValueError."""
        require_number("heldout.fraction", self.fraction)
        if not 0.0 <= self.fraction < 1.0:
            raise ValueError(f"heldout.fraction must be at least 0 and below 1, found {self.fraction}")
        require_whole("heldout.seed", self.seed, least=0, most=LARGEST_SEED)

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

    def check(self) -> None:
        """Check that every field has the right type and a legal value.

        Raises:
            UsageError: the codec is not one that this version knows.
            ValueError: anything else; names the field.
        """
        require_whole("format_version", self.format_version, least=FORMAT_VERSION, most=FORMAT_VERSION)
        for name in ("teacher", "tokenizer", "rendering", "batching", "recorded"):
            require_section(name, getattr(self, name))
        require_section("recorded.teacher", self.recorded.get("teacher", {}))
        for name, described in (("teacher", self.teacher), ("tokenizer", self.tokenizer)):
            _check_files(f"{name}.files", described.get("files", {}))
        require_list("corpus", self.corpus)
        for source in self.corpus:
            require_section("each source of corpus", source)
        require_whole("vocab_size", self.vocab_size, least=1, most=LARGEST_VOCABULARY)
        require_whole("documents", self.documents, least=0, most=LARGEST_DOCUMENTS)
        require_whole("documents_per_shard", self.documents_per_shard, least=1, most=LARGEST_DOCUMENTS)
        if self.documents > LARGEST_SHARDS * self.documents_per_shard:
            raise ValueError(
                f"documents_per_shard {self.documents_per_shard} makes more than {LARGEST_SHARDS} shards of"
                f" {self.documents} documents"
            )
        self.target.check()
        self.heldout.check()
        check_codecs(self.codecs)
        require_hash("remap_sha256", self.remap_sha256)
        if self.derived_from is not None:
            require_section("derived_from", self.derived_from)
        check_columns(self.columns)

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
            UsageError: it is a whole plan, of another format version or with a codec that this version does not know.
            ValueError: these are not the bytes of a plan.
        """
        content = parse_json(data)
        require_section("plan.json", content)
        own = content.pop("sha256", None)
        if hashlib.sha256(canonical_json(content)).hexdigest() != own:
            raise ValueError("its own sha256 does not agree with its content")
        _check_version(content.get("format_version"))
        stated = content.pop("store_id", None)
        plan = cls._built({"columns": {}, **content})
        plan.check()
        if plan.store_id != stated:
            raise ValueError(f"the store id says {stated}; written as plans are, the content is {plan.store_id}")
        if plan.to_json() != data:
            raise ValueError("it is not in the one form in which plans are written")
        return plan

    @classmethod
    def _built(cls, content: dict[str, Json]) -> Plan:
        """Build a plan from parsed JSON, whose fields may hold anything yet."""
        require_fields("plan.json", content, cls)
        target, heldout = content["target"], content["heldout"]
        require_fields("target", target, TargetSpec)
        require_list("target.temperatures", target["temperatures"])
        require_fields("heldout", heldout, HeldoutRule)
        require_list("corpus", content["corpus"])
        return cls(
            **{
                **content,
                "target": TargetSpec(**target),
                "heldout": HeldoutRule(**heldout),
                "corpus": tuple(content["corpus"]),
            }
        )

    def shards(self) -> tuple[ShardSpec, ...]:
        """List every shard: training shards in document order, then held-out ones.

        A held-out shard covers a document range wide enough to hold about as many held-out documents as a training
        shard holds training documents.
        """
        return self._shards

    @cached_property
    def _shards(self) -> tuple[ShardSpec, ...]:
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
        # A step of all documents is as good as any longer one, and the quotient may be infinite.
        step = min(self.documents_per_shard / self.heldout.fraction, self.documents)
        return max(self.documents_per_shard, round(step))

    def documents_of(self, shard: ShardSpec) -> list[int]:
        """Return the document numbers of a shard, in order: its range, restricted to its split."""
        numbers = range(shard.first_document, shard.end_document)
        wanted = shard.split == "heldout"
        return [number for number in numbers if self.heldout.holds_out(number) == wanted]


def check_columns(columns: Mapping[str, Mapping[str, str]]) -> None:
    """Check the names, axes and types of columns. Raises ValueError."""
    require_section("columns", columns)
    for name, about in columns.items():
        require_section(f"columns: {short(name)}", about)
        if not _COLUMN_NAME.fullmatch(name):
            raise ValueError(f"column {name!r}: a name is a letter, then up to 62 of a-z, 0-9 and _")
        if about.keys() != {"axis", "dtype"} or about["axis"] not in COLUMN_AXES or about["dtype"] not in COLUMN_DTYPES:
            raise ValueError(
                f"column {name}: {dict(about)} must be an axis of {COLUMN_AXES} and a dtype of {COLUMN_DTYPES}"
            )


def _check_version(version: Json) -> None:
    require_whole("format_version", version, least=1, most=2**31)
    if version != FORMAT_VERSION:
        raise UsageError(
            f"the store has format version {version}, this program reads {FORMAT_VERSION}",
            where="plan.json: format_version",
            fix="use the version of topk-distill that wrote it, or a newer one",
        )


def _check_files(field: str, hashes: Json) -> None:
    require_section(field, hashes)
    for name, value in hashes.items():
        if not name or name.startswith(".") or set(name) & set("/\\\0"):
            raise ValueError(f"{field}: {short(name)} is not a plain file name")
        require_hash(f"{field}: {name}", value)


def difference(stored: Plan, wanted: Plan) -> list[str]:
    """Return a line for each semantic field in which two plans differ: `path: stored -> wanted`."""
    before, after = stored.semantic(), wanted.semantic()
    return [
        line
        for item in fields(Plan)
        for line in json_differences(before.get(item.name), after.get(item.name), item.name)
    ]
