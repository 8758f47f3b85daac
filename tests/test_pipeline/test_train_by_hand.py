"""Four steps of pipeline.train beside a loop that is written out here: one sequence at a time, whole logits, float64.

Order, micro-batches, losses, learning rate, kd_ratio, clipping, AdamW and validation: whoever loses one of them ends
with other weights or other numbers.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config.train import TrainConfig
from pipeline.train import train
from stages.student.source import StudentSource, build_student
from stages.training.metrics import read_metrics
from storage.permutation import Permutation
from storage.reader import StoreReader
from storage.rows import SequenceBatch

STEPS, TOKENS_PER_STEP, SEED = 4, 200, 3
LR, BETAS, EPS, DECAY, CLIP = 3e-3, (0.8, 0.9), 1e-4, 0.1, 0.3
KD_RATIO = 0.6
# Two steps of warm-up to each; then half a cosine over the two steps that are left, down to a tenth.
FACTORS = [0.5, 1.0, 1.0, 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi / 2))]
RATIOS = [KD_RATIO * factor for factor in FACTORS]


def config(store: Path, teacher: Path, run: Path) -> TrainConfig:
    values = {
        "store": store,
        "run": run,
        "student": {"init": "layers_of_teacher", "path": str(teacher), "layers": 2},
        "kd_ratio": KD_RATIO,
        "kd_ratio_schedule": {"warmup_steps": 2, "fall_with_lr": True},
        "steps": STEPS,
        "tokens_per_step": TOKENS_PER_STEP,
        "tokens_per_batch": 100,
        "chunk_size": 16,
        "optimizer": {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY},
        "schedule": {"warmup_steps": 2, "min_factor": 0.1},
        "clip_norm": CLIP,
        "validation": {"sequences": 3},
        "seed": SEED,
        "dtype": "float32",
        "device": "cpu",
    }
    return TrainConfig.model_validate(values)


def steps_of(reader: StoreReader) -> list[list[SequenceBatch]]:
    """Whole sequences in the order of the run, as many as fit into each step."""
    order = Permutation(len(reader), SEED, 0, digest=reader.digest)(np.arange(len(reader)))
    steps: list[list[SequenceBatch]] = [[]]
    for index in order:
        sequence = reader.read([index])
        if sum(len(one.tokens) for one in [*steps[-1], sequence]) > TOKENS_PER_STEP:
            steps.append([])
        steps[-1].append(sequence)
    return steps[:STEPS]


def rows_losses(model: nn.Module, sequence: SequenceBatch, vocab_size: int) -> list[tuple[Tensor, Tensor]]:
    """Divergence from the row's unbiased estimate of the teacher, and cross-entropy, of each row."""
    ids_T = torch.from_numpy(sequence.tokens.astype(np.int64))
    logq_TV = model(input_ids=ids_T[None]).logits[0, :, :vocab_size].log_softmax(-1)
    head, tail = np.cumsum([0, *sequence.head_size]), np.cumsum([0, *sequence.tail_size])
    losses = []
    for row, position in enumerate(np.flatnonzero(sequence.has_row)):
        teacher_V = torch.zeros(vocab_size, dtype=torch.float64)
        in_head, in_tail = slice(head[row], head[row + 1]), slice(tail[row], tail[row + 1])
        outside = 1.0 / (1.0 + math.exp(-sequence.tail_logit[row]))
        teacher_V[sequence.head_ids[in_head].astype(np.int64)] = (
            torch.from_numpy(sequence.logprob[in_head]).double().exp()
        )
        counts = torch.from_numpy(sequence.count[in_tail].astype(np.float64))
        teacher_V[sequence.tail_ids[in_tail].astype(np.int64)] = outside * counts / sequence.draws
        divergence = -float(sequence.entropy[row]) - (teacher_V * logq_TV[position]).sum()
        losses.append((divergence, -logq_TV[position, ids_T[position + 1]]))
    return losses


def mean_loss(
    model: nn.Module, sequences: list[SequenceBatch], vocab_size: int, ratio: float
) -> tuple[Tensor, dict[str, float]]:
    """Mean over all rows, and the numbers that are told of it."""
    rows = [row for sequence in sequences for row in rows_losses(model, sequence, vocab_size)]
    kd, ce = (torch.stack(column).mean() for column in zip(*rows, strict=True))
    loss = ratio * kd + (1.0 - ratio) * ce
    return loss, {"loss": loss.item(), "kd": kd.item(), "ce": ce.item(), "rows": len(rows)}


def move(model: nn.Module, moments: dict[str, tuple[Tensor, Tensor]], number: int, lr: float) -> float:
    """Clip the gradient and make a step of AdamW; return the gradient's norm before."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    assert norm > CLIP, "else nothing is clipped"
    for name, parameter in model.named_parameters():
        gradient = gradients[name] * CLIP / norm
        first, second = moments.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
        first = BETAS[0] * first + (1.0 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1.0 - BETAS[1]) * gradient.square()
        moments[name] = first, second
        mean, square = first / (1.0 - BETAS[0] ** number), second / (1.0 - BETAS[1] ** number)
        if parameter.dim() == 2:
            parameter.data *= 1.0 - lr * DECAY
        parameter.data -= lr * mean / (square.sqrt() + EPS)
        parameter.grad = None
    return norm


def test_steps_are_those_of_a_loop_that_is_written_out(
    tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    *_, finished = train(config(tiny_store, tiny_teacher_dir, tmp_path / "run"))
    *lines, validation = read_metrics(tmp_path / "run" / "metrics.jsonl")
    reader, heldout = StoreReader(tiny_store), StoreReader(tiny_store, split="heldout")
    vocab_size = reader.plan.vocab_size
    source = StudentSource(init="layers_of_teacher", path=str(tiny_teacher_dir), layers=2)
    model, moments = build_student(source, seed=SEED).double(), {}

    for number, (sequences, line) in enumerate(zip(steps_of(reader), lines, strict=True), start=1):
        ratio, lr = RATIOS[number - 1], LR * FACTORS[number - 1]
        loss, expected = mean_loss(model, sequences, vocab_size, ratio)
        loss.backward()
        expected |= {"grad_norm": move(model, moments, number, lr), "lr": lr, "kd_ratio": ratio, "step": number}
        expected["tokens"] = sum(len(sequence.tokens) for sequence in sequences)
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4), number

    with torch.no_grad():
        scored = [heldout.read([len(heldout) * index // 3]) for index in range(3)]
        _, expected = mean_loss(model, scored, vocab_size, KD_RATIO)
    assert {name: validation[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert finished.tokens == sum(line["tokens"] for line in lines)
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, parameter in model.named_parameters():
        rows = len(saved[name])  # those of the head that stand for no token may be cut off
        torch.testing.assert_close(saved[name].double(), parameter.detach()[:rows], rtol=1e-4, atol=2e-6, msg=name)
