"""What `benchmarks.losses` measures: random inputs of a usual shape, our losses on them, and those of the peers.

Peers are loaded from whatever is on the path, as little of them as will do. Where a peer can only take dense teacher
logits, sparse rows of ours are compared with it as well, its teacher logits handed over for nothing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.losses import FusedLinearCrossEntropy, FusedLinearKDLoss, KDLoss, SparseTargets, TeacherHead

WIDTH = 576


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the table."""

    tokens: int = 1024
    vocab: int = 49_152
    k: int = 40
    dtype: str = "bfloat16"

    @property
    def bytes(self) -> int:
        """Of one number."""
        return {"bfloat16": 2, "float32": 4}[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Hidden states and head of both sides, labels, and a sparse teacher."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_hidden_ND: Tensor
    teacher_weight_VD: Tensor
    labels_N: Tensor
    targets: SparseTargets

    @classmethod
    def make(cls, setting: Setting) -> Inputs:
        """Draw random numbers of a teacher's usual shape, made without ever holding [tokens, vocab]."""
        torch.manual_seed(0)
        dtype = getattr(torch, setting.dtype)
        tokens, vocab = setting.tokens, setting.vocab
        return cls(
            hidden_ND=torch.randn(tokens, WIDTH).to(dtype).requires_grad_(),
            weight_VD=_weight(vocab, dtype).requires_grad_(),
            teacher_hidden_ND=torch.randn(tokens, WIDTH).to(dtype),
            teacher_weight_VD=_weight(vocab, dtype),
            labels_N=torch.randint(vocab, (tokens,)),
            targets=sparse_rows(setting),
        )

    def teacher(self) -> TeacherHead:
        """Return the teacher as hidden states and head."""
        return TeacherHead(hidden_ND=self.teacher_hidden_ND, weight_VD=self.teacher_weight_VD)

    def logits(self) -> Tensor:
        """Return the student's logits, whole."""
        return self.hidden_ND @ self.weight_VD.t()

    def teacher_logits(self) -> Tensor:
        """Return the teacher's logits, whole."""
        return self.teacher_hidden_ND @ self.teacher_weight_VD.t()

    @cached_property
    def given_teacher_logits(self) -> Tensor:
        """The teacher's, whole and made once, for all that get them for nothing."""
        return self.teacher_logits()


def sparse_rows(setting: Setting) -> SparseTargets:
    """Return a row of k entries for every token, 8 of them samples, with 0.14 of the mass in the tail."""
    tokens, vocab, head = setting.tokens, setting.vocab, setting.k - 8
    step = vocab // setting.k
    ids_NE = (torch.randint(vocab, (tokens, 1)) + step * torch.arange(setting.k)) % vocab
    count_NE = torch.zeros(tokens, setting.k, dtype=torch.int32)
    count_NE[:, head:] = 1
    logprob_NE = torch.full((tokens, setting.k), -torch.inf)
    logprob_NE[:, :head] = torch.randn(tokens, head).log_softmax(-1).sort(-1, descending=True)[0] + math.log(0.86)
    return SparseTargets(
        ids_NE=ids_NE,
        logprob_NE=logprob_NE,
        head_size_N=torch.full((tokens,), head),
        count_NE=count_NE,
        draws=8,
        tail_logit_N=torch.full((tokens,), math.log(0.14 / 0.86)),
        entropy_N=torch.full((tokens,), 2.5),
    )


def _weight(vocab: int, dtype: torch.dtype) -> Tensor:
    weight = torch.empty(vocab, WIDTH, dtype=dtype)
    for start in range(0, vocab, 4096):  # no float32 copy of the whole
        block = weight[start : start + 4096]
        block.copy_(torch.randn(len(block), WIDTH) * 0.1)
    return weight


Step = Callable[[], None]
Case = Callable[[Inputs], Step]


def cross_entropy(inputs: Inputs) -> Step:
    """Compute what everything is measured against: logits in the model's precision, torch's own loss."""
    return lambda: torch.autograd.backward(F.cross_entropy(inputs.logits(), inputs.labels_N))


def three_products(inputs: Inputs) -> Step:
    """Compute the limit: logits, gradient of hidden, gradient of weight, in chunks, and nothing else."""

    @torch.no_grad()
    def step() -> None:
        weight = inputs.weight_VD
        gradient = torch.zeros_like(weight)
        for rows in range(0, len(inputs.hidden_ND), 256):
            hidden = inputs.hidden_ND[rows : rows + 256]
            logits = hidden @ weight.t()
            torch.mm(logits, weight)
            gradient.addmm_(logits.t(), hidden)

    return step


def fused(divergence: str, teacher: str = "sparse") -> Case:
    def case(inputs: Inputs) -> Step:
        loss = FusedLinearKDLoss(divergence=divergence)
        targets = inputs.targets if teacher == "sparse" else inputs.teacher()
        return lambda: loss(inputs.hidden_ND, inputs.weight_VD, targets, inputs.labels_N).loss.backward()

    return case


def fused_cross_entropy(inputs: Inputs) -> Step:
    loss = FusedLinearCrossEntropy(reduction="mean")
    return lambda: loss(inputs.hidden_ND, inputs.labels_N, inputs.weight_VD).backward()


def dense_logits(inputs: Inputs) -> Step:
    loss = KDLoss()
    teacher = inputs.given_teacher_logits
    return lambda: loss(inputs.logits(), teacher, inputs.labels_N).backward()


def peer(load: Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]], *, free_teacher: bool) -> Case:
    def case(inputs: Inputs) -> Step:
        function = load()
        given = inputs.given_teacher_logits if free_teacher else None

        def step() -> None:
            teacher = inputs.teacher_logits() if given is None else given
            torch.autograd.backward(function(inputs.logits(), teacher, inputs.labels_N))

        return step

    return case


