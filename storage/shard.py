"""One shard: a batch of sequences as a Zarr v3 group in memory, and back.

Data path: `SequenceBatch` -> **group of arrays, name -> bytes** -> commit; open shard -> slices -> `SequenceBatch`.
The same batch and plan give the same bytes.

Axis legend: T tokens, S sequences, R rows, H head entries, C tail entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.arrays import OFFSETS, array_lengths, array_specs, is_even
from storage.chunks import encode_array
from storage.codecs import logprob_codec
from storage.faults import fault_point
from storage.plan import FORMAT_VERSION, Json, Plan, ShardSpec, canonical_json
from storage.records import Counts
from storage.rows import SequenceBatch
from storage.segments import constant_size, cumsum_rows, diff_rows, row_starts

GROUP = "zarr.json"
Slices = Mapping[str, NDArray[Any]]  # stored values by array name, cut to a run of sequences


def encode_shard(plan: Plan, spec: ShardSpec, batch: SequenceBatch, rank: NDArray[np.uint32]) -> dict[str, bytes]:
    """Return the files of a shard by name. The batch must have passed `validate.check_batch`.

    Args:
        plan: of the store.
        spec: the shard.
        batch: its sequences.
        rank: frequency rank of each token id [V].
    """
    objects = {GROUP: canonical_json(group_metadata(plan, spec))}
    values = _stored_values(plan, batch, rank)
    even = is_even(plan, rows=batch.rows, head=len(batch.head_ids))
    for name, array in array_specs(plan, end_bytes=batch.token_end_byte is not None, even=even).items():
        if array.ranks is not None:
            values[name] = values[name].reshape(-1, array.ranks)
        layout = array.layout(len(values[name]), tokens=len(batch.tokens), rows=batch.rows)
        fault_point("encode")
        objects[f"{name}/zarr.json"] = layout.metadata_bytes()
        if layout.length:
            with np.errstate(over="ignore"):  # beyond float16 is infinity, where validate.py lets it pass
                stored = values[name].astype(array.dtype)
            objects[f"{name}/{layout.key}"] = encode_array(stored, layout)
    return objects


def group_metadata(plan: Plan, spec: ShardSpec) -> dict[str, Json]:
    """Return the zarr.json of the group: which store and shard this is, and what it takes to decode it."""
    about = {
        "format_version": FORMAT_VERSION,
        "store_id": plan.store_id,
        "shard": spec.index,
        "split": spec.split,
        "first_document": spec.first_document,
        "end_document": spec.end_document,
        "kind": plan.target.kind,
        "k": plan.target.k,
        "draws": plan.target.draws,
        "vocab_size": plan.vocab_size,
        "remap_sha256": plan.remap_sha256,
        "codecs": plan.semantic()["codecs"],
    }
    return {"zarr_format": 3, "node_type": "group", "attributes": {"topk_distill": about}}


def counts_of(batch: SequenceBatch) -> Counts:
    """Return the counts that go into the commit record."""
    with np.errstate(over="ignore"):
        tail_logit = batch.tail_logit.astype(np.float16).astype(np.float64)  # as stored, so that a reader can check it
    head_mass = np.exp(-np.logaddexp(0.0, tail_logit))
    return Counts(
        sequences=len(batch),
        tokens=len(batch.tokens),
        rows=batch.rows,
        head_entries=len(batch.head_ids),
        tail_entries=len(batch.tail_ids),
        head_mass=round(float(head_mass.mean()), 6) if batch.rows else 0.0,
    )


def axis_lengths(counts: Counts) -> dict[str, int]:
    """Return the length of each axis that a record's counts imply."""
    return array_lengths(
        sequences=counts.sequences,
        tokens=counts.tokens,
        rows=counts.rows,
        head=counts.head_entries,
        tail=counts.tail_entries,
    )


def _stored_values(plan: Plan, batch: SequenceBatch, rank: NDArray[np.uint32]) -> dict[str, NDArray[Any]]:
    codec = logprob_codec(plan.codecs["logprob"])
    tail_rank, count = _sorted_tails(rank[batch.tail_ids], batch.count, batch.tail_size)
    values: dict[str, NDArray[Any]] = {
        "tokens": rank[batch.tokens],
        "has_row": np.packbits(batch.has_row),
        "token_offset": batch.token_offset,
        "row_offset": batch.row_offset,
        "head_offset": batch.head_offset,
        "tail_offset": batch.tail_offset,
        "document": batch.document,
        "window_start": batch.window_start,
        "head_size": batch.head_size,
        "tail_size": batch.tail_size,
        "head_ids": rank[batch.head_ids],
        "logprob": codec.encode(batch.logprob, batch.head_size),
        "tail_ids": diff_rows(tail_rank, batch.tail_size),
        "count": count,
        "tail_logit": batch.tail_logit,
        "logsumexp": batch.logsumexp,
        "entropy": batch.entropy,
        "next_logprob": batch.next_logprob,
    }
    if batch.token_end_byte is not None:
        values["token_end_byte"] = batch.token_end_byte
    return values


