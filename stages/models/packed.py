"""Attention over packed sequences, computed sequence by sequence.

Data path: packed micro-batch -> **attention of each layer** -> hidden states. transformers' `sdpa` separates packed
sequences by a dense mask, so its cost grows with the square of the micro-batch. Cut at the starts of the sequences, the
same attention costs the sum of their squares (measured on CPU, 6 layers of 576, 4 x 512 tokens: half the time of the
whole body, forward and backward) and needs no mask in memory.

Shape suffixes: B batch (one), H heads, T tokens, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stages.batches.microbatch import MicroBatch
from stages.models.files import first_line
from stages.models.load import way_out
from stages.models.probe import (
    PROBE_TOKENS,
    body_of,
    change_of,
    hidden_states,
    length_borders,
    probe_ids,
    require_causal,
    require_lengths_apart,
)
from stages.out_of_memory import is_out_of_memory
from storage.errors import UsageError

PACKED_SDPA = "topk_distill_packed_sdpa"
_PROBE_LENGTHS = (PROBE_TOKENS, PROBE_TOKENS - 2)


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
        attention_mask: what `_size_for_mask` gave: positions alone separate the sequences.
        position_ids: [1, T]; a sequence starts wherever it is 0.
        sliding_window: tokens that a token sees, itself included; None: all before it.
        options: handed on to transformers' sdpa.

    Raises:
        ValueError: the layer sees no further than a number of tokens, and does not hand it over as a sliding window.
    """
    if position_ids is None or query_BHTD.shape[0] != 1:
        raise ValueError("packed attention takes one row with position_ids")
    asked_for: object = None if attention_mask is None else attention_mask.tolist()
    if asked_for != sliding_window:
        raise ValueError(f"a layer masks what is {asked_for} tokens back, and attends to a window of {sliding_window}")
    starts = torch.nonzero(position_ids[0] == 0).flatten().tolist()
    parts = []
    for first, end in pairwise([*starts, query_BHTD.shape[2]]):
        query, key, value = (states[:, :, first:end] for states in (query_BHTD, key_BHTD, value_BHTD))
        mask = None
        if sliding_window is not None and end - first > sliding_window:
            mask = _band(end - first, sliding_window, query.device)
        parts.append(sdpa_attention_forward(module, query, key, value, mask, **options)[0])
    return torch.cat(parts, dim=1), None


@dataclass(frozen=True, kw_only=True)
class PackLengths:
    """What packed rows will hold: tokens of the longest sequence, and of a micro-batch."""

    longest: int
    tokens_per_batch: int


@torch.no_grad()
def use_packed_attention(
    model: PreTrainedModel,
    attention: str,
    *,
    lengths: PackLengths | None = None,
    role: str = "student",
    key: str = "attention",
    known_causal: bool = False,
) -> None:
    """Set how `model` attends, and prove that it is causal and that packed sequences come out as they do alone.

    Args:
        model: the student or a live teacher.
        attention: sdpa, eager or flash_attention_2. sdpa becomes `packed_sdpa` wherever the architecture hands its
            attention function all that it needs instead of a mask.
        lengths: of what it will read, so that the proof reaches every length at which the model changes; None: short
            sequences alone are proven.
        role: what messages call the model.
        key: the configuration key of its attention, for messages.
        known_causal: that it is causal with this attention has been proven.

    Raises:
        UsageError: the architecture mixes packed sequences, as recurrent layers do, is not causal, or lacks this
            attention.
    """
    where = f"{key}: {attention}"
    fix = way_out(model, attention, role=role)
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        what = f"{type(model).__name__} cannot attend to packed sequences: {first_line(error)}"
        raise UsageError(what, where=where, fix=fix) from error
    if not known_causal:
        require_causal(model, role=role, where=where)
    if lengths is not None:
        require_lengths_apart(model, lengths.longest, role=role, where=where)
    packs = _probes(model.config, lengths)
    # As everybody runs the model: without stating positions.
    alone = {size: hidden_states(model, probe_ids(model, size)[None])[0] for pack in packs for size in set(pack)}
    why = None
    for implementation in _implementations(model, attention):
        model.set_attn_implementation(implementation)
        why = _why_not(model, packs, alone)
        if why is None:
            return
    raise UsageError(f"{type(model).__name__} {why}", where=where, fix=fix)


