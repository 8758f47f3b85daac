"""A tokenizer and a teacher made from nothing in seconds, for every test that wants real ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REAL_TOKENS = 512
TEACHER_STEPS = 100
HEAD_ROWS = 520  # the teacher's vocabulary is padded: its last 8 rows stand for no token


def save_tokenizer(directory: Path, texts: list[str]) -> None:
    """Train a byte-level BPE tokenizer of 512 tokens with <s>, </s> and <pad>, and save it as a fast tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=REAL_TOKENS,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


def save_teacher(directory: Path, tokenizer_dir: Path, texts: list[str]) -> None:
    """Save a seeded Llama (4 layers, width 64, 520 head rows for 512 tokens), trained for two seconds on the texts.

    So its distributions are those of a language model, if a poor one, and its weights are a pure function of the code.
    """
    shutil.copytree(tokenizer_dir, directory, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=HEAD_ROWS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    ids = torch.tensor(tokenizer("".join(texts), verbose=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(TEACHER_STEPS):
        starts = torch.randint(len(ids) - 64, (8,))
        batch = torch.stack([ids[start : start + 64] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
