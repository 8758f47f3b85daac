"""One prompt, answered by a student, and by its teacher beside it if wanted.

Data path: run or model directory and a prompt -> **answer**. Greedy, so that the same model gives the same answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluate import model_directory
from pipeline.runs import find_record
from stages.corpus.tokenizer import encode, load_tokenizer, tokenizer_errors
from stages.devices import resolve_device, resolve_dtype
from stages.models.files import find_model, quiet
from stages.training.run import read_record
from storage.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said. `role` is student or teacher, `text` the new text alone, `tokens` and `seconds` of it."""

    role: str
    model: str
    text: str
    tokens: int
    seconds: float


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
        UsageError: no model there, an empty prompt, no chat template, or no teacher to be found.
    """
    directory = model_directory(path)
    directories = {"student": directory, **({"teacher": teacher_directory(path)} if teacher else {})}
    torch_device = resolve_device(device)
    for role, model in directories.items():
        yield _answer(role, model, prompt, chat=chat, limit=max_new_tokens, device=torch_device, dtype=dtype)


def teacher_directory(path: Path) -> Path:
    """Return the directory of the teacher that a run learned from.

    Raises:
        UsageError: `path` is not a run, or its teacher is not where it was.
    """
    record = find_record(path)
    if record is None:
        raise UsageError("only a run knows its teacher", where=str(path), fix="name the run directory, not a model")
    recorded = read_record(record)["store"].get("teacher")
    try:
        return find_model(str(recorded.get("directory", "") if isinstance(recorded, dict) else "")).directory
    except UsageError as error:
        raise UsageError(
            f"the teacher is not where it was: {error.what}", where=str(record), fix="bring it back, or ask without it"
        ) from error


@torch.inference_mode()
def _answer(
    role: str, directory: Path, prompt: str, *, chat: bool, limit: int, device: torch.device, dtype: str
) -> Answer:
    began = time.perf_counter()
    tokenizer = load_tokenizer(directory)
    ids = _prompt_ids(tokenizer, prompt, chat=chat, where=str(directory))
    model = _load(directory, device, resolve_dtype(dtype, device))
    inputs = torch.tensor([ids], device=device)
    with quiet():
        output = model.generate(  # type: ignore[operator]  # a mixin method that the stubs do not see
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    new = output[0, len(ids) :].tolist()
    return Answer(
        role=role,
        model=str(directory),
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        tokens=len(new),
        seconds=time.perf_counter() - began,
    )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool, where: str) -> list[int]:
    if chat:
        if not tokenizer.chat_template:
            raise UsageError("the tokenizer has no chat template", where=where, fix="ask without --chat")
        turns = [{"role": "user", "content": prompt}]
        with tokenizer_errors("the chat template fails", where=where, fix="repair it, or ask without --chat"):
            text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        ids = encode(tokenizer, [text], add_special_tokens=False)["input_ids"][0]
    else:
        ids = encode(tokenizer, [prompt])["input_ids"][0]
    if not ids:
        raise UsageError("the prompt is empty", where="PROMPT", fix="give some text to continue")
    return [int(index) for index in ids]


def _load(directory: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        if "memory" in str(error).lower():
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"the model cannot be loaded: {reason}", where=str(directory)) from error
    ready: PreTrainedModel = model.to(device).eval()
    return ready
