"""The plan: the immutable description of a store, written first, from which its identity follows.

Data path: config -> **plan** -> shards. Everything in `Plan` except `recorded` is semantic: two plans with different
semantic fields describe different stores. `recorded` (workers, device, library versions, paths) may differ freely.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from storage.errors import UsageError

Json = Any  # a JSON value: dict, list, str, int, float, bool or None
Split = Literal["train", "heldout"]
FORMAT_VERSION = 1


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
    format_version: int = FORMAT_VERSION
    recorded: Mapping[str, Json] = field(default_factory=dict)

    def semantic(self) -> dict[str, Json]:
        """Return the fields that make up the identity, as plain JSON values."""
        values = asdict(self)
        del values["recorded"]
        return json.loads(canonical_json(values))  # type: ignore[no-any-return]

    @property
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


def difference(stored: Plan, wanted: Plan) -> list[str]:
    """One line per semantic field in which two plans differ: `path: stored -> wanted`."""
    lines: list[str] = []
    for item in fields(Plan):
        if item.name != "recorded":
            _compare(item.name, stored.semantic()[item.name], wanted.semantic()[item.name], lines)
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