def liger(inputs: Inputs) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearJSDLoss(compiled=False)
    student, teacher = (inputs.hidden_ND, inputs.weight_VD), (inputs.teacher_hidden_ND, inputs.teacher_weight_VD)
    return lambda: loss(*student, *teacher, inputs.labels_N).backward()


def _file_of(distribution: str, path: str) -> Any:
    """Load one file of a distribution as a module, without its package and what that imports."""
    file = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    spec = importlib.util.spec_from_file_location(file.stem + "_of_" + distribution.replace("-", "_"), file)
    if spec is None or spec.loader is None or not file.exists():
        raise ImportError(f"{distribution} has no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_nemo() -> Any:
    return _file_of("nemo-automodel", "nemo_automodel/components/loss/kd_loss.py").KDLoss()


def load_torchtune() -> Any:
    return _file_of("torchtune", "torchtune/modules/loss/kd_losses.py").ForwardKLLoss()


def load_torchtune_reverse() -> Any:
    return _file_of("torchtune", "torchtune/modules/loss/kd_losses.py").ReverseKLLoss()


def load_trl() -> Any:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer  # type: ignore[import-not-found]

    function = GKDTrainer.generalized_jsd_loss
    return lambda student, teacher, labels: function(student[None], teacher[None], labels[None], beta=0.5)


def trl_chunked(beta: float) -> Case:
    """Run its newest form: hidden states of both sides, in tiles, the autograd function called as its trainer does."""

    def case(inputs: Inputs) -> Step:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # type: ignore[import-not-found]

        scales = (beta, 1.0, 1.0, None, 1.0, None)

        def step() -> None:
            student = (inputs.hidden_ND, inputs.weight_VD, None)
            teacher = (inputs.teacher_hidden_ND, inputs.teacher_weight_VD, None)
            divergence, _ = ChunkedDivergenceFunction.apply(*student, *teacher, *scales)
            divergence.mean().backward()

        return step

    return case


def trl_sparse(inputs: Inputs) -> Step:
    """Run its forward KL on a server's top-k log-probabilities with a tail bucket, after the whole log-softmax."""
    from trl.experimental.server_distillation.server_distillation_trainer import (  # type: ignore[import-not-found]
        ServerDistillationTrainer,
    )

    trainer = SimpleNamespace(
        loss_add_tail=True, _reduce_divergence_loss=ServerDistillationTrainer._reduce_divergence_loss
    )
    k = int(inputs.targets.head_size_N[0])
    rows = {
        "topk_logprobs": inputs.targets.logprob_NE[None, :, :k],
        "topk_token_ids": inputs.targets.ids_NE[None, :, :k],
    }

    def step() -> None:
        logprob = inputs.logits()[None].log_softmax(-1)
        loss = ServerDistillationTrainer._compute_server_forward_kl_loss
        loss(trainer, rows, logprob, inputs.labels_N[None]).backward()

    return step


CASES: dict[str, Case] = {
    "cross-entropy": cross_entropy,
    "three products": three_products,
    "ours: fused cross-entropy": fused_cross_entropy,
    "ours: fused sparse forward KL + CE": fused("forward_kl"),
    "ours: fused sparse reverse KL + CE": fused("reverse_kl"),
    "ours: fused sparse JSD + CE": fused("jsd"),
    "ours: fused full forward KL + CE": fused("forward_kl", "head"),
    "ours: fused full JSD + CE": fused("jsd", "head"),
    "ours: KDLoss on logits": dense_logits,
    "nemo KDLoss, teacher free": peer(load_nemo, free_teacher=True),
    "torchtune forward KL, teacher free": peer(load_torchtune, free_teacher=True),
    "torchtune reverse KL, teacher free": peer(load_torchtune_reverse, free_teacher=True),
    "trl JSD, teacher free": peer(load_trl, free_teacher=True),
    "nemo KDLoss": peer(load_nemo, free_teacher=False),
    "torchtune forward KL": peer(load_torchtune, free_teacher=False),
    "trl JSD": peer(load_trl, free_teacher=False),
    "trl chunked forward KL": trl_chunked(0.0),
    "trl chunked JSD": trl_chunked(0.5),
    "trl sparse forward KL with tail": trl_sparse,
    "liger fused JSD + CE": liger,
}
BASE = ("cross-entropy", "three products")  # what all others are compared with
