"""The head: final hidden states to float32 logits, exactly as the model defines them.

bfloat16 logits are useless to store (rounding moves probabilities by up to 11%), so the product, the bias, the factor
and the softcap are computed in float32 whatever the dtype of the forward pass, and only over real tokens.

Axis legend: N positions, D hidden width, V real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from storage.errors import UsageError

# Architectures whose configuration scales logits: prefix of model_type -> (field, divides instead of multiplies).
SCALES: dict[str, tuple[str, bool]] = {
    "cohere": ("logit_scale", False),
    "granite": ("logits_scaling", True),
    "hyperclovax": ("logits_scaling", False),
    "falcon_h1": ("lm_head_multiplier", False),
    "minicpm3": ("logits_scaling", True),
    "muse": ("output_multiplier", False),
}
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True, kw_only=True)
class HeadRule:
    """What happens to logits after the matrix product: z * logit_multiplier, then softcap * tanh(z / softcap)."""

    logit_multiplier: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> HeadRule:
        """Read the rule from a model's configuration."""
        text = config.get_text_config()
        caps = [getattr(text, name, None) for name in SOFTCAPS]
        softcap = next((float(cap) for cap in caps if cap), None)
        for prefix, (field, divides) in SCALES.items():
            if text.model_type.startswith(prefix):
                value = getattr(text, field, None)
                factor = 1.0 if value is None else float(value)
                return cls(logit_multiplier=1.0 / factor if divides else factor, softcap=softcap)
        return cls(softcap=softcap)

    def applied(self, logits_NV: Tensor) -> Tensor:
        """Return what the matrix product becomes, in its own memory."""
        if self.logit_multiplier != 1.0:
            logits_NV *= self.logit_multiplier
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV


class Head:
    """The output layer of a model, in float32 and cut to the real tokens.

    Args:
        layer: the model's output embedding.
        rule: factor and softcap.
        vocab_size: real tokens; head rows beyond them are padding.
        where: the model's directory, for messages.

    Raises:
        UsageError: the layer is not linear, or has fewer rows than there are tokens.
    """

    def __init__(self, layer: torch.nn.Module | None, rule: HeadRule, vocab_size: int, *, where: str) -> None:
        if not isinstance(layer, torch.nn.Linear):
            raise UsageError(f"the model's head is {type(layer).__name__}, not a linear layer", where=where)
        rows = layer.weight.shape[0]
        if rows < vocab_size:
            raise UsageError(f"the model's head has {rows} rows for {vocab_size} tokens", where=where)
        self.rule = rule
        self.exact_in_bfloat16 = layer.weight.dtype == torch.bfloat16
        self.weight_VD = layer.weight.detach()[:vocab_size].float()
        self.bias_V = None if layer.bias is None else layer.bias.detach()[:vocab_size].float()

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Return logits_NV, float32."""
        with _exact_products(in_bfloat16=self.exact_in_bfloat16 and hidden_ND.dtype == torch.bfloat16):
            logits_NV = torch.mm(hidden_ND.float(), self.weight_VD.T)
        if self.bias_V is not None:
            logits_NV += self.bias_V
        return self.rule.applied(logits_NV)


@contextmanager
def _exact_products(*, in_bfloat16: bool) -> Iterator[None]:
    """Have torch multiply float32 matrices exactly, whatever the program has set: no TF32 on CUDA.

    Where both matrices hold bfloat16 values, oneDNN may go through bfloat16 on the CPU: products of such numbers are
    exact in float32, in which they are summed, so nothing is lost; measured 2.3 times the default CPU product.
    """
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision, cuda.fp32_precision = "bf16" if in_bfloat16 else "ieee", "ieee"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before
