"""Where a student comes from: weights as they are, some layers of a model, or a configuration with random weights.

Data path: a model directory -> **student** -> training. The teacher is not special here: any causal language model of
the store's vocabulary can lend layers or an architecture.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from stages.models.files import find_model, quiet, refuse_hub_kernels, require_model_file
from storage.errors import DistillError, UsageError


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
    """Build the student in float32, in training mode, on the CPU.

    Args:
        source: where it comes from.
        seed: of random weights; two students of one seed are equal whatever was computed before.

    Raises:
        UsageError: no such model, a layer that it does not have, or an unknown configuration field.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if source.init == "from_config":
            model = _random_model(source)
        else:
            model = _load_model(source)
            if source.init == "layers_of_teacher":
                model = keep_layers(model, chosen_layers(source.layers, model.config.num_hidden_layers))
    model.train()
    return model


def _random_model(source: StudentSource) -> PreTrainedModel:
    config = load_config(source)
    try:
        return _from_config(overridden(config, source.overrides))
    except DistillError:
        raise
    except Exception as error:  # an architecture's own checks raise whatever they like
        raise UsageError(
            f"no student can be made from this configuration: {type(error).__name__}: {' '.join(str(error).split())}",
            where="overrides",
            fix="change fields together that depend on each other, such as hidden_size and num_attention_heads",
        ) from error


def load_config(source: StudentSource) -> PreTrainedConfig:
    """Return the model configuration that `source` starts from.

    Raises:
        UsageError: no such model or file, or an architecture that transformers does not know.
    """
    file = Path(source.path).expanduser()
    if file.is_file():
        require_model_file(file)
        refuse_hub_kernels(file)
    path = file if file.is_file() else model_directory(source, weights=False)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loadable(source, error) from error
    return config


def model_directory(source: StudentSource, *, weights: bool) -> Path:
    """Return the directory of `source.path`, from the hub's cache if it is a hub name.

    Raises:
        UsageError: no such model, or (with `weights`) none in safetensors format.
    """
    try:
        return find_model(source.path, source.revision, weights=weights).directory
    except UsageError as error:
        raise UsageError(error.what, where=f"path: {source.path}", fix=error.fix) from error


def overridden(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the same configuration with some fields changed. A per-layer list that no longer fits is made anew.

    Raises:
        UsageError: a field that this kind of configuration does not have, with the nearest one that it has.
    """
    values = config.to_dict()
    for key in overrides:
        if key not in values:
            near = difflib.get_close_matches(key, values, n=1)
            raise UsageError(
                f"{type(config).__name__} has no field {key!r}",
                where="overrides",
                fix=f"did you mean {near[0]!r}?" if near else f"its fields are {', '.join(sorted(values))}",
            )
    layers = overrides.get("num_hidden_layers", config.num_hidden_layers)
    for key in _per_layer_fields(config):
        if layers != config.num_hidden_layers and key not in overrides:
            del values[key]
    for key in ("dtype", "transformers_version"):
        values.pop(key, None)
    changed: PreTrainedConfig = type(config).from_dict({**values, **overrides})
    return changed


def chosen_layers(layers: int | Sequence[int] | None, available: int) -> tuple[int, ...]:
    """Return the indices of the layers to keep, rising.

    Args:
        layers: a number of layers, spread evenly from the first to the last; or their indices.
        available: layers that the model has.

    Raises:
        UsageError: more layers than there are, a repeated layer, or one that does not exist.
    """
    if isinstance(layers, int):
        # One layer: the first, which reads the embeddings. Otherwise both ends are kept.
        gaps = max(layers - 1, 1)
        chosen = tuple(round(index * (available - 1) / gaps) for index in range(min(layers, available + 1)))
    else:
        chosen = tuple(sorted(layers or ()))
    allowed = set(range(available))
    if not chosen or len(set(chosen)) != len(chosen) or not allowed.issuperset(chosen):
        raise UsageError(
            f"layers: {layers} cannot be taken from a model of {available} layers",
            where="layers",
            fix=f"give a number from 1 to {available}, or different indices from 0 to {available - 1}",
        )
    return chosen


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Return a new model of the same kind with only these layers, in this order, and every other weight unchanged.

    The model is built anew from the changed configuration, so that whatever depends on a layer's index is right.
    """
    prefix = _layer_prefix(model)
    config = model.config
    values = config.to_dict()
    for key in _per_layer_fields(config):
        values[key] = [values[key][index] for index in layers]
    kept = _from_config(type(config).from_dict({**values, "num_hidden_layers": len(layers)}))
    weights = model.state_dict()

    def original(name: str) -> str:
        if not name.startswith(f"{prefix}."):
            return name
        new, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        return f"{prefix}.{layers[int(new)]}.{rest}"

    kept.load_state_dict({name: weights[original(name)] for name in kept.state_dict()})
    kept.generation_config = model.generation_config
    return kept


def _from_config(config: PreTrainedConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(  # type: ignore[no-any-return, no-untyped-call]
        config, dtype=torch.float32, trust_remote_code=False
    )


def _load_model(source: StudentSource) -> PreTrainedModel:
    directory = model_directory(source, weights=True)
    try:
        with quiet():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError, SafetensorError) as error:
        raise _not_loadable(source, error) from error
    return model


def _layer_prefix(model: PreTrainedModel) -> str:
    """Return the name of the list of decoder layers, such as `model.layers`."""
    wanted = model.config.num_hidden_layers
    found = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == wanted
    ]
    # Lists inside a layer (experts, say) may be as long; the decoder's own list is the outermost.
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found if other != name)]
    if len(outermost) != 1:
        raise UsageError(
            f"{type(model).__name__} has no single list of {wanted} layers, found {outermost or 'none'}",
            where="init: layers_of_teacher",
            fix="use init: pretrained or from_config for this architecture",
        )
    name: str = outermost[0]
    return name


def _per_layer_fields(config: PreTrainedConfig) -> list[str]:
    """Return the fields that list one value per layer, such as `layer_types`."""
    return [
        key
        for key, value in config.to_dict().items()
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers
    ]


def _not_loadable(source: StudentSource, error: Exception) -> UsageError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UsageError(
        f"the student's model cannot be loaded: {reason}",
        where=f"path: {source.path}",
        fix="name a directory of a causal language model that transformers can load without remote code",
    )
