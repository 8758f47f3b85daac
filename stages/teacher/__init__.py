"""Teachers: backends that turn token ids into logits.

Data path: batch of TokenWindows -> **hidden states -> logits** -> target rows.

To add a backend: write a file with a class that satisfies `Teacher` and list its `load` in `BACKENDS`. The tests run
over the table and compare each backend with `hf`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from stages.devices import dtype_name
from stages.models.files import ModelDirectory, file_hashes, find_model, load_config
from stages.models.head import HeadRule
from stages.teacher.hf import HFTeacher
from storage.values import Json

__all__ = ["BACKENDS", "ModelDirectory", "Teacher", "find_model", "load_config", "teacher_identity"]


class Teacher(Protocol):
    """A loaded teacher. Axis legend: B sequences, T tokens, D hidden width, N positions, V real tokens."""

    device: torch.device

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Return hidden_BTD for right-padded token ids, int64."""
        ...

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return logits_NV, float32: bias, scale and softcap applied, padded vocabulary cut off."""
        ...


class Loader(Protocol):
    """How a backend loads a model."""

    def __call__(
        self, files: ModelDirectory, *, vocab_size: int, device: torch.device, dtype: torch.dtype, attention: str
    ) -> Teacher:
        """Load the weights; errors are those of `storage.errors`."""
        ...


BACKENDS: Mapping[str, Loader] = {
    "hf": HFTeacher.load,
}


def teacher_identity(
    files: ModelDirectory, config: PretrainedConfig, *, backend: str, dtype: torch.dtype, attention: str
) -> dict[str, Json]:
    """Return the `teacher` field of a plan, without loading a weight: file hashes and how the logits are computed."""
    rule = HeadRule.of(config)
    return {
        "backend": backend,
        "files": file_hashes(files),
        "dtype": dtype_name(dtype),
        "attention": attention,
        "logit_scale": rule.logit_multiplier,
        "softcap": rule.softcap,
    }
