"""Models built from a configuration: with random weights, or with some of the layers of another model.

Data path: configuration, or model with weights -> **model of another shape** -> student.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from stages.models.files import first_line
from stages.out_of_memory import is_out_of_memory
from storage.errors import DistillError, UsageError


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model with random weights, as if it had no padding token: transformers would start its row at zero."""
    config = copy.deepcopy(config)
    pad = vars(config.get_text_config()).get("pad_token_id")
    if pad is not None:
        vars(config.get_text_config())["pad_token_id"] = None  # past the checks of those that want a number
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32, trust_remote_code=False
    )
    if pad is not None:
        vars(model.config.get_text_config())["pad_token_id"] = pad
        for module in model.modules():  # some count positions from it
            if getattr(module, "padding_idx", pad) is None and not isinstance(module, nn.Embedding):
                module.padding_idx = pad
    return model


@contextmanager
def making_told(where: str, fix: str) -> Iterator[None]:
    """Tell what a configuration lacks to make a model."""
    try:
        yield
    except DistillError:
        raise
    except Exception as error:  # an architecture's own checks raise whatever they like
        if is_out_of_memory(error):
            raise
        what = f"no student can be made from this configuration: {first_line(error)}"
        raise UsageError(what, where=where, fix=fix) from error


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
    if overrides.get("num_hidden_layers", values.get("num_hidden_layers")) != values.get("num_hidden_layers"):
        for key in _per_layer_fields(config):
            if key not in overrides:
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
    with making_told("init: layers_of_teacher", "use init: pretrained or from_config for this architecture"):
        kept = random_model(type(config).from_dict({**values, "num_hidden_layers": len(layers)}))
    weights = model.state_dict()

    def original(name: str) -> str:
        if not name.startswith(f"{prefix}."):
            return name
        new, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        return f"{prefix}.{layers[int(new)]}.{rest}"

    chosen = {name: weights.get(original(name)) for name in kept.state_dict()}
    dropped = tuple(f"{prefix}.{index}." for index in range(layers_of(model)) if index not in layers)
    unlike = {name for name in weights if not name.startswith(dropped)} - {original(name) for name in chosen}
    unlike |= {name for name, weight in kept.state_dict().items() if not _same(weight, chosen[name], shape_alone=True)}
    if not unlike:
        kept.load_state_dict(chosen)
        # Two weights of the source may be one in the new model.
        unlike = {name for name, weight in kept.state_dict().items() if not _same(weight, chosen[name])}
    if unlike:
        raise UsageError(
            f"{type(model).__name__} does not stay itself with layers {list(layers)}: {min(unlike)} has no place",
            where="layers",
            fix="keep all layers, or such that each is of the kind that its new place asks for",
        )
    kept.generation_config = model.generation_config
    return kept


def layers_of(model: PreTrainedModel) -> int:
    """Return the number of decoder layers. Raise UsageError for a model of several models."""
    layers = getattr(model.config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise UsageError(
            f"{type(model).__name__} is made of several models, whose layers cannot be taken",
            where="init: layers_of_teacher",
            fix="use init: pretrained, or the text model alone",
        )
    return layers


def _layer_prefix(model: PreTrainedModel) -> str:
    """Return the name of the list of decoder layers, such as `model.layers`."""
    wanted = layers_of(model)
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


def _same(weight: Tensor, source: Tensor | None, *, shape_alone: bool = False) -> bool:
    """Compare bytes: NaN is equal to itself here."""
    if source is None or weight.shape != source.shape:
        return False
    return shape_alone or torch.equal(weight.flatten().view(torch.uint8), source.flatten().view(torch.uint8))
