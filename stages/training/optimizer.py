"""AdamW over a model's parameters, weight decay on matrices only.

Data path: gradients -> **optimizer** -> weights. Weights and moments are float32 whatever the forward's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """Hyperparameters of AdamW (Loshchilov and Hutter 2019).

    Attributes:
        lr: peak learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled decay of parameters with two or more dimensions.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01


def build_optimizer(model: nn.Module, settings: AdamWSettings) -> torch.optim.AdamW:
    """Build AdamW over all trainable parameters, tied ones once; norms and biases do not decay."""
    groups = []
    for cut in (False, True):  # between processes; a fused step takes no mixture of both
        parameters = [p for p in model.parameters() if p.requires_grad and isinstance(p, DTensor) == cut]
        matrices, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
        groups += [{"params": matrices, "weight_decay": settings.weight_decay}] if matrices else []
        groups += [{"params": others, "weight_decay": 0.0}] if others else []
    # fused: one pass over weights, gradients and moments instead of about ten (measured on 2 CPU cores).
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
