"""Attention over packed sequences, computed sequence by sequence.

Data path: packed micro-batch -> **attention of each layer** -> hidden states. transformers' `sdpa` separates packed
sequences by a dense mask, so its cost grows with the square of the micro-batch. Cut at the starts of the sequences, the
same attention costs the sum of their squares (measured on CPU, 6 layers of 576, 4 x 512 tokens: half the time of the
whole body, forward and backward) and needs no mask in memory.

Shape suffixes: B batch (one), H heads, T tokens, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stages.batches.microbatch import MicroBatch
from stages.models.load import way_out
from storage.errors import UsageError

PACKED_SDPA = "topk_distill_packed_sdpa"
_PROBE_LENGTHS = (9, 7)
# Far above what rounds, far below what a leak changes (measured with 30 layers in bfloat16: 0.9% and 46%).
_ROUNDING = {torch.float32: 1e-2}
_ROUNDING_IN_HALF = 5e-2


def packed_sdpa(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    *,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute causal scaled-dot-product attention within each sequence of one packed row.

    Args:
        query_BHTD, key_BHTD, value_BHTD: projected states, B = 1.
        attention_mask: must be None: positions alone separate the sequences.
        position_ids: [1, T]; a sequence starts wherever it is 0.
        sliding_window: tokens that a token sees, itself included; None: all before it.
        options: handed on to transformers' sdpa.
    """
    if position_ids is None or attention_mask is not None or query_BHTD.shape[0] != 1:
        raise ValueError("packed attention takes one row with position_ids and without a mask")
    starts = torch.nonzero(position_ids[0] == 0).flatten().tolist()
    parts = []
    for first, end in pairwise([*starts, query_BHTD.shape[2]]):
        query, key, value = (states[:, :, first:end] for states in (query_BHTD, key_BHTD, value_BHTD))
        mask = None
        if sliding_window is not None and end - first > sliding_window:
            mask = _band(end - first, sliding_window, query.device)
        parts.append(sdpa_attention_forward(module, query, key, value, mask, **options)[0])
    return torch.cat(parts, dim=1), None


def use_packed_attention(
    model: PreTrainedModel, attention: str, *, role: str = "student", key: str = "attention"
) -> None:
    """Set how `model` attends, and prove on a small pack that its sequences come out as they do alone.

    Args:
        model: the student or a live teacher.
        attention: sdpa, eager or flash_attention_2. sdpa becomes `packed_sdpa` wherever the architecture hands its
            attention function all that it needs instead of a mask, which is what support for flash attention means.
        role: what messages call the model.
        key: the configuration key of its attention, for messages.

    Raises:
        UsageError: the architecture mixes packed sequences, as recurrent layers do, or lacks this attention.
    """
    try:
        model.set_attn_implementation(attention)
        alone = [probe_hidden(model, [length]) for length in _PROBE_LENGTHS]
        if attention == "sdpa" and getattr(model, "_supports_flash_attn", False):
            AttentionInterface.register(PACKED_SDPA, packed_sdpa)
            model.set_attn_implementation(PACKED_SDPA)
        change = change_of(model, probe_hidden(model), torch.cat(alone))
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(
            f"{type(model).__name__} cannot attend to packed sequences: {str(error).splitlines()[0]}",
            where=f"{key}: {attention}",
            fix=way_out(model, attention, role=role),
        ) from error
    if change is not None:
        raise UsageError(
            f"{type(model).__name__} lets packed sequences see each other (hidden states change by {change:.1%})",
            where=f"{key}: {attention}",
            fix=way_out(model, attention, role=role),
        )


@torch.no_grad()
def probe_hidden(model: PreTrainedModel, sizes: Sequence[int] = _PROBE_LENGTHS) -> Tensor:
    """Return hidden states [T, D] of packed sequences of these lengths; their tokens depend on the length only."""
    return hidden_of_probe(model, sizes)


def hidden_of_probe(model: PreTrainedModel, sizes: Sequence[int] = _PROBE_LENGTHS) -> Tensor:
    """Return the same with gradients, where they are enabled."""
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    ids_1T = torch.cat([torch.arange(1, size + 1, device=device) * (6 + size) % vocabulary for size in sizes])[None]
    positions_1T = torch.cat([torch.arange(size, device=device) for size in sizes])[None]
    training = model.training
    model.train(mode=False)
    # Flash attention computes in half precision only.
    half = model.config._attn_implementation == "flash_attention_2"
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        output = model.base_model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False)
    model.train(training)
    return output.last_hidden_state[0].float()  # type: ignore[no-any-return]


def change_of(model: PreTrainedModel, found: Tensor, expected: Tensor) -> float | None:
    """Return how far two probes of a model are apart, relative to the largest value; None: within rounding."""
    change = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    return change if change > _ROUNDING.get(model.dtype, _ROUNDING_IN_HALF) else None


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Return bool [length, length]: True where a token sees another, at most `window` tokens back."""
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    return (distance >= 0) & (distance < window)


def packed_hidden(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Return final hidden states at the target rows of a packed micro-batch, hidden_ND."""
    output = model.base_model(input_ids=batch.tokens_1T, position_ids=batch.positions_1T, use_cache=False)
    hidden_TD: Tensor = output.last_hidden_state[0]
    return hidden_TD[batch.rows_N]
