"""One shard: a batch of sequences as a Zarr v3 group in memory. The way back is `decode.py`.

Data path: `SequenceBatch` -> **group of arrays, name -> bytes** -> commit. The same batch and plan give the same bytes.

Axis legend: T tokens, S sequences, R rows, H head entries, C tail entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.codecs import logprob_codec
from storage.faults import fault_point
from storage.format.arrays import array_lengths, array_specs, column_array, is_even
from storage.format.chunks import encode_array
from storage.plan import FORMAT_VERSION, Plan, ShardSpec
from storage.rows import ARRAYS, ArrayField, Counts, SequenceBatch
from storage.segments import diff_rows, sigmoid
from storage.values import Json, canonical_json

GROUP = "zarr.json"


def encode_shard(plan: Plan, spec: ShardSpec, batch: SequenceBatch, rank: NDArray[np.uint32]) -> dict[str, bytes]:
    """Return the files of a shard by name. The batch must have passed `validate.check_batch`.

    Args:
        batch: all sequences of the shard.
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
            objects[f"{name}/{layout.key}"] = encode_array(values[name].astype(array.dtype, copy=False), layout)
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
        "p": plan.target.p,
        "draws": plan.target.draws,
        "temperatures": list(plan.target.temperatures),
        "vocab_size": plan.vocab_size,
        "remap_sha256": plan.remap_sha256,
        "codecs": {name: dict(parameters) for name, parameters in plan.codecs.items()},
    }
    return {"zarr_format": 3, "node_type": "group", "attributes": {"topk_distill": about}}


def counts_of(plan: Plan, batch: SequenceBatch) -> Counts:
    """Return the counts that go into the commit record."""
    tail_logit = logprob_codec(plan.codecs["logprob"]).round_numbers(batch.tail_logit)  # so that a reader can check it
    head_mass = sigmoid(np.negative(tail_logit, dtype=np.float64))
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
    order_C = _tail_order(rank[batch.tail_ids], batch.tail_size)

    def stored(item: ArrayField, values: NDArray[Any]) -> NDArray[Any]:
        if item.axis == "tail":
            values = values[order_C]
        match item.stored:
            case "id":
                return rank[values] if item.axis != "tail" else diff_rows(rank[values], batch.tail_size)
            case "logprob":
                return codec.encode(values, batch.head_size)
            case "real":
                return codec.round_numbers(values)
            case "bits":
                return np.packbits(values)
        return values

    arrays = [(item, getattr(batch, item.name)) for item in ARRAYS]
    columns = {**(batch.row_columns or {}), **(batch.sequence_columns or {})}
    return {
        **{item.name: stored(item, values) for item, values in arrays if values is not None},
        **{column_array(name): column for name, column in columns.items()},
    }


def _tail_order(rank_C: NDArray[np.uint32], size_R: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the order [C] in which ranks rise in each row: that of draws says nothing, and differences are small."""
    row_C = np.repeat(np.arange(len(size_R), dtype=np.int64), size_R)
    return np.argsort((row_C << 32) | rank_C, kind="stable")


def read_group(data: bytes, plan: Plan, spec: ShardSpec) -> None:
    """Check the zarr.json of a group. Raises ValueError unless it is this shard's of this plan."""
    if data != canonical_json(group_metadata(plan, spec)):
        raise ValueError("zarr.json of the group belongs to another shard, plan or format")
