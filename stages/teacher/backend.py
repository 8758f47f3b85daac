"""What a backend gives, how it is loaded, and what a plan says of its teacher.

Data path: token windows -> **hidden states -> logits** -> target rows; or token windows -> **target rows**.

Axis legend: B sequences, T tokens, D hidden width, N positions, V real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from stages.corpus.tokenize import TokenWindow
from stages.devices import dtype_name
from stages.models.files import ModelDirectory, file_hashes
from stages.models.head import Head, HeadRule
from stages.targets.rows import TargetRows
from storage.plan import TargetSpec
from storage.values import Json


class HiddenStateTeacher(Protocol):
    """A loaded teacher that gives hidden states and a head.

    Attributes:
        model: whose `base_model` gives the hidden states; a live teacher reads packed batches with it.
        head: what turns hidden states into logits.
        device: where it computes.
    """

    model: PreTrainedModel
    head: Head
    device: torch.device

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Return hidden_BTD for right-padded token ids, int64."""
        ...

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return logits_NV, float32: bias, scale and softcap applied, padded vocabulary cut off."""
        ...


@runtime_checkable
class CandidateTeacher(Protocol):
    """A loaded teacher that keeps its logits to itself and gives finished rows: an engine, or an import."""

    def rows(self, sequences: Sequence[TokenWindow], target: TargetSpec) -> TargetRows:
        """Return a row for each position that wants one, in the order of the sequences and of their positions.

        Args:
            sequences: what the teacher reads.
            target: of a kind that is made `from_candidates`. Beside the head and the mass of the rest a row has
                logsumexp, entropy and next_logprob, as every row of a store.
        """
        ...


Teacher = HiddenStateTeacher | CandidateTeacher


class Loader(Protocol):
    """How a backend loads a model."""

    def __call__(
        self,
        files: ModelDirectory,
        *,
        vocab_size: int,
        device: torch.device,
        dtype: torch.dtype,
        attention: str,
        key: str | None = "teacher",
    ) -> Teacher:
        """Load the weights, and prove that what gives hidden states is causal with this attention; errors are those of
        `storage.errors`, `key` the section of the configuration they name."""
        ...


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
