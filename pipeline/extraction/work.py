"""The work of phase 1: the teacher over a shard's documents, and the first row that it shows.

Data path: plan, documents of a shard -> teacher -> **target rows, assembled** -> writer.

Axis legend: B sequences of a batch, T tokens of its longest one, D hidden width, N positions of a chunk, V real tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch

from pipeline.config.base import section
from pipeline.config.extract import TeacherConfig
from pipeline.extraction.events import FirstRow, Meter, Progress
from pipeline.extraction.planning import Extraction, bytes_per_row, is_bound
from stages.corpus.tokenize import TokenWindow, render
from stages.input_files import unchanged
from stages.models.probe import require_lengths_apart
from stages.out_of_memory import is_out_of_memory
from stages.targets import KINDS
from stages.targets.assemble import assemble
from stages.targets.positions import document_order, wanted_mask, wanted_positions
from stages.targets.rows import TargetRows
from stages.teacher import BACKENDS
from stages.teacher.backend import CandidateTeacher, Teacher
from stages.teacher.batching import pad
from storage.errors import OutOfSpaceError
from storage.faults import fault_point
from storage.plan import ShardSpec, TargetSpec
from storage.rows import SequenceBatch

CONTEXT_TOKENS = 48  # of the first event: what the teacher read before it names its candidates
CANDIDATES = 5


def load_teacher(planned: Extraction) -> Teacher:
    """Load the weights that the plan names, and prove that sequences of all lengths fit into its batches.

    Raises:
        UsageError, NumericsError, OutOfSpaceError: as the backend; or rows would depend on what else is in a batch.
        IdentityError: the weights changed meanwhile.
    """
    with unchanged(*planned.teacher_files):  # what is loaded is what was hashed
        teacher = BACKENDS[str(planned.plan.teacher["backend"])].load()(
            planned.model,
            vocab_size=planned.plan.vocab_size,
            device=planned.device,
            dtype=planned.dtype,
            attention=str(planned.plan.teacher["attention"]),
        )
    if not isinstance(teacher, CandidateTeacher):
        where = str(planned.model.directory)
        require_lengths_apart(teacher.model, planned.rendering.window, role="teacher", where=where)
    return teacher


def compute_shard(
    planned: Extraction,
    teacher: Teacher,
    shard: ShardSpec,
    meter: Meter,
    *,
    done_elsewhere: Callable[[ShardSpec], bool],
) -> Generator[Progress, None, SequenceBatch | None]:
    """Compute everything that a shard holds; yields after each batch, returns the whole.

    Returns None, and stops, once another process has done the shard.
    """
    plan = planned.plan
    documents = planned.corpus.documents(plan.documents_of(shard))
    sequences = list(render(documents, planned.tokenizer, planned.rendering))
    computed: list[int] = []
    blocks = [TargetRows.empty(plan.target)]
    for batch in planned.batching.batches(sequences):
        if done_elsewhere(shard):
            return None
        fault_point("teacher-batch")
        chosen = [sequences[index] for index in batch]
        blocks += target_rows(planned, teacher, chosen)
        computed += batch
        meter.count(chosen)
        yield meter.progress(shard)
    rows = TargetRows.concatenate(blocks)
    return assemble(sequences, rows.take(document_order(sequences, computed)), plan.target)


@torch.inference_mode()
def target_rows(planned: Extraction, teacher: Teacher, sequences: Sequence[TokenWindow]) -> list[TargetRows]:
    """Return the rows of one batch of sequences, in their order, chunk by chunk."""
    target, step = planned.plan.target, planned.batching.chunk_size
    at = wanted_positions(sequences)
    with _memory_advice(), section("teacher", TeacherConfig):
        if isinstance(teacher, CandidateTeacher):
            return [teacher.rows(sequences, target)]
        hidden_BTD = teacher.hidden(pad(sequences, teacher.device))
        hidden_ND = hidden_BTD[wanted_mask(sequences).to(hidden_BTD.device)]
        rows = KINDS[target.kind].load()
        return [
            rows(teacher.logits(hidden_ND[first : first + step]), at[first : first + step], target)
            for first in range(0, len(at), step)
        ]


@torch.inference_mode()
def first_row(planned: Extraction, teacher: Teacher, shards: Sequence[ShardSpec], meter: Meter) -> Iterator[FirstRow]:
    """Show what the teacher makes of the first words to come: one short forward, nothing of it is stored.

    The position is one that gets a row: the last of the first few tokens, or the first behind a longer prompt.
    """
    if isinstance(teacher, CandidateTeacher):
        return  # its logits are not ours to show
    numbers = (number for shard in shards for number in planned.plan.documents_of(shard))
    # One document at a time, so that long ones do not delay it.
    sequences = (render(planned.corpus.documents([number]), planned.tokenizer, planned.rendering) for number in numbers)
    sequence = next(chain.from_iterable(sequences), None)
    if sequence is None:
        return
    rows = np.flatnonzero(sequence.has_row)
    length = 1 + int(rows[rows < CONTEXT_TOKENS].max(initial=rows[0]))
    ids_1T = torch.from_numpy(sequence.tokens[:length].astype(np.int64))[None].to(teacher.device)
    prob_V = torch.softmax(teacher.logits(teacher.hidden(ids_1T)[0, -1:])[0], dim=-1)
    top = prob_V.topk(min(CANDIDATES, len(prob_V)))
    decode = planned.tokenizer.decode
    codec = str(planned.plan.codecs["logprob"]["id"])
    yield FirstRow(
        context=str(decode(sequence.tokens[:length].tolist(), skip_special_tokens=True)),
        following=str(decode([int(sequence.tokens[length])])),
        candidates=tuple(
            (str(decode([token])), prob) for token, prob in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ),
        head_mass=_head_mass(prob_V, planned.plan.target),
        bytes_per_row=bytes_per_row(planned.plan.target, codec),
        at_most=is_bound(planned.plan.target, codec),
        seconds=meter.seconds,
    )


def _head_mass(prob_V: torch.Tensor, target: TargetSpec) -> float | None:
    """Return the mass of the head of one distribution: of k entries, or of as many of them as reach p."""
    if target.k == 0:
        return None
    mass_K = prob_V.topk(target.k).values.double().cumsum(0)
    reaches_p = int((mass_K < target.p).sum()) if target.p is not None else target.k
    return float(mass_K[min(reaches_p, target.k - 1)])


def expected_rows(planned: Extraction, shards: Sequence[ShardSpec]) -> int:
    """Estimate the rows of some shards from the sample."""
    sample = planned.sample
    documents = sum(len(planned.plan.documents_of(shard)) for shard in shards)
    return round(documents * sample.rows / sample.documents)


@contextmanager
def _memory_advice() -> Iterator[None]:
    """Say what to change where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
        if is_out_of_memory(error):
            raise OutOfSpaceError(
                "out of memory in the teacher's forward pass",
                where="batch_size and chunk_size of the configuration",
                fix="set batch_size: 1 or a smaller chunk_size (both are part of the plan: use a new store directory)",
            ) from error
        raise
