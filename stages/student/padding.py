"""Head rows beyond the tokenizer: they stand for no token, no loss teaches them, and no saved student may choose them.

Data path: trained student, some text -> **weights to save** -> model directory.

Shape suffixes: N positions, D hidden width, V rows of the head.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from stages.batches.microbatch import MicroBatch
from stages.models.head import HeadRule
from stages.parallel.processes import ALONE, Processes
from stages.parallel.tensors import whole
from stages.student.model import Student, head_layer

logger = logging.getLogger("topk_distill.student")

# Promised is 1e-3; other text than what is looked at here may have more.
LARGEST_MASS = 1e-4
_POSITIONS = 256
_PIECE = 32  # positions whose logits exist at one time


@torch.no_grad()
def weights_to_save(
    student: Student, sample: Sequence[MicroBatch], *, vocab_size: int, processes: Processes = ALONE
) -> dict[str, Tensor]:
    """Return the weights by name, whole, with next to no probability beyond the real tokens.

    Rows that hold less than `LARGEST_MASS` stay as they are, as those of most trained models do. Others become the mean
    of the real rows: by Jensen's inequality one such row has at most 1/V of the probability wherever the student is,
    and exp(KL(uniform || student)) times less. Where even that is too much, they are cut off.

    Args:
        sample: text at which the probability is measured.
        vocab_size: real tokens.
        processes: that share the model; all of them call, the main one gets the weights.
    """
    model, head = student.model, head_layer(student.model)
    weights = whole(model.state_dict(), keep=processes.main)
    if head.weight.shape[0] <= vocab_size:
        return weights
    hidden_ND = _hidden(student, sample)
    if not processes.main:
        return weights
    layer = [weights[names_of(model, part)[0]] for part in (head.weight, head.bias) if part is not None]
    if _mass(hidden_ND, layer, student.rule, vocab_size) < LARGEST_MASS:
        return weights
    flat = [torch.cat([rows[:vocab_size], rows[:vocab_size].mean(0).expand_as(rows[vocab_size:])]) for rows in layer]
    mass = _mass(hidden_ND, flat, student.rule, vocab_size)
    if mass < LARGEST_MASS:
        for part, rows in zip((head.weight, head.bias), flat, strict=False):
            weights |= dict.fromkeys(names_of(model, part), rows)
        return weights
    logger.warning(
        "rows %d to %d of the student's head stand for no token and hold %.1g of the probability: the saved model has "
        "none of them",
        vocab_size,
        head.weight.shape[0] - 1,
        mass,
    )
    embeddings: Any = model.get_input_embeddings()
    for part in (head.weight, head.bias, embeddings.weight):
        names = names_of(model, part)
        weights |= dict.fromkeys(names, weights[names[0]][:vocab_size].clone()) if names else {}
    return weights


def names_of(model: PreTrainedModel, parameter: Tensor | None) -> list[str]:
    """Return the names of a parameter in the model: several if it is tied, none for None."""
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]


def _hidden(student: Student, sample: Sequence[MicroBatch]) -> Tensor:
    """Return hidden states at target rows, evenly over the sample; without dropout."""
    student.model.train(mode=False)
    hidden_ND = torch.cat([student.hidden(batch.to(student.device)) for batch in sample])
    student.model.train()
    return hidden_ND[:: math.ceil(len(hidden_ND) / _POSITIONS) or 1]


def _mass(hidden_ND: Tensor, layer: Sequence[Tensor], rule: HeadRule, vocab_size: int) -> float:
    """Return the mean probability of rows beyond `vocab_size`. `layer`: the head's weight, and its bias if any."""
    weight_VD, *bias_V = (rows.float() for rows in layer)
    mass = 0.0
    for first in range(0, len(hidden_ND), _PIECE):
        logits_NV = functional.linear(hidden_ND[first : first + _PIECE].to(weight_VD), weight_VD, *bias_V)
        mass += float(rule.applied(logits_NV).softmax(-1)[:, vocab_size:].sum())
    return mass / max(1, len(hidden_ND))
