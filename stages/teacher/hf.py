"""Backend `hf`: a Hugging Face causal language model, the reference every other backend is compared with.

Data path: batch of TokenWindows -> **hidden states -> logits** -> target rows.

Axis legend: B sequences, T tokens, D hidden width, N positions, V real tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.models.files import ModelDirectory
from stages.models.head import Head, HeadRule
from stages.models.load import load_model, memory_told
from stages.models.probe import body_of, require_causal, require_own_logits


class HFTeacher:
    """A loaded model that turns token ids into logits.

    Sequences are padded on the right and no attention mask is given: in a causal model no position sees what comes
    after it, so padding changes nothing, and an explicit mask of ones would only select slower attention kernels.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, *, where: str) -> None:
        self.model = model
        self.device = model.device
        layer = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.head = Head(layer, HeadRule.of(model.config), vocab_size, where=where)

    @classmethod
    def load(
        cls,
        files: ModelDirectory,
        *,
        vocab_size: int,
        device: torch.device,
        dtype: torch.dtype,
        attention: str,
        key: str | None = "teacher",
    ) -> HFTeacher:
        """Load safetensors weights and check on a few tokens that the model is causal and that hidden states and head
        give its own logits.

        Args:
            vocab_size: real tokens.
            device, dtype, attention: how it computes.
            key: the section of the configuration that names the model, for what messages advise; None: no section does.

        Raises:
            UsageError: not a causal language model, weights that are broken, lacking or of other shapes than the
                configuration says, or a head that does something this backend does not know.
            NumericsError: its logits are not finite.
            OutOfSpaceError: it does not fit into memory.
        """
        where = str(files.directory)
        smaller = "use a larger device" if key is None else f"use a larger device, or {key}.dtype: bfloat16"
        attention_key = None if key is None else f"{key}.attention"
        with memory_told(where, smaller):
            model: Any = load_model(files, dtype=dtype, attention=attention, attention_key=attention_key)
            teacher = cls(model.to(device).eval().requires_grad_(False), vocab_size, where=where)
        teacher.prove(where, key)
        return teacher

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Return the final hidden states hidden_BTD, after the final norm, in the dtype of the forward pass."""
        output = body_of(self.model)(input_ids=ids_BT, use_cache=False)
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return logits_NV, float32, over real tokens."""
        return self.head(hidden_ND)

    def prove(self, where: str, key: str | None) -> None:
        """Check that it is causal, and that hidden states and head give its own logits.

        Raises:
            UsageError, NumericsError: as `load`.
        """
        require_causal(self.model, role="model", where=where)
        require_own_logits(self.model, self.head, where=where, key=key)
