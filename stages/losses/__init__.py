"""The losses: what a student is trained with, from sparse stored rows or a live teacher.

Reading order: divergences.py (the mathematics), targets.py and tail.py (what a teacher row is), sparse.py and dense.py
(one chunk of logits), linear.py and logits.py (all chunks, autograd), fused.py, kd.py and cross_entropy.py (the public
losses), config.py (losses by name and fields).
"""

from stages.losses.config import (
    LOSS_CONFIG_REGISTRY,
    FusedLinearCEConfig,
    FusedLinearKDConfig,
    KDLossConfig,
    LossConfig,
    LossFromFactoryConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
    build_loss_config,
    build_loss_module,
)
from stages.losses.cross_entropy import MaskedCrossEntropy, TEParallelCrossEntropy
from stages.losses.divergences import DIVERGENCES, Divergence
from stages.losses.engine.call import LossParts
from stages.losses.engine.dense import TeacherHead
from stages.losses.fused import FusedLinearCrossEntropy, FusedLinearKDLoss
from stages.losses.kd import KDLoss
from stages.losses.tail import TAIL_POLICIES
from stages.losses.targets import SparseTargets

__all__ = [
    "DIVERGENCES",
    "LOSS_CONFIG_REGISTRY",
    "TAIL_POLICIES",
    "Divergence",
    "FusedLinearCEConfig",
    "FusedLinearCrossEntropy",
    "FusedLinearKDConfig",
    "FusedLinearKDLoss",
    "KDLoss",
    "KDLossConfig",
    "LossConfig",
    "LossFromFactoryConfig",
    "LossParts",
    "MaskedCrossEntropy",
    "MaskedCrossEntropyConfig",
    "SparseTargets",
    "TEParallelCEConfig",
    "TEParallelCrossEntropy",
    "TeacherHead",
    "build_loss_config",
    "build_loss_module",
]
