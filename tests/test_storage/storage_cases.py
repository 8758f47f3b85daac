"""Seeded synthetic stores for the storage tests, built the same way in every process. Imports no torch."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from storage.codecs import CODECS, DEFAULT_CODEC
from storage.files import open_files
from storage.files.memory import MemoryFiles
from storage.format.remap import build_remap, remap_sha256
from storage.plan import HeldoutRule, Plan, ShardSpec, TargetSpec
from storage.rows import SequenceBatch
from storage.writer import StoreWriter

VOCAB = 300
TOKENIZER_FILES = {"tokenizer.json": b'{"model": {}}' * 9, "tokenizer_config.json": b"{}"}
Store = Path | MemoryFiles  # a store on disk, or in memory
EXACT = {"logprob": {"id": "exact"}}
TARGETS = {  # every kind, and what makes rows differ in form
    "hybrid": TargetSpec(kind="hybrid", k=6, draws=4),
    "topk": TargetSpec(kind="topk", k=6),
    "topp": TargetSpec(kind="topp", k=9, p=0.7),
    "sampled": TargetSpec(kind="sampled", k=0, draws=7),
    "temperatures": TargetSpec(kind="hybrid", k=6, draws=4, temperatures=(0.5, 1.5, 2.0)),
    "topp_temperature": TargetSpec(kind="topp", k=9, p=0.7, temperatures=(1.5,)),
}

AXES = {  # of every array of a batch but offsets and what lies on the sequence axis: the offsets that cut it
    **dict.fromkeys(("tokens", "has_row", "token_end_byte"), "token_offset"),
    **dict.fromkeys(("head_ids", "logprob"), "head_offset"),
    **dict.fromkeys(("tail_ids", "count"), "tail_offset"),
    **dict.fromkeys(("head_size", "tail_size", "tail_logit", "tail_logit_T", "entropy_T"), "row_offset"),
    **dict.fromkeys(("logsumexp", "entropy", "next_logprob"), "row_offset"),
}


def make_remap(vocab_size: int = VOCAB) -> np.ndarray:
    return build_remap(np.random.default_rng(1).zipf(1.5, vocab_size).astype(np.int64))


def make_plan(**changes) -> Plan:
    """A plan of five shards: four of training, one held out. `target` and any field of Plan can be given."""
    vocab_size = changes.pop("vocab_size", VOCAB)
    target = changes.pop("target", TargetSpec(kind="hybrid", k=6, draws=4))
    fields = {
        "teacher": {"name": "synthetic", "files": {"model.safetensors": "00" * 32}},
        "tokenizer": {"files": {name: hashlib.sha256(data).hexdigest() for name, data in TOKENIZER_FILES.items()}},
        "vocab_size": vocab_size,
        "corpus": ({"path": "corpus.txt", "sha256": "11" * 32},),
        "documents": 24,
        "rendering": {"window": 32, "overlap": 0},
        "target": target,
        "heldout": HeldoutRule(fraction=0.2, seed=3),
        "documents_per_shard": 6,
        "batching": {"sequences": 4},
        "codecs": {"logprob": CODECS[DEFAULT_CODEC]().parameters()},
        "remap_sha256": remap_sha256(make_remap(vocab_size)),
        "recorded": {"workers": 1},
    }
    return Plan(**{**fields, **changes})


def make_batch(plan: Plan, shard: ShardSpec, *, longest: int = 24, end_bytes: bool = True, ragged: bool = False):
    """Content of a shard, a function of plan seed and shard alone. Document 7 is filtered out, 4 has two windows."""
    rng = np.random.default_rng([plan.target.seed, shard.index])
    documents = [number for number in plan.documents_of(shard) if number != 7]
    windows = [(number, start) for number in documents for start in ((0, 20) if number == 4 else (0,))]
    return batch_of(plan, windows, rng, longest=longest, end_bytes=end_bytes, ragged=ragged)


def batch_of(plan: Plan, windows, rng, *, longest=24, end_bytes=True, ragged=False) -> SequenceBatch:
    lengths = rng.integers(1, longest + 1, len(windows))
    token_offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    has_row = rng.random(token_offset[-1]) < 0.8
    has_row[token_offset[1:] - 1] = False
    row_offset = np.concatenate([[0], np.cumsum(has_row)]).astype(np.int64)[token_offset]
    rows = _rows(plan, int(row_offset[-1]), rng, ragged)
    return SequenceBatch(
        tokens=rng.integers(0, plan.vocab_size, token_offset[-1]).astype(np.uint32),
        token_offset=token_offset,
        row_offset=row_offset,
        head_offset=np.concatenate([[0], np.cumsum(rows["head_size"])]).astype(np.int64)[row_offset],
        tail_offset=np.concatenate([[0], np.cumsum(rows["tail_size"])]).astype(np.int64)[row_offset],
        document=np.array([number for number, _ in windows], dtype=np.int64),
        window_start=np.array([start for _, start in windows], dtype=np.int64),
        token_end_byte=np.cumsum(rng.integers(1, 7, token_offset[-1])).astype(np.uint32) if end_bytes else None,
        has_row=has_row,
        draws=plan.target.draws,
        **rows,
    )


def _rows(plan: Plan, count: int, rng, ragged: bool) -> dict[str, np.ndarray]:
    """Rows of the plan's kind, from random logits; `ragged` makes every head as long as it likes."""
    logits = rng.normal(size=(count, plan.vocab_size)) * 3.0
    logsumexp = np.log(np.exp(logits).sum(axis=1))
    logprob = logits - logsumexp[:, None]
    order = np.argsort(-logprob, axis=1)
    ranked = np.take_along_axis(logprob, order, axis=1)
    size = np.full(count, plan.target.k)
    if plan.target.p is not None:
        size = np.minimum(1 + (np.cumsum(np.exp(ranked), axis=1) < plan.target.p).sum(axis=1), plan.target.k)
    elif ragged and plan.target.k:
        size = rng.integers(1, plan.target.k + 1, count)
    in_head = np.arange(plan.vocab_size) < size[:, None]
    tail_p = np.where(in_head, 0.0, np.exp(ranked))
    tails = [_draw(rng, order[row], tail_p[row], plan.target.draws) for row in range(count)]
    mass = tail_p.sum(axis=1)
    with np.errstate(divide="ignore"):
        tail_logit = np.where(size > 0, np.log(mass) - np.log1p(-np.minimum(mass, 1.0)), np.inf)
    at = [_at_temperature(ranked, in_head, temperature) for temperature in plan.target.temperatures]
    return {
        "temperatures": plan.target.temperatures,
        "tail_logit_T": np.stack([tail for tail, _ in at], axis=1) if at else None,
        "entropy_T": np.stack([entropy for _, entropy in at], axis=1) if at else None,
        "head_size": size.astype(np.int32),
        "tail_size": np.array([len(ids) for ids, _ in tails], dtype=np.int32),
        "head_ids": order[in_head].astype(np.uint32),
        "logprob": ranked[in_head].astype(np.float32),
        "tail_ids": np.concatenate([np.zeros(0), *[ids for ids, _ in tails]]).astype(np.uint32),
        "count": np.concatenate([np.zeros(0), *[counts for _, counts in tails]]).astype(np.uint16),
        "tail_logit": tail_logit.astype(np.float32),
        "logsumexp": logsumexp.astype(np.float32),
        "entropy": -(np.exp(logprob) * logprob).sum(axis=1).astype(np.float32),
        "next_logprob": logprob[:, 0].astype(np.float32),
    }


