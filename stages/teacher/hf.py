"""Backend `hf`: a Hugging Face causal language model, the reference every other backend is compared with.

Data path: batch of TokenWindows -> **hidden states -> logits** -> target rows.

Axis legend: B sequences, T tokens, D hidden width, N positions, V real tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.models.files import ModelDirectory, first_line, quiet
from stages.models.head import Head, HeadRule
from stages.models.probe import body_of, require_causal, require_own_logits
from stages.out_of_memory import is_out_of_memory
from storage.errors import OutOfSpaceError, UsageError


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
        with _memory_told(where, key):
            model = _from_pretrained(files, dtype=dtype, attention=attention, key=key)
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


def _from_pretrained(files: ModelDirectory, *, dtype: torch.dtype, attention: str, key: str | None) -> Any:
    where = str(files.directory)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                files.directory,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, and refused below by name
            )
    except Exception as error:  # transformers builds a model of the user's files here, and fails in many ways
        if is_out_of_memory(error):
            raise
        eager = "" if key is None else f"; if it is the attention that fails, set {key}.attention: eager"
        fix = f"check the files{eager}"
        raise UsageError(f"cannot load the model: {first_line(error)}", where=where, fix=fix) from error
    model, report = loaded
    _refuse_mismatched(report["mismatched_keys"], where)
    _refuse_missing(report["missing_keys"], where)
    return model


@contextmanager
def _memory_told(where: str, key: str | None) -> Iterator[None]:
    """Say what does not fit where memory runs out."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fix = "use a larger device" if key is None else f"use a larger device, or {key}.dtype: bfloat16"
        raise OutOfSpaceError("the model does not fit into memory", where=where, fix=fix) from error


def _refuse_mismatched(keys: Iterable[tuple[str, torch.Size, torch.Size]], where: str) -> None:
    """Refuse weights of other shapes: transformers fills those with random numbers too."""
    found = sorted(keys)
    if found:
        name, in_file, asked_for = found[0]
        raise UsageError(
            f"{len(found)} weights have other shapes than the configuration asks for, such as {name}: "
            f"{list(in_file)} in the file, {list(asked_for)} asked for",
            where=where,
            fix="config.json and weights belong to different models: download or convert the model again",
        )


def _refuse_missing(keys: Iterable[Any], where: str) -> None:
    """Refuse a file that lacks weights: transformers fills those with random numbers."""
    names = sorted(str(key) for key in keys)
    if names:
        raise UsageError(
            f"the weight files lack {len(names)} weights that the configuration asks for, such as {names[0]}",
            where=where,
            fix="download or convert the model again",
        )
