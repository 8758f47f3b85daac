"""What a model's forward must be for its rows to mean anything, proven on a few tokens of the loaded model.

Data path: loaded model -> **proof** -> teacher, student. No position may see what comes after it, or depend on how long
the sequences beside it are. Only what is asked of the forward counts, never the name of an architecture.

Shape suffixes: B sequences, T tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from stages.models.files import first_line
from stages.models.head import Head
from stages.out_of_memory import is_out_of_memory
from storage.errors import NumericsError, UsageError

PROBE_TOKENS = 9
# Far above what rounds, far below what a leak changes (measured with 30 layers in bfloat16: 0.9% and 46%).
_ROUNDING = {torch.float32: 1e-2}
_ROUNDING_IN_HALF = 5e-2
# Of two forwards of one shape: only experts, which other tokens share, then round differently.
_ROUNDING_OF_ONE_SHAPE = 1e-4


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that gives hidden states; the model itself if it has no head."""
    body = model.base_model
    # Where a model is made for use inside a larger one, `base_model` asks for that one's name and finds nothing.
    return getattr(model, "model", model) if body is model else body  # type: ignore[return-value]  # typed as any module


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Run without dropout; then restore the mode."""
    training = model.training
    model.train(mode=False)
    try:
        yield
    finally:
        model.train(training)


def hidden_states(model: PreTrainedModel, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """Return float32 hidden states [B, T, D] without dropout, in the dtype that the attention computes in."""
    positions = {} if positions_BT is None else {"position_ids": positions_BT}
    # Flash attention computes in half precision only.
    half = model.config._attn_implementation == "flash_attention_2"
    with evaluating(model), torch.autocast(ids_BT.device.type, dtype=torch.bfloat16, enabled=half):
        output = body_of(model)(input_ids=ids_BT, use_cache=False, **positions)
    return output.last_hidden_state.float()  # type: ignore[no-any-return]


def change_of(model: PreTrainedModel, found: Tensor, expected: Tensor, *, one_shape: bool = False) -> float | None:
    """Return how far two probes of a model are apart, relative to the largest value; None: within rounding.

    Args:
        one_shape: both come from forwards of the same shape, so that float32 hardly rounds.
    """
    change = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    allowed = _ROUNDING.get(model.dtype, _ROUNDING_IN_HALF)
    if one_shape and model.dtype == torch.float32:
        allowed = _ROUNDING_OF_ONE_SHAPE
    return change if change > allowed else None


@torch.no_grad()
def require_causal(model: PreTrainedModel, *, role: str, where: str) -> None:
    """Refuse a model whose positions see tokens after them, or change when tokens are added after them.

    Args:
        role: what messages call the model.
        where: its directory or configuration key, for messages.

    Raises:
        UsageError: it is not causal, or does not run at all.
    """
    kept = PROBE_TOKENS // 2
    ids_1T = probe_ids(model)[None]
    others_1T = ids_1T.clone()
    others_1T[:, kept:] = (ids_1T[:, kept:] - 1).abs()  # another token everywhere, however few there are
    expected = _tried(model, ids_1T, role=role, where=where)[:, :kept]
    change = change_of(model, _tried(model, others_1T, role=role, where=where)[:, :kept], expected, one_shape=True)
    alone = change_of(model, _tried(model, ids_1T[:, :kept], role=role, where=where), expected)
    if change is not None or alone is not None:
        what = "see the tokens after them" if change is not None else "change with the number of tokens after them"
        raise UsageError(
            f"the positions of {type(model).__name__} {what} (hidden states change by {change or alone:.1%}): "
            "it is no causal language model",
            where=where,
            fix=f"choose a {role} that predicts each token from those before it; a model of the BERT family needs "
            "is_decoder: true in its config.json, if it was trained so",
        )


@torch.no_grad()
def require_own_logits(model: PreTrainedModel, head: Head, *, where: str, key: str | None) -> None:
    """Refuse a model that does more between its hidden states and its logits than `head` knows.

    Args:
        head: its output layer, with what is known to follow.
        where: as `require_causal`.
        key: the section of the configuration that names the model, for what messages advise; None: no section does.

    Raises:
        UsageError: its logits are others, beyond what a bfloat16 product may differ by.
        NumericsError: they are not finite.
    """
    rows, width = head.weight_VD.shape
    ids_1T = probe_ids(model)[None] % rows
    hidden_TD = _tried(model, ids_1T, role="model", where=where)[0].to(model.dtype)
    if hidden_TD.shape[-1] != width:
        raise _unknown_head(model, f"its body gives {hidden_TD.shape[-1]} numbers, its head takes {width}", where)
    with evaluating(model):
        expected_TV = model(input_ids=ids_1T, use_cache=False).logits[0, :, :rows].float()
    found_TV = head(hidden_TD)
    if not torch.isfinite(found_TV).all():
        fix = "the weights are broken: train, download or convert the model again"
        if key is not None:
            fix = f"try {key}.dtype: float32; if it persists, {fix}"
        raise NumericsError("the model's logits hold NaN or infinity", where=where, fix=fix)
    error = (found_TV - expected_TV).abs().max().item()
    allowed = 0.02 * found_TV.abs().max().item() + 1e-3
    if not error <= allowed:
        raise _unknown_head(model, f"they differ by {error:.3g}, allowed {allowed:.3g}", where)


def _unknown_head(model: PreTrainedModel, why: str, where: str) -> UsageError:
    return UsageError(
        f"{type(model).__name__} treats its logits in a way that is not known here: {why}",
        where=where,
        fix="report the architecture; stages/models/head.py lists the ones that scale their logits",
    )


def length_borders(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the lengths, rising, above which a model computes all positions of a forward in another way.

    LongRoPE is the one scaling of positions that has such a border: the longest sequence of a forward decides whether
    all of them are rotated by the long factors (Ding et al. 2024). Sequences of both sides never share a forward.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, Mapping))]  # one, or one for each type of layer
    return tuple(
        sorted({int(kind["original_max_position_embeddings"]) for kind in kinds if kind.get("rope_type") == "longrope"})
    )


@torch.no_grad()
def require_lengths_apart(model: PreTrainedModel, longest: int, *, role: str, where: str) -> None:
    """Refuse a model whose short sequences change with the length of those beside them, on one side of its borders.

    A row of few tokens at far positions stands for a long sequence, so that the proof costs a few tokens at any length.

    Args:
        longest: tokens of the longest sequence that can occur.
        role, where: as `require_causal`.

    Raises:
        UsageError: names both lengths.
    """
    borders = [border for border in length_borders(model.config) if PROBE_TOKENS < border < longest]
    for below, last in pairwise([PROBE_TOKENS - 1, *borders, longest]):
        first = below + 1
        if last <= first:
            continue
        beside_first = _beside(model, first, role=role, where=where)
        change = change_of(model, _beside(model, last, role=role, where=where), beside_first, one_shape=True)
        if change is not None:
            raise UsageError(
                f"{type(model).__name__} computes a sequence in another way beside one of {last} tokens than beside "
                f"one of {first} (hidden states change by {change:.1%}), so its rows would depend on their neighbours",
                where=where,
                fix=f"use a window within the length that the {role} was first trained for (dynamic scaling of rope "
                "begins there), or another model",
            )


def _beside(model: PreTrainedModel, length: int, *, role: str, where: str) -> Tensor:
    """Return hidden states [T, D] of a short sequence beside the last tokens of one of `length`."""
    ids_T = probe_ids(model)
    positions_T = torch.arange(PROBE_TOKENS, device=model.device)
    positions_2T = torch.stack([positions_T, positions_T + length - PROBE_TOKENS])
    return _tried(model, torch.stack([ids_T, ids_T]), positions_2T, role=role, where=where)[0]


def _tried(
    model: PreTrainedModel, ids_BT: Tensor, positions_BT: Tensor | None = None, *, role: str, where: str
) -> Tensor:
    try:
        return hidden_states(model, ids_BT, positions_BT)
    except Exception as error:  # an architecture runs here that may want anything, and fail in any way
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"{type(model).__name__} does not run on token ids alone: {first_line(error)}",
            where=where,
            fix=f"choose a {role} of another architecture, or another attention",
        ) from error


def probe_ids(model: PreTrainedModel, size: int = PROBE_TOKENS) -> Tensor:
    """Return so many token ids [T], spread over the vocabulary by a step that depends on their number."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.arange(1, size + 1, device=next(model.parameters()).device) * (size - 2) % vocabulary
