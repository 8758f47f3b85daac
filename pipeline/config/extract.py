"""Configuration of phase 1: which teacher reads which corpus, what is kept, and where it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Model

Auto = Literal["auto"]
Whole = Annotated[int, Field(strict=True)]  # strict: `true` is no number
NotNegative = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(gt=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**64, strict=True)]  # the draws take it as one uint64
Draws = Annotated[int, Field(ge=0, le=65_535, strict=True)]  # a shard holds counts of draws as uint16
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class TeacherConfig(Model):
    """The teacher: any Hugging Face causal language model in safetensors. Remote code is never run."""

    path: str
    """Directory or hub name of the model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Dtype = "auto"
    """Dtype of the forward pass; the head is always computed in float32. auto: bfloat16 where that is fast."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation."""


class SourceConfig(Model):
    """One corpus source. Sources are concatenated in the order given."""

    source: Literal["text", "jsonl", "parquet", "dataset", "topics"]
    """text: one document per file. jsonl, parquet: one per row. dataset: a Hugging Face dataset by name or local
    directory. topics: the Python documentation topics that every Python installation carries."""
    path: str | None = None
    """File, glob pattern, dataset name or dataset directory (not for topics)."""
    field: str = "text"
    """Column that holds the text (jsonl, parquet, dataset)."""
    name: str | None = None
    """Configuration name of a dataset."""
    split: str = "train"
    """Split of a dataset."""
    revision: str | None = None
    """Hub revision of a dataset."""

    @model_validator(mode="after")
    def _path_given(self) -> SourceConfig:
        if (self.path is None) != (self.source == "topics"):
            raise ValueError(f"source {self.source!r} {'takes no' if self.source == 'topics' else 'needs a'} path")
        return self


class RenderingConfig(Model):
    """How a document becomes token windows."""

    window: Positive = 1024
    """Longest sequence that the teacher sees in one forward, in tokens."""
    overlap: NotNegative = 0
    """Tokens of context that a window repeats from the one before it; repeated tokens get no second target row."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin-of-sequence token before each document. auto: as the tokenizer does by itself."""
    eos: bool = True
    """End-of-sequence token after each document."""
    min_tokens: Positive = 2
    """Shorter documents and windows are left out."""

    @model_validator(mode="after")
    def _overlap_below_window(self) -> RenderingConfig:
        if self.overlap >= self.window:
            raise ValueError(f"overlap {self.overlap} must be smaller than window {self.window}")
        return self


class TargetConfig(Model):
    """What is kept of the teacher's distribution at each position."""

    kind: Literal["hybrid", "topk"] = "hybrid"
    """hybrid: exact head plus samples of the tail, an unbiased target. topk: exact head only."""
    k: Positive = 32
    """Entries of the exact head."""
    draws: Draws | None = None
    """Samples drawn from the tail per row, at most 65535. Default: 8 for hybrid, 0 for topk."""
    seed: Seed = 0
    """Seed of the draws, from 0 to 2**64 - 1. They depend on it, document and position, not on batching or workers."""

    @model_validator(mode="after")
    def _draws_fit_kind(self) -> TargetConfig:
        if self.kind == "topk" and self.draws:
            raise ValueError(f"kind topk draws no samples, found draws: {self.draws}")
        if self.kind == "hybrid" and self.draws == 0:
            raise ValueError("kind hybrid needs draws > 0; kind topk stores a head without samples")
        return self

    @property
    def samples(self) -> int:
        """Draws per row with the default filled in."""
        if self.draws is not None:
            return self.draws
        return 8 if self.kind == "hybrid" else 0


class HeldoutConfig(Model):
    """Documents set aside for validation and evaluation. Training cannot read them."""

    fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of documents that is held out, chosen by a hash of seed and document number."""
    seed: Seed = 0
    """Seed of that hash, from 0 to 2**64 - 1."""


class ExtractConfig(Model):
    """`pipeline extract`: read a corpus once with a teacher and store its sparse next-token distributions."""

    store: Path
    """Directory of the store. Relative paths are relative to the working directory."""
    teacher: TeacherConfig
    """The model that is read."""
    corpus: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """What it reads."""
    rendering: RenderingConfig = RenderingConfig()
    """How documents become token windows."""
    target: TargetConfig = TargetConfig()
    """What is kept per position."""
    heldout: HeldoutConfig = HeldoutConfig()
    """What is set aside."""
    documents_per_shard: Positive | Auto = "auto"
    """Documents per shard, the unit of work that an interruption can lose. auto: about 20,000 target rows."""
    batch_size: Positive | Auto = "auto"
    """Sequences per teacher forward. auto: about 4,096 tokens on CPU, 16,384 on an accelerator."""
    chunk_size: Positive | Auto = "auto"
    """Positions whose full-vocabulary logits exist at one time. auto: about 256 MiB of logits."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