def _implementations(model: PreTrainedModel, attention: str) -> tuple[str, ...]:
    """Return what to try, the best first. Support for flash attention means that positions can stand for a mask."""
    if attention != "sdpa" or not getattr(model, "_supports_flash_attn", False):
        return (attention,)
    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    AttentionMaskInterface.register(PACKED_SDPA, _size_for_mask)
    return (PACKED_SDPA, attention)


def _why_not(model: PreTrainedModel, packs: Sequence[Sequence[int]], alone: Mapping[int, Tensor]) -> str | None:
    """Return in words how packed sequences differ from the same alone; None: they do not."""
    for sizes in packs:
        try:
            found = probe_hidden(model, sizes)
        except Exception as error:  # an architecture runs here that may want anything, and fail in any way
            if is_out_of_memory(error):
                raise
            return f"cannot attend to packed sequences: {first_line(error)}"
        change = change_of(model, found, torch.cat([alone[size] for size in sizes]))
        if change is not None:
            return f"lets packed sequences see each other (hidden states change by {change:.1%})"
    return None


def _probes(config: PretrainedConfig, lengths: PackLengths | None) -> list[tuple[int, ...]]:
    """Return the packs to prove, by the lengths of their sequences.

    Where the configuration names a window or chunk of attention that a micro-batch exceeds, a pack that exceeds it too:
    of long sequences, behind a short one that shifts them.
    """
    packs: list[tuple[int, ...]] = [_PROBE_LENGTHS]
    if lengths is None:
        return packs
    local = [size for size in _local_sizes(config.to_dict()) if PROBE_TOKENS <= size < lengths.tokens_per_batch]
    first = max((border + 1 for border in length_borders(config) if border < lengths.longest), default=PROBE_TOKENS)
    longest = min(lengths.longest, lengths.tokens_per_batch - first)
    if local and longest >= first:
        pack = [first, longest]
        while sum(pack) <= max(local) and sum(pack) + longest <= lengths.tokens_per_batch:
            pack.append(longest)
        packs.append(tuple(pack))
    return packs


def _local_sizes(fields: Mapping[str, Any]) -> Iterator[int]:
    """Yield the numbers of a configuration whose name says how far a layer sees."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _local_sizes(value)
        elif isinstance(value, int) and any(word in name for word in ("window", "chunk", "local_attention")):
            yield value


def _size_for_mask(*, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> Tensor | None:
    """Stand in for a mask: None where a layer sees all tokens before it, else the number that it sees, for packed_sdpa.

    Raises:
        ValueError: the architecture overlays a mask of its own, which positions alone cannot say.
    """
    if use_vmap:
        raise ValueError("its layers have a mask of their own")
    return None if local_size is None else torch.tensor(local_size)


def probe_hidden(model: PreTrainedModel, sizes: Sequence[int] = _PROBE_LENGTHS) -> Tensor:
    """Return hidden states [T, D] of packed sequences of these lengths, with gradients where they are enabled."""
    ids_1T = torch.cat([probe_ids(model, size) for size in sizes])[None]
    positions_1T = torch.cat([torch.arange(size, device=ids_1T.device) for size in sizes])[None]
    return hidden_states(model, ids_1T, positions_1T)[0]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Return bool [length, length]: True where a token sees another, at most `window` tokens back."""
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    return (distance >= 0) & (distance < window)


def packed_hidden(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Return final hidden states at the target rows of a packed micro-batch, hidden_ND."""
    output = body_of(model)(input_ids=batch.tokens_1T, position_ids=batch.positions_1T, use_cache=False)
    hidden_TD: Tensor = output.last_hidden_state[0]
    return hidden_TD[batch.rows_N]
