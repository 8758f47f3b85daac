"""Every causal language model that transformers knows, tiny and from nothing, and what our forwards make of it.

Truth is one sequence alone, as anybody runs the model. A case is right if batches of extraction and packed rows give
that, refused if we say so before a row is computed, and wrong otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stages.corpus.tokenize import TokenWindow
from stages.models.head import Head, HeadRule
from stages.models.packed import PackLengths, use_packed_attention
from stages.models.probe import body_of, length_borders, require_lengths_apart, require_own_logits
from stages.student.model import head_layer
from stages.teacher.batching import Batching, pad
from stages.teacher.hf import HFTeacher
from storage.errors import DistillError

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 104
ORIGINAL, WINDOW, LOCAL = 16, 60, 12  # of LongRoPE; of the longest sequence; of sliding windows and chunks
LENGTHS = (WINDOW, 30, 9, 25, 14, ORIGINAL, ORIGINAL + 1)
MOST_WEIGHTS = 20_000_000
ROUNDING = 1e-3  # relative; what is right stays below 1e-5

_COUNTS: dict[str, tuple[str, ...]] = {  # value -> fields, whichever of them an architecture has
    "4": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_attention_heads", "n_head"),
    "04": ("n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads", "num_experts"),
    "004": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "2": ("num_key_value_heads", "encoder_layers", "num_experts_per_tok", "eos_token_id", "index_n_heads"),
    "1": ("bos_token_id",),
    "0": ("pad_token_id",),
    "8": ("head_dim", "state_size", "mamba_d_state", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    "08": ("hidden_size_per_layer_input",),
    "16": ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "moe_intermediate_size", "index_head_dim"),
    "32": ("hidden_size", "n_embd", "d_model", "embed_dim"),
    "48": ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_ff", "d_inner"),
    "64": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    str(LOCAL): ("sliding_window", "attention_chunk_size", "attention_window", "window_size", "local_attention"),
    str(VOCABULARY): ("vocab_size", "vocab_size_per_layer_input"),
}
SIZES = {field: int(value) for value, fields in _COUNTS.items() for field in fields}
# What single architectures want beside, or instead.
_LATENT = {"head_dim": 8, "num_key_value_heads": 4}
PARTICULAR: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "zaya": {"num_experts_per_tok": 1},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "longcat_flash": _LATENT,
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "axk1": _LATENT,
    "axk2": _LATENT,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One architecture in one state: as its configuration is made, as a decoder, or with scaled positions."""

    name: str
    variant: str = "plain"

    def __str__(self) -> str:
        return self.name if self.variant == "plain" else f"{self.name} ({self.variant})"

    def model(self) -> PreTrainedModel:
        """Build it: seeded, with weights large enough for a leak to show."""
        torch.manual_seed(0)
        config = text_config(self.name, **_changes(self.variant))
        with torch.device("meta"):
            weights = AutoModelForCausalLM.from_config(config).num_parameters()
        if weights > MOST_WEIGHTS:
            raise ValueError(f"{weights} weights")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.25)
        return model.requires_grad_(False)


def text_config(name: str, **changes: Any) -> PreTrainedConfig:
    """Make the tiny configuration of an architecture's text model."""
    kind = type(CONFIG_MAPPING[name]().get_text_config())
    known = {*kind().to_dict(), *kind.attribute_map}
    sizes = {field: value for field, value in SIZES.items() if field in known}
    return kind(**{**sizes, **PARTICULAR.get(name, {}), **changes})


def _changes(variant: str) -> dict[str, Any]:
    if variant == "decoder":
        return {"is_decoder": True}
    if variant == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
        rope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": ORIGINAL, **factors}
        return {"rope_parameters": rope, "original_max_position_embeddings": ORIGINAL}
    if variant == "dynamic":
        return {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
            "max_position_embeddings": ORIGINAL,
        }
    return {}


