"""Where a student comes from: weights as they are, some layers of a model, or a configuration with random weights.

Data path: a model directory -> **student** -> training. The teacher is not special here: any causal language model of
the store's vocabulary can lend layers or an architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.models.files import find_model, load_config, read_config
from stages.models.load import load_model, memory_told, require_causal_class
from stages.student.architecture import chosen_layers, keep_layers, layers_of, making_told, overridden, random_model
from storage.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class StudentSource:
    """Architecture and first weights.

    Attributes:
        init: pretrained: the weights of `path`. layers_of_teacher: `path` with only some of its layers. from_config:
            the architecture of `path` with `overrides` and random weights.
        path: model directory, hub name, or (from_config) a config.json.
        revision: hub revision.
        layers: layers_of_teacher: how many layers to keep, evenly spaced from first to last, or which ones.
        overrides: from_config: fields of the model's configuration to change.
    """

    init: Literal["pretrained", "layers_of_teacher", "from_config"]
    path: str
    revision: str | None = None
    layers: int | Sequence[int] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


def build_student(source: StudentSource, *, seed: int) -> PreTrainedModel:
    """Build the student in float32, in training mode, on the CPU. Every token's embedding learns.

    Args:
        source: where it comes from.
        seed: of random weights; two students of one seed are equal whatever was computed before.

    Raises:
        UsageError: no such model, weights that are not whole, a layer that it does not have, or an unknown
            configuration field.
        OutOfSpaceError: it does not fit into memory.
    """
    with torch.random.fork_rng(devices=[]), memory_told(f"path: {source.path}", "choose a smaller student"):
        torch.manual_seed(seed)
        if source.init == "from_config":
            model = _random_model(source)
        else:
            with _told_by_path(source):
                files = find_model(source.path, source.revision)
                model = load_model(files, dtype=torch.float32)
            if source.init == "layers_of_teacher":
                model = keep_layers(model, chosen_layers(source.layers, layers_of(model)))
    _let_every_token_learn(model)
    model.train()
    return model


def _let_every_token_learn(model: PreTrainedModel) -> None:
    """Give the row of the padding token a gradient: where it is the end token too, documents contain it.

    Nothing is padded here, so that no other row is affected.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None


def _random_model(source: StudentSource) -> PreTrainedModel:
    path = Path(source.path).expanduser()
    with _told_by_path(source):
        bare = path.is_file()
        config = read_config(path) if bare else load_config(find_model(source.path, source.revision, weights=False))
    require_causal_class(config, f"path: {source.path}")
    where, fix = f"path: {source.path}", "repair that value, or start from the configuration of another model"
    if source.overrides:
        where = "overrides"
        fix = "change fields together that depend on each other, such as hidden_size and num_attention_heads"
    with making_told(where, fix):
        return random_model(overridden(config, source.overrides))


def model_directory(source: StudentSource, *, weights: bool) -> Path:
    """Return the directory of `source.path`, from the hub's cache if it is a hub name.

    Raises:
        UsageError: no such model, or (with `weights`) none in safetensors format.
    """
    with _told_by_path(source):
        return find_model(source.path, source.revision, weights=weights).directory


@contextmanager
def _told_by_path(source: StudentSource) -> Iterator[None]:
    """Make errors about the model's files name it as the configuration does."""
    try:
        yield
    except UsageError as error:
        raise UsageError(error.what, where=f"path: {source.path}", fix=error.fix) from error
