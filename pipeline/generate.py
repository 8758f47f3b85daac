"""One prompt, answered by a student, and by its teacher beside it if wanted.

Data path: run or model directory and a prompt -> **answer**. Greedy, so that the same model gives the same answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.evaluate import model_directory
from pipeline.runs import find_record, learned_rendering
from stages.corpus import Document
from stages.corpus.rendering import Rendering
from stages.corpus.tokenize import resolve_special
from stages.corpus.tokenized import tokenize
from stages.corpus.tokenizer import load_tokenizer, tokenizer_errors
from stages.devices import resolve_device, resolve_dtype
from stages.models.files import ModelDirectory, find_model, load_config, position_limit, quiet, recorded_model
from stages.models.load import attention_for, load_model, memory_told
from stages.models.special_tokens import SpecialTokens
from stages.training.run import read_record
from storage.errors import UsageError
from storage.values import Json


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said. `role` is student or teacher, `text` the new text alone, `tokens` and `seconds` of it."""

    role: str
    model: str
    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Question:
    """A prompt, whether it is a turn of a conversation, and how the documents were rendered that the student knows."""

    text: str
    chat: bool
    rendering: Mapping[str, Json]

    def ids(self, tokenizer: PreTrainedTokenizerBase, *, where: str) -> list[int]:
        """Return token ids as documents that begin with this text have them.

        Raises:
            UsageError: there are none, or no chat template.
        """
        text = self.text
        if self.chat:
            if not tokenizer.chat_template:
                raise UsageError("the tokenizer has no chat template", where=where, fix="ask without --chat")
            turns = [{"role": "user", "content": text}]
            with tokenizer_errors("the chat template fails", where=where, fix="repair it, or ask without --chat"):
                text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        policy = "auto" if "bos" not in self.rendering else "never" if self.rendering["bos"] is None else "always"
        as_text = self.rendering.get("special_tokens") == "text" and not self.chat  # a template has special tokens
        rendering = Rendering(
            window=1,
            overlap=0,
            min_tokens=1,
            bos=resolve_special(tokenizer, policy, eos=False)[0],
            eos=None,
            vocab_size=len(tokenizer),
            special_tokens="text" if as_text else "parse",
        )
        (document,) = tokenize([Document.of(0, "", text)], tokenizer, rendering)
        if not len(document.tokens):
            raise UsageError("the prompt is empty", where="PROMPT", fix="give some text to continue")
        return [int(index) for index in document.tokens]


def generate(
    path: Path,
    prompt: str,
    *,
    teacher: bool = False,
    chat: bool = False,
    max_new_tokens: int = 64,
    device: str = "auto",
    dtype: str = "auto",
) -> Iterator[Answer]:
    """Continue a prompt greedily with the model of a run, then with its teacher.

    Args:
        path: run or model directory.
        prompt: text to continue, or a question.
        teacher: answer with the teacher too, from where the run says that it was.
        chat: put the prompt through the tokenizer's chat template. Not by itself, because a student of plain text
            does not know turns, whatever its teacher's tokenizer brings.
        max_new_tokens: bound on the answer.
        device: auto, cpu, cuda, cuda:1, mps.

    Raises:
        UsageError: no model there, an empty prompt, one that leaves no position for an answer of that length, no chat
            template, or no teacher to be found.
    """
    student = find_model(str(model_directory(path)), fetch=False)
    models = {"student": student, **({"teacher": teacher_directory(path)} if teacher else {})}
    torch_device = resolve_device(device)
    question = _Question(text=prompt, chat=chat, rendering=learned_rendering(path))
    for role, model in models.items():
        yield _answer(role, model, question, limit=max_new_tokens, device=torch_device, dtype=dtype)


def teacher_directory(path: Path) -> ModelDirectory:
    """Return the directory of the teacher that a run learned from.

    Raises:
        UsageError: `path` is not a run, or its teacher is not where it was.
    """
    record = find_record(path)
    if record is None:
        raise UsageError("only a run knows its teacher", where=str(path), fix="name the run directory, not a model")
    recorded = read_record(record)["store"].get("teacher")
    try:
        return recorded_model(recorded)
    except UsageError as error:
        raise UsageError(
            f"the teacher is not where it was: {error.what}", where=str(record), fix="bring it back, or ask without it"
        ) from error


def _require_room(config: PretrainedConfig, prompt: int, limit: int, *, where: str) -> None:
    """Refuse a prompt and an answer of so many tokens beyond the model's positions: there it says nothing of worth."""
    positions = position_limit(config)
    if positions is not None and prompt + limit > positions:
        room = positions - prompt
        raise UsageError(
            f"a prompt of {prompt} tokens and {limit} new ones are more than the {positions} positions of the model",
            where=where,
            fix=f"set --max-new-tokens to at most {room}" if room > 0 else "shorten the prompt",
        )


@torch.inference_mode()
def _answer(
    role: str, files: ModelDirectory, question: _Question, *, limit: int, device: torch.device, dtype: str
) -> Answer:
    began = time.perf_counter()
    where = str(files.directory)
    tokenizer = load_tokenizer(files.directory)
    ids = question.ids(tokenizer, where=where)
    config = load_config(files)
    _require_room(config, len(ids), limit, where=where)
    attention = attention_for(config, "sdpa", key="attention")
    with memory_told(where, "use a larger device"):
        model: Any = load_model(files, dtype=resolve_dtype(dtype, device), attention=attention).to(device)  # type: ignore[arg-type]
    inputs = torch.tensor([ids], device=device)
    tokens = SpecialTokens.of(model, tokenizer)
    with quiet():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=list(tokens.ends) or None,
            pad_token_id=next((index for index in (tokens.pad, *tokens.ends) if index is not None), None),
        )
    new = output[0, len(ids) :].tolist()
    return Answer(
        role=role,
        model=where,
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        tokens=len(new),
        seconds=time.perf_counter() - began,
    )
