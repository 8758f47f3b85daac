"""One pass of the real teacher over real text; its rows as every kind of target, each in a store of its own."""

from __future__ import annotations

import json
import pydoc_data.topics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config.extract import ExtractConfig
from pipeline.demo.teacher import convert
from pipeline.extraction.planning import Extraction, build_plan
from pipeline.extraction.work import load_teacher
from stages.corpus.tokenize import TokenWindow, render
from stages.targets import KINDS
from stages.targets.assemble import assemble
from stages.targets.positions import document_order, wanted_mask, wanted_positions
from stages.targets.rows import TargetRows
from stages.teacher.batching import pad
from stages.teacher.hf import HFTeacher
from storage.plan import HeldoutRule
from storage.rows import SequenceBatch
from storage.writer import StoreWriter

TARGETS = {
    "topk 64": {"kind": "topk", "k": 64},
    "topp 0.95, at most 64": {"kind": "topp", "p": 0.95, "k": 64},
    "sampled 50": {"kind": "sampled", "draws": 50},
    "hybrid 12+4": {"kind": "hybrid", "k": 12, "draws": 4},
    "hybrid 32+8": {"kind": "hybrid", "k": 32, "draws": 8},
}
MAIN = "hybrid 32+8"
WINDOW = 512
CHARACTERS_PER_TOKEN = 4.1


@dataclass(kw_only=True)
class Kind:
    """One target kind: its plan, its store, and its rows as they were before encoding, shard by shard."""

    name: str
    planned: Extraction
    store: Path
    batches: list[SequenceBatch] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Number of its rows."""
        return sum(batch.rows for batch in self.batches)


@dataclass(kw_only=True)
class Material:
    """All kinds, and what the teacher computed for them.

    Attributes:
        teacher: its hidden states of every row, document order, are `hidden_ND` (bfloat16).
        teacher_seconds, encode_seconds: wall time of teacher and target rows, and of checking, encoding and committing,
            for the main kind.
        encode_cpu_seconds: processor time of the latter.
    """

    kinds: dict[str, Kind]
    teacher: HFTeacher
    teacher_path: Path
    hidden_ND: Tensor
    teacher_seconds: float
    encode_seconds: float
    encode_cpu_seconds: float


@torch.inference_mode()
def make(folder: Path, tokens: int | None) -> Material:
    """Extract about this many tokens of the topics (None: all of them), with the code that `pipeline extract` runs."""
    corpus, path = _corpus(folder, tokens), convert()
    kinds = {name: _plan(name, folder, corpus, path) for name in TARGETS}
    main = kinds[MAIN].planned
    teacher = load_teacher(main)
    assert isinstance(teacher, HFTeacher)
    hidden, spent = [], {"teacher": 0.0, "encode": 0.0, "cpu": 0.0}
    for shard in main.plan.shards():
        documents = main.corpus.documents(main.plan.documents_of(shard))
        sequences = list(render(documents, main.tokenizer, main.rendering))
        hidden.append(_extract(kinds, teacher, sequences, spent))
        for kind in kinds.values():
            writer = _writer(kind)
            began, cpu = time.perf_counter(), time.process_time()
            writer.commit(shard, kind.batches[-1])
            if kind.name == MAIN:
                spent["encode"] += time.perf_counter() - began
                spent["cpu"] += time.process_time() - cpu
    for kind in kinds.values():
        _writer(kind).seal()
    return Material(
        kinds=kinds,
        teacher=teacher,
        teacher_path=path,
        hidden_ND=torch.cat(hidden),
        teacher_seconds=spent["teacher"],
        encode_seconds=spent["encode"],
        encode_cpu_seconds=spent["cpu"],
    )


def _corpus(folder: Path, tokens: int | None) -> Path:
    """Write the topics as JSON Lines, as many as make up the tokens."""
    file, characters = folder / "corpus.jsonl", 0
    with file.open("w") as out:
        for text in pydoc_data.topics.topics.values():
            if tokens is not None and characters >= tokens * CHARACTERS_PER_TOKEN:
                break
            characters += len(text)
            out.write(json.dumps({"text": text}) + "\n")
    return file


def _plan(name: str, folder: Path, corpus: Path, teacher: Path) -> Kind:
    store = folder / name.replace(" ", "_").replace(",", "")
    config = ExtractConfig.model_validate(
        {
            "store": str(store),
            "teacher": {"path": str(teacher)},
            "corpus": [{"source": "jsonl", "path": str(corpus)}],
            "rendering": {"window": WINDOW},
            "target": TARGETS[name],
            "heldout": {"fraction": 0.0},
        }
    )
    return Kind(name=name, planned=build_plan(config), store=store)


def _writer(kind: Kind) -> StoreWriter:
    made = kind.planned
    return StoreWriter.create(kind.store, made.plan, remap=made.remap, tokenizer_files=made.tokenizer_files)


def _extract(
    kinds: dict[str, Kind], teacher: HFTeacher, sequences: Sequence[TokenWindow], spent: dict[str, float]
) -> Tensor:
    """Append a shard's batch to every kind; return the hidden states of its rows, document order."""
    batching = kinds[MAIN].planned.batching
    blocks = {name: [TargetRows.empty(kind.planned.plan.target)] for name, kind in kinds.items()}
    hidden, computed = [], []
    for indices in batching.batches(sequences):
        chosen = [sequences[index] for index in indices]
        began = time.perf_counter()
        hidden_ND = teacher.hidden(pad(chosen, teacher.device))[wanted_mask(chosen)]
        at = wanted_positions(chosen)
        spent["teacher"] += time.perf_counter() - began
        for first in range(0, len(at), batching.chunk_size):
            chunk = slice(first, first + batching.chunk_size)
            began = time.perf_counter()
            logits_NV = teacher.logits(hidden_ND[chunk])
            spent["teacher"] += time.perf_counter() - began
            for name, kind in kinds.items():
                target, own_NV = kind.planned.plan.target, logits_NV.clone()
                began = time.perf_counter()
                blocks[name].append(KINDS[target.kind].load()(own_NV, at[chunk], target))
                spent["teacher"] += (time.perf_counter() - began) * (name == MAIN)
        hidden.append(hidden_ND)
        computed += indices
    order = document_order(sequences, computed)
    for name, kind in kinds.items():
        rows = TargetRows.concatenate(blocks[name]).take(order)
        kind.batches.append(assemble(sequences, rows, kind.planned.plan.target))
    return torch.cat(hidden)[torch.from_numpy(order)]


def replicated(kind: Kind, path: Path, times: int) -> Path:
    """Write a store that holds a kind's shards several times over, under new document numbers."""
    made = kind.planned
    step, shards = made.plan.documents_per_shard, len(kind.batches)
    plan = replace(made.plan, documents=step * shards * times, heldout=HeldoutRule())
    writer = StoreWriter.create(path, plan, remap=made.remap, tokenizer_files=made.tokenizer_files)
    for spec in plan.shards():
        batch = kind.batches[spec.index % shards]
        shift = (spec.index - spec.index % shards) * step
        writer.commit(spec, replace(batch, document=batch.document + np.int64(shift)))
    writer.seal()
    return path
