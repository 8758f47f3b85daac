"""Which tokens begin, end and pad a text: tokenizer, chat template and a model's own configurations brought together.

A base student may learn with the tokenizer of an instruct teacher. It then ends its texts with another token than its
configuration says, and would run on for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from stages.models.files import first_line, quiet
from stages.out_of_memory import is_out_of_memory

logger = logging.getLogger("topk_distill.models")

_ANSWER = "answer"
_TURNS = ({"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER})


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Token ids.

    Attributes:
        bos, pad: None: there is none.
        ends: where generation ends, the tokenizer's own end token first.
    """

    bos: int | None
    pad: int | None
    ends: tuple[int, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        """Return those of a model that is used with this tokenizer.

        What the model itself calls an end counts too if the tokenizer has a special token there. What its architecture
        calls one by default may be another token's beginning or padding to this tokenizer, or any piece of text.
        """
        rows: int = model.config.get_text_config().vocab_size
        special = _special(tokenizer)
        begins = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        own: list[int] = []
        for said in (model.generation_config, model.config.get_text_config()):
            stated = not getattr(said, "_from_model_config", True)
            trusted = special if stated else special - begins
            own += [index for index in _several(getattr(said, "eos_token_id", None)) if index in trusted]
        ends = [tokenizer.eos_token_id, end_of_turn(tokenizer), *own]
        return cls(
            bos=tokenizer.bos_token_id,
            pad=_below(rows, tokenizer.pad_token_id),
            ends=tuple(dict.fromkeys(index for index in ends if _below(rows, index) is not None)),
        )


def adopt_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write into a model's configurations which tokens begin, end and pad with this tokenizer.

    What the tokenizer has none of, config.json keeps; generation_config.json says that there is none.
    """
    tokens = SpecialTokens.of(model, tokenizer)
    config = model.config.get_text_config()
    several = isinstance(config.eos_token_id, list)  # not every architecture allows a list
    end = (list(tokens.ends) if several else tokens.ends[0]) if tokens.ends else None
    for name, value in (("bos_token_id", tokens.bos), ("pad_token_id", tokens.pad), ("eos_token_id", end)):
        if value is not None:
            setattr(config, name, value)
    ends = list(tokens.ends) if len(tokens.ends) > 1 else end
    ids: dict[str, Any] = {"bos_token_id": tokens.bos, "pad_token_id": tokens.pad, "eos_token_id": ends}
    generation = GenerationConfig.from_dict({**model.generation_config.to_dict(), **ids})
    try:
        with quiet():
            generation.validate(strict=True)
    except ValueError as error:  # it could not be saved at the end
        logger.warning("the student's generation_config.json is left out but for its tokens: %s", first_line(error))
        generation = GenerationConfig.from_dict(ids)
    model.generation_config = generation


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token with which the chat template ends an answer; None: no template, or no such token."""
    if not tokenizer.chat_template:
        return None
    try:
        text = str(tokenizer.apply_chat_template(list(_TURNS), tokenize=False))
    except Exception as error:  # a template is a program of whoever made the tokenizer, and fails as it likes
        if is_out_of_memory(error):
            raise
        logger.warning("the chat template does not tell how an answer ends: %s", first_line(error))
        return None
    _, found, tail = text.rpartition(_ANSWER)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
    special = _special(tokenizer)
    return next((int(index) for index in ids if index in special), None)


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _several(ids: int | Iterable[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def _below(rows: int, index: int | None) -> int | None:
    return index if index is not None and index < rows else None