def _at_temperature(ranked, in_head, temperature):
    """Tail logit and entropy of each row at another temperature, float32."""
    scaled = ranked / temperature
    logprob = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    p = np.exp(logprob)
    with np.errstate(divide="ignore"):
        tail_logit = np.log(np.where(in_head, 0.0, p).sum(axis=1)) - np.log(np.where(in_head, p, 0.0).sum(axis=1))
    return tail_logit.astype(np.float32), -(p * logprob).sum(axis=1).astype(np.float32)


def _draw(rng, order, tail_p, draws):
    if draws == 0 or tail_p.sum() == 0.0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    ids, counts = np.unique(rng.choice(order, size=draws, p=tail_p / tail_p.sum()), return_counts=True)
    shuffled = rng.permutation(len(ids))
    return ids[shuffled], counts[shuffled]


def open_writer(path: Store, plan: Plan) -> StoreWriter:
    return StoreWriter.create(path, plan, remap=make_remap(plan.vocab_size), tokenizer_files=TOKENIZER_FILES)


def write_store(path: Store, plan: Plan | None = None, *, shards: Iterable[int] | None = None, **batch) -> StoreWriter:
    """Write a store, or some of its shards, and seal it if it is whole."""
    plan = make_plan() if plan is None else plan
    writer = open_writer(path, plan)
    for shard in writer.missing():
        if shards is None or shard.index in shards:
            writer.commit(shard, make_batch(plan, shard, **batch))
    writer.seal()
    return writer


def contents(store: Store) -> dict[str, bytes]:
    """Every file of a store by name."""
    if isinstance(store, MemoryFiles):
        return {name: data for name, (data, _) in sorted(store.objects.items())}
    files = [file for file in sorted(store.rglob("*")) if file.is_file()]
    return {file.relative_to(store).as_posix(): file.read_bytes() for file in files}


def tree(store: Store) -> dict[str, bytes]:
    """Every file of a store that counts, by name: no temporary and no quarantined ones."""
    return {name: data for name, data in contents(store).items() if name.split("/")[0] not in ("tmp", "quarantine")}


def find(store: Store, pattern: str) -> str:
    """The name of the one file of a store that matches a pattern."""
    (name,) = [name for name in contents(store) if fnmatchcase(name, pattern)]
    return name


def put(store: Store, name: str, data: bytes) -> None:
    """Create or replace a file of a store as no code of ours does."""
    if isinstance(store, MemoryFiles):
        store.put(name, data)
    else:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(data)


def drop(store: Store, name: str) -> None:
    """Take a file away from a store."""
    if isinstance(store, MemoryFiles):
        del store.objects[name]
    else:
        (store / name).unlink()


def copy(store: Store, target: Store) -> Store:
    """Copy a store, and return the copy."""
    open_files(target).prepare("tmp")
    for name, data in contents(store).items():
        put(target, name, data)
    return target


def in_order(batch: SequenceBatch) -> SequenceBatch:
    """The same batch with the tail of each row in the order in which a reader gives it: by frequency rank."""
    from dataclasses import replace

    from storage.format.remap import invert

    rank = invert(make_remap())
    row = np.repeat(np.arange(batch.rows), batch.tail_size)
    order = np.lexsort((rank[batch.tail_ids], row))
    return replace(batch, tail_ids=batch.tail_ids[order], count=batch.count[order])


@contextmanager
def zarr_quietly():
    """zarr-python, with its note on pcodec silenced: it is not in the Zarr specification, and we mean to use it."""
    import zarr
    from zarr.errors import ZarrUserWarning

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3", ZarrUserWarning)
        yield zarr