def cases(name: str) -> Iterator[Case]:
    """Yield an architecture in each state that its configuration knows."""
    yield Case(name=name)
    fields = CONFIG_MAPPING[name]().get_text_config().to_dict()
    if "is_decoder" in fields:
        yield Case(name=name, variant="decoder")
    if "rope_parameters" in fields:
        yield Case(name=name, variant="longrope")
        yield Case(name=name, variant="dynamic")


def verdict(model: PreTrainedModel, role: str, attention: str) -> str:
    """Return right, refused or wrong: the hidden states of all sequences, and that no row sees what comes after it."""
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError):
        return "refused"  # both roles hand this on by name
    windows = [_window(length) for length in LENGTHS]
    try:
        computed = _extracted(model, windows) if role == "teacher" else _packed(model, windows, attention)
    except DistillError:
        return "refused"
    model.set_attn_implementation(attention)
    right = all(_close(found, _alone(model, window)) for found, window in zip(computed, windows, strict=True))
    return "right" if right and _causal(model) else "wrong"


def _extracted(model: PreTrainedModel, windows: list[TokenWindow]) -> list[Tensor]:
    """Do as extraction does: prove, then read padded batches."""
    teacher = HFTeacher(model, VOCABULARY, where="here")
    teacher.prove("here", None)
    require_lengths_apart(model, WINDOW, role="teacher", where="here")
    rule = Batching(sequences=3, padded_tokens=None, chunk_size=1, length_borders=length_borders(model.config))
    found: dict[int, Tensor] = {}
    for batch in rule.batches(windows):
        hidden_BTD = teacher.hidden(pad([windows[index] for index in batch], model.device))
        found |= {index: hidden_BTD[row, : len(windows[index])] for row, index in enumerate(batch)}
    return [found[index] for index in range(len(windows))]


def _packed(model: PreTrainedModel, windows: list[TokenWindow], attention: str) -> list[Tensor]:
    """Do as training does: prove, then read packed rows, sequences on both sides of a border apart."""
    head = Head(head_layer(model), HeadRule.of(model.config), VOCABULARY, where="here")
    require_own_logits(model, head, where="here", key=None)
    lengths = PackLengths(longest=WINDOW, tokens_per_batch=2 * WINDOW)
    use_packed_attention(model, attention, lengths=lengths)
    side = np.searchsorted(length_borders(model.config), LENGTHS)
    found: dict[int, Tensor] = {}
    for one in set(side.tolist()):
        chosen = np.flatnonzero(side == one).tolist()[::-1]  # the longest last, where all before shift it
        ids_1T = torch.cat([_ids(windows[index]) for index in chosen], dim=1)
        positions_1T = torch.cat([torch.arange(LENGTHS[index]) for index in chosen])[None]
        hidden_TD = body_of(model)(input_ids=ids_1T, position_ids=positions_1T, use_cache=False).last_hidden_state[0]
        found |= dict(zip(chosen, hidden_TD.split([LENGTHS[index] for index in chosen]), strict=True))
    return [found[index] for index in range(len(windows))]


def _causal(model: PreTrainedModel) -> bool:
    ids_1T = _ids(_window(WINDOW))
    others_1T = torch.cat([ids_1T[:, : WINDOW // 2], ids_1T[:, WINDOW // 2 :] % 50 + 30], dim=1)
    one, other = (body_of(model)(input_ids=ids, use_cache=False).last_hidden_state for ids in (ids_1T, others_1T))
    return _close(one[:, : WINDOW // 2], other[:, : WINDOW // 2])


def _alone(model: PreTrainedModel, window: TokenWindow) -> Tensor:
    return body_of(model)(input_ids=_ids(window), use_cache=False).last_hidden_state[0]


def _window(length: int) -> TokenWindow:
    tokens = np.random.default_rng(length).integers(3, 100, length).astype(np.uint32)
    return TokenWindow(
        document=0, window_start=0, tokens=tokens, token_end_byte=tokens, has_row=np.arange(length) < length - 1
    )


def _ids(window: TokenWindow) -> Tensor:
    return torch.from_numpy(window.tokens.astype(np.int64))[None]


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= ROUNDING * expected.abs().max())