def _sorted_tails(
    rank_C: NDArray[np.uint32], count_C: NDArray[np.uint16], size_R: NDArray[np.int32]
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Sort the tail of each row by rank: the order of samples carries nothing, and differences are small."""
    row_C = np.repeat(np.arange(len(size_R), dtype=np.int64), size_R)
    order = np.argsort((row_C << 32) | rank_C, kind="stable")
    return rank_C[order], count_C[order]


def decode_batch(plan: Plan, runs: Sequence[Slices], remap: NDArray[np.uint32]) -> SequenceBatch:
    """Join runs of sequences, each cut from a shard, and decode them.

    Args:
        plan: of the store.
        runs: stored values by array name. Offsets are as stored: they begin anywhere.
        remap: token id of each rank [V].

    Raises:
        ValueError: sizes contradict each other or a rank is outside the vocabulary.
    """
    edges = {name: _joined_offsets([run[name] for run in runs if name in run]) for name in OFFSETS}
    head_size = _joined(runs, "head_size", np.int32)
    tail_size = _joined(runs, "tail_size", np.int32, rows=len(head_size))
    _check_sizes(edges, head_size, tail_size)
    tail_logit = _joined(runs, "tail_logit", np.float32)
    codec = logprob_codec(plan.codecs["logprob"])
    logprob = codec.decode(np.concatenate([run["logprob"] for run in runs]), head_size)
    if codec.renormalises:
        logprob = scale_heads(logprob, head_size, tail_logit)
    deltas = _joined(runs, "tail_ids", np.int64, rows=0)
    return SequenceBatch(
        tokens=_ids(remap, _joined(runs, "tokens", None)),
        token_offset=edges["token_offset"],
        row_offset=edges["row_offset"],
        head_offset=edges["head_offset"],
        tail_offset=edges["tail_offset"] if plan.target.draws else np.zeros_like(edges["row_offset"]),
        document=_joined(runs, "document", np.int64),
        window_start=_joined(runs, "window_start", np.int64),
        token_end_byte=_end_bytes(runs),
        has_row=_joined(runs, "has_row", np.bool_),
        head_size=head_size,
        tail_size=tail_size,
        head_ids=_ids(remap, _joined(runs, "head_ids", None)),
        logprob=logprob,
        tail_ids=_ids(remap, cumsum_rows(deltas, tail_size)),
        count=_joined(runs, "count", np.uint16, rows=0),
        tail_logit=tail_logit,
        logsumexp=_joined(runs, "logsumexp", np.float32),
        entropy=_joined(runs, "entropy", np.float32),
        next_logprob=_joined(runs, "next_logprob", np.float32),
        draws=plan.target.draws,
    )


def _joined(runs: Sequence[Slices], name: str, dtype: Any, *, rows: int = 0) -> NDArray[Any]:
    """Concatenate an array over the runs; zeros [rows] if the plan has no such array."""
    parts = [run[name] for run in runs if name in run]
    if not parts:
        return np.zeros(rows, dtype)
    joined = np.concatenate(parts)
    return joined if dtype is None else joined.astype(dtype, copy=False)


def _joined_offsets(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    sizes = [np.diff(part.astype(np.int64)) for part in parts]
    return row_starts(np.concatenate(sizes)) if sizes else np.zeros(1, np.int64)


def _check_sizes(
    edges: Mapping[str, NDArray[np.int64]], head_size: NDArray[np.int32], tail_size: NDArray[np.int32]
) -> None:
    for name, sizes in (("head_offset", head_size), ("tail_offset", tail_size)):
        starts = row_starts(sizes)[edges["row_offset"]]
        if len(edges[name]) > 1 and not np.array_equal(starts, edges[name]):
            raise ValueError(f"the row sizes do not add up to {name}")


def _ids(remap: NDArray[np.uint32], ranks: NDArray[Any]) -> NDArray[np.uint32]:
    if len(ranks) and int(ranks.max()) >= len(remap):
        raise ValueError(f"rank {int(ranks.max())} lies outside the vocabulary of {len(remap)}")
    ids: NDArray[np.uint32] = remap[ranks]
    return ids


def _end_bytes(runs: Sequence[Slices]) -> NDArray[np.uint32] | None:
    if not all("token_end_byte" in run for run in runs):
        return None
    return np.concatenate([run["token_end_byte"] for run in runs]).astype(np.uint32)


def scale_heads(
    logprob_H: NDArray[np.float32], head_size_R: NDArray[np.int32], tail_logit_R: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Shift each head so that its probabilities sum to 1 - r, with r = sigmoid(tail_logit).

    Rows without a head, with r = 1, or whose head underflows, are left alone.
    """
    if len(logprob_H) == 0:
        return logprob_H
    p_H = np.exp(logprob_H)
    k = constant_size(head_size_R)
    if k is not None:
        mass_R = p_H.reshape(-1, k).sum(axis=1, dtype=np.float64)
    else:
        mass_R = np.zeros(len(head_size_R))
        filled = head_size_R > 0
        mass_R[filled] = np.add.reduceat(p_H.astype(np.float64), row_starts(head_size_R)[:-1][filled])
    with np.errstate(divide="ignore", invalid="ignore"):
        shift_R = -np.logaddexp(0.0, tail_logit_R.astype(np.float64)) - np.log(mass_R)
    shift_R = np.where(np.isfinite(shift_R), shift_R, 0.0).astype(np.float32)
    if k is not None:
        scaled: NDArray[np.float32] = (logprob_H.reshape(-1, k) + shift_R[:, None]).reshape(-1)
    else:
        scaled = logprob_H + np.repeat(shift_R, head_size_R)
    return scaled


def read_group(data: bytes, plan: Plan, spec: ShardSpec) -> None:
    """Check the zarr.json of a group. Raises ValueError unless it is this shard's of this plan."""
    if data != canonical_json(group_metadata(plan, spec)):
        raise ValueError("zarr.json of the group belongs to another shard, plan or format")
