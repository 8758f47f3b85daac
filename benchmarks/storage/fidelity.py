"""What decoded rows are worth: divergence from the exact rows, and the angle of the gradient that they give a student.

The angle is that between two gradients of the same student on the same positions, over all its weights: one from the
teacher's full distribution, one from decoded rows. The student is a six-layer cut of the teacher after a short warm-up.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.storage.material import MAIN, Kind, Material
from stages.batches.microbatch import MicroBatch
from stages.batches.order import Order
from stages.batches.steps import StepShape, microbatches, training_steps
from stages.losses import FusedLinearKDLoss, SparseTargets, TeacherHead
from stages.student.model import Student
from stages.student.source import StudentSource, build_student
from storage.reader import StoreReader
from storage.segments import row_starts

LAYERS = 6
WARM_UP_STEPS = 48
TOKENS_PER_STEP = 1024
LEARNING_RATE = 1e-3
ANGLE_TOKENS = 4096


def decode_kl(kind: Kind) -> float:
    """Return the mean divergence of decoded rows from exact ones in nats, over head entries and the rest as one."""
    decoded = StoreReader(kind.store).read(range(sum(len(batch) for batch in kind.batches)))
    log_p = np.concatenate([batch.logprob for batch in kind.batches]).astype(np.float64)
    tail_logit = np.concatenate([batch.tail_logit for batch in kind.batches]).astype(np.float64)
    row = np.repeat(np.arange(decoded.rows), decoded.head_size)
    head = np.bincount(row, np.exp(log_p) * (log_p - decoded.logprob), minlength=decoded.rows)
    if not len(log_p):
        return 0.0
    log_r, log_s = (-np.logaddexp(0.0, -logit) for logit in (tail_logit, decoded.tail_logit.astype(np.float64)))
    tail = np.where(np.isfinite(log_r), np.exp(log_r) * (log_r - log_s), 0.0)
    return float((head + tail).mean())


def warm_student(material: Material, store: StoreReader) -> Student:
    """Return a cut of the teacher, trained for a few steps as the demo trains its students."""
    torch.manual_seed(0)
    source = StudentSource(init="layers_of_teacher", path=str(material.teacher_path), layers=LAYERS)
    student = Student.of(build_student(source, seed=0), torch.bfloat16)
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    loss = FusedLinearKDLoss(kd_ratio=0.7)
    shape = StepShape(tokens_per_step=TOKENS_PER_STEP, tokens_per_batch=TOKENS_PER_STEP)
    order = Order(sequences=len(store), seed=0, digest=store.digest)
    for number, step in zip(range(WARM_UP_STEPS), training_steps(store, order, shape), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (number + 1) / 6)
        for batch in step.batches:
            hidden_ND = student.hidden(batch)
            loss(
                hidden_ND, student.weight_VD, batch.targets, batch.labels_N, num_batch_labels=step.rows
            ).loss.backward()
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return replace(student, dtype=torch.float32)


def angles(material: Material) -> dict[str, float]:
    """Return the angle in degrees to the full-vocabulary gradient: of every kind, and of the top 50 renormalised."""
    readers = {name: StoreReader(kind.store) for name, kind in material.kinds.items()}
    student = warm_student(material, readers[MAIN])
    chosen = _chosen(next(iter(readers.values())))
    shape = StepShape(tokens_per_step=ANGLE_TOKENS, tokens_per_batch=TOKENS_PER_STEP)
    batches = {name: microbatches(reader.read(chosen), shape) for name, reader in readers.items()}
    full = _gradient(student, _with_teacher(material, batches["topk 64"], chosen))
    found = {}
    for name, parts in batches.items():
        found[name] = _degrees(full, _gradient(student, ((part, part.targets, None) for part in parts)))
    top = [(part, _first(part.targets, 50), "renormalize") for part in batches["topk 64"]]
    found["top 50, renormalised"] = _degrees(full, _gradient(student, iter(top)))
    return found


def _chosen(reader: StoreReader) -> np.ndarray:
    """Choose sequences from all over the store, as many as make up the tokens."""
    length_S = reader.lengths()
    order = np.random.default_rng(0).permutation(len(length_S))
    return order[: int(np.searchsorted(np.cumsum(length_S[order]), ANGLE_TOKENS)) + 1]


def _with_teacher(
    material: Material, parts: tuple[MicroBatch, ...], chosen: np.ndarray
) -> Iterator[tuple[MicroBatch, TeacherHead, None]]:
    """Return the same micro-batches with the teacher's own hidden states, from which the rows were made."""
    rows_S = np.concatenate([np.diff(batch.row_offset) for batch in material.kinds["topk 64"].batches])
    start_S = row_starts(rows_S)
    hidden_ND = material.hidden_ND[
        torch.from_numpy(np.concatenate([np.arange(start_S[i], start_S[i + 1]) for i in chosen]))
    ].float()
    weight_VD, first = material.teacher.head.weight_VD, 0
    for part in parts:
        yield part, TeacherHead(hidden_ND=hidden_ND[first : first + part.rows], weight_VD=weight_VD), None
        first += part.rows


def _gradient(student: Student, parts: Iterator[tuple[MicroBatch, object, str | None]]) -> Tensor:
    """Return the gradient of the forward KL over all weights, one vector."""
    student.model.zero_grad()
    for batch, targets, tail in parts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice against the biased baseline
            loss = FusedLinearKDLoss(kd_ratio=1.0, tail=tail)
            value = loss(student.hidden(batch), student.weight_VD, targets, batch.labels_N, num_batch_labels=1.0)
        value.loss.backward()
    return torch.cat([weight.grad.flatten() for weight in student.model.parameters() if weight.grad is not None])


def _first(targets: SparseTargets | None, k: int) -> SparseTargets:
    assert targets is not None
    return replace(
        targets,
        ids_NE=targets.ids_NE[:, :k],
        logprob_NE=targets.logprob_NE[:, :k],
        count_NE=targets.count_NE[:, :k],
        head_size_N=targets.head_size_N.clamp(max=k),
    )


def _degrees(left: Tensor, right: Tensor) -> float:
    def dot(one: Tensor, other: Tensor) -> float:  # in float64, a part at a time: float32 would be off by a degree
        parts = zip(torch.split(one, 1 << 20), torch.split(other, 1 << 20), strict=True)
        return sum(float(torch.dot(a.double(), b.double())) for a, b in parts)

    cosine = dot(left, right) / math.sqrt(dot(left, left) * dot(right, right))
    return math.degrees(math.acos(min(1.0, cosine)))
