"""Configuration of phase 1: which teacher reads which corpus, what is kept, and where it goes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Model, NameIn, StoreDirectory, described
from stages.corpus import SOURCES
from stages.targets import KINDS
from stages.teacher import BACKENDS
from storage.codecs import CODECS, DEFAULT_CODEC
from storage.target import LARGEST_DRAWS, TargetSpec

Auto = Literal["auto"]
Whole = Annotated[int, Field(strict=True)]  # strict: `true` is not a number
NotNegative = Annotated[int, Field(ge=0, strict=True)]
Draws = Annotated[int, Field(ge=0, le=LARGEST_DRAWS, strict=True)]
Positive = Annotated[int, Field(gt=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**64, strict=True)]  # the draws take it as one uint64
Real = Annotated[float, Field(strict=True)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class TeacherConfig(Model):
    """The teacher: any Hugging Face causal language model in safetensors. Remote code is never run."""

    path: str
    """Directory or hub name of the model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    backend: Annotated[str, NameIn(BACKENDS)] = Field("hf", description=described(BACKENDS))
    dtype: Dtype = "auto"
    """Dtype of the forward pass; the head is always computed in float32. auto: bfloat16 where that is fast."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation. sdpa becomes eager, and says so, where an architecture cannot do it."""


class SourceConfig(Model):
    """One corpus source. Sources are concatenated in the order given."""

    source: Annotated[str, NameIn(SOURCES)] = Field(description=described(SOURCES))
    path: str | None = None
    """File, glob pattern, dataset name or dataset directory (not for topics)."""
    field: str = "text"
    """Column that holds the text, of sources with columns."""
    prompt_field: str | None = None
    """Column that holds a prompt. It is put before the text as it is, read by the teacher, and gets no target rows: the
    student learns the text alone."""
    name: str | None = None
    """Configuration name of a dataset."""
    split: str = "train"
    """Split of a dataset, or a part of it, such as train[:1000]."""
    revision: str | None = None
    """Hub revision of a dataset."""

    @model_validator(mode="after")
    def _path_given(self) -> SourceConfig:
        kind = SOURCES[self.source]
        if (self.path is not None) != kind.path:
            raise ValueError(f"source {self.source!r} {'needs a' if kind.path else 'takes no'} path")
        if self.prompt_field is not None and not kind.fields:
            raise ValueError(f"source {self.source!r} has no fields, so it takes no prompt_field")
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
    """End-of-sequence token after each document. One that has its begin or end token in its text gets no second one."""
    special_tokens: Literal["parse", "text"] = "parse"
    """Special tokens that a text spells: parse reads them as such, which rendered conversations need; text reads them
    as the characters that they are, which is right for prose about them."""
    too_long: Literal["drop", "cut_prompt", "window"] = "drop"
    """What becomes of a document with a prompt that has more tokens than a window. drop leaves out what is beyond the
    window, and the whole document if its prompt fills it; cut_prompt leaves out the beginning of the prompt where that
    is enough; window learns the text in later windows too, which do not show how the prompt began."""
    min_tokens: Positive = 2
    """Shorter documents and windows are left out."""

    @model_validator(mode="after")
    def _overlap_below_window(self) -> RenderingConfig:
        if self.overlap >= self.window:
            raise ValueError(f"overlap {self.overlap} must be smaller than window {self.window}")
        return self


class TargetConfig(Model):
    """What is kept of the teacher's distribution at each position."""

    kind: Annotated[str, NameIn(KINDS)] = Field("hybrid", description=described(KINDS))
    k: Positive | None = None
    """Entries of the exact head (topp: at most). Default: 32; sampled has none."""
    p: Real | None = None
    """Probability that the head of topp reaches, unless k entries end it before."""
    draws: Draws | None = None
    """Samples drawn per row from what is outside of the head, at most 65535. Default: 8 for hybrid, 50 for sampled."""
    seed: Seed = 0
    """Seed of the draws, from 0 to 2**64 - 1. They depend on it, document and position, not on batching or workers."""
    temperatures: tuple[Real, ...] = ()
    """Temperatures other than 1 to train at, from 0.01 to 100 and rising, such as [1.5, 2.0]: tail mass and entropy
    are stored for each. Not for sampled."""

    @model_validator(mode="after")
    def _fields_fit_kind(self) -> TargetConfig:
        self.spec().check()
        return self

    def spec(self) -> TargetSpec:
        """Return the same for a plan, with the defaults filled in."""
        default = KINDS[self.kind]
        return TargetSpec(
            kind=self.kind,
            k=default.k if self.k is None else self.k,
            p=self.p,
            draws=default.draws if self.draws is None else self.draws,
            seed=self.seed,
            temperatures=self.temperatures,
        )


class HeldoutConfig(Model):
    """Documents set aside for validation and evaluation. Training cannot read them."""

    fraction: Annotated[float, Field(ge=0.0, lt=1.0, strict=True)] = 0.0
    """Share of documents that is held out, chosen by a hash of seed and document number."""
    seed: Seed = 0
    """Seed of that hash, from 0 to 2**64 - 1."""


class ExtractConfig(Model):
    """`pipeline extract`: read a corpus once with a teacher and store its sparse next-token distributions."""

    store: StoreDirectory
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
    codec: Annotated[str, NameIn(CODECS)] = Field(
        DEFAULT_CODEC, description=f"How the numbers of a row are stored. {described(CODECS)}"
    )
    documents_per_shard: Positive | Auto = "auto"
    """Documents per shard, the unit of work that an interruption can lose. auto: about 32,000 target rows."""
    batch_size: Positive | Auto = "auto"
    """Sequences per teacher forward. auto: about 4,096 tokens on CPU, 16,384 on an accelerator."""
    chunk_size: Positive | Auto = "auto"
    """Positions whose full-vocabulary logits exist at one time. auto: about 256 MiB of logits."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
