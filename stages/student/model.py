"""The student as training sees it: packed tokens in, final hidden states at the target rows out, and its head.

Data path: micro-batch -> **hidden states** -> fused head and loss. Logits are never formed here: the loss forms them
chunk by chunk.

Shape suffixes: T tokens, N target rows, D hidden width, V rows of the head; 1T is a batch of one row.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.batches.microbatch import MicroBatch
from stages.models.head import HeadRule
from stages.models.packed import packed_hidden
from stages.models.probe import length_borders
from storage.errors import UsageError

logger = logging.getLogger("topk_distill.student")

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def head_layer(model: PreTrainedModel) -> nn.Linear:
    """Return the output layer of a model. Raise UsageError if it is not one linear layer."""
    layer: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(layer, nn.Linear):
        raise UsageError(
            f"the head of {type(model).__name__} is not a linear layer",
            fix="choose a student whose output embedding is one",
        )
    return layer


def warn_of_experts(model: PreTrainedModel) -> None:
    """Say of a mixture of experts that nothing keeps them in use: the loss that balances them is not trained."""
    config = model.config.get_text_config()
    experts = max((count for name in _EXPERTS if isinstance(count := getattr(config, name, None), int)), default=0)
    if experts > 1:
        weight = getattr(config, "router_aux_loss_coef", None)
        named = "" if weight is None else f" (router_aux_loss_coef {weight:g})"
        logger.warning(
            "the student is a mixture of %d experts, whose balancing loss%s is not trained here: watch that none falls "
            "out of use, or choose a dense student",
            experts,
            named,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Student:
    """A model with float32 weights whose forward runs in `dtype`.

    Attributes:
        model: a causal language model of transformers.
        dtype: of the forward (autocast) and of the products with the head; float32 switches autocast off.
        rule: what the model does to its logits after the product with the head.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    rule: HeadRule

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype) -> Student:
        """Wrap a model."""
        return cls(model=model, dtype=dtype, rule=HeadRule.of(model.config))

    @property
    def weight_VD(self) -> Tensor:
        """The head's weight, padded rows included; with tied embeddings, those."""
        return head_layer(self.model).weight

    @property
    def bias_V(self) -> Tensor | None:
        """The head's bias, if it has one."""
        return head_layer(self.model).bias

    @property
    def length_borders(self) -> tuple[int, ...]:
        """Lengths whose two sides never share a forward."""
        return length_borders(self.model.config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weight_VD.device

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Return final hidden states at the target rows, hidden_ND in `dtype`. No attention mask: see MicroBatch."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            hidden_ND = packed_hidden(self.model, batch)
        return hidden_ND.to(self.dtype)
