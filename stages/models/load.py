"""The one door through which weights come in: whole, of the right shapes, tied as the file ties them, told if surplus.

Data path: model directory -> **model with its weights** -> teacher, student, answer.

transformers fills what a file lacks with random numbers and only logs it; here it is an error that names the weight.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from stages.models.files import ModelDirectory, first_line, load_config, quiet
from stages.out_of_memory import is_out_of_memory
from storage.errors import OutOfSpaceError, UsageError

logger = logging.getLogger("topk_distill.models")

_SOFTCAPS = ("attn_logit_softcapping", "attention_logit_cap")  # of attention; those of the head are in head.py


def load_model(
    files: ModelDirectory, *, dtype: torch.dtype, attention: str | None = None, attention_key: str | None = None
) -> PreTrainedModel:
    """Load a causal language model from safetensors weights, onto the CPU, in evaluation mode.

    Args:
        attention: how it attends; None: as transformers chooses.
        attention_key: the configuration key of that, for what messages advise; None: there is none.

    Raises:
        UsageError: not a causal language model, a configuration that makes no model, or weights that are broken,
            lacking, or of other shapes than the configuration says.
    """
    where = str(files.directory)
    config = load_config(files)
    require_causal_class(config, where)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                files.directory,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, and refused below by name
            )
    except Exception as error:  # transformers builds a model of the user's files here, and fails in many ways
        if is_out_of_memory(error):
            raise
        raise _not_loadable(files, config, error, attention_key=attention_key) from error
    model: PreTrainedModel = loaded[0]
    _check_report(loaded[1], where)
    _state_ties(model, where)
    return model


def attention_for(config: PreTrainedConfig, asked: str, *, key: str) -> str:
    """Return `asked`, or eager (told in a warning) where an architecture cannot do sdpa or loses its softcap by it.

    Args:
        asked: sdpa, eager or flash_attention_2.
        key: the configuration key that asks, for the message.
    """
    if asked != "sdpa":
        return asked
    text = config.get_text_config()
    if any(getattr(text, name, None) for name in _SOFTCAPS):
        reason = "caps its attention, which sdpa leaves out"
    elif not getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_supports_sdpa", True):
        reason = "has no sdpa attention"
    else:
        return asked
    logger.warning("%s %s: %s is eager instead", config.model_type, reason, key)
    return "eager"


def way_out(model: PreTrainedModel, attention: str, *, role: str) -> str:
    """Return what to do where this attention cannot keep packed sequences apart: what is left to try here, if any is.

    Args:
        role: student or teacher.
    """
    flash = getattr(model, "_supports_flash_attn", False) and attention != "flash_attention_2"
    left = {
        "eager": attention != "eager",
        "sdpa": attention != "sdpa" and getattr(model, "_supports_sdpa", False),
        "flash_attention_2": flash and model.device.type == "cuda",
    }
    other = f"choose another architecture for the {role}"
    if any(left.values()):
        return f"set it to {' or '.join(name for name, possible in left.items() if possible)}, or {other}"
    if flash:
        return f"{other}: of this one only flash attention keeps packed sequences apart, and that needs a CUDA device"
    return other


def require_causal_class(config: PreTrainedConfig, where: str) -> None:
    """Raise UsageError if no causal language model has this kind of configuration."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"{config.model_type!r} is not a causal language model to the installed transformers",
            where=where,
            fix="name a model that predicts the next token, such as Llama, Qwen or Gemma",
        )


@contextmanager
def memory_told(where: str, fix: str) -> Iterator[None]:
    """Say what does not fit where memory runs out."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfSpaceError("the model does not fit into memory", where=where, fix=fix) from error


def _not_loadable(
    files: ModelDirectory, config: PreTrainedConfig, error: Exception, *, attention_key: str | None
) -> UsageError:
    """Find out which is at fault: the configuration, if it makes no model even without weights; else the weights or
    the attention."""
    where = str(files.directory)
    try:
        with quiet(), torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception as cause:  # as above
        return UsageError(
            f"cannot load the model: its configuration makes none: {first_line(cause)}",
            where=f"{where}/config.json",
            fix="repair that value, or download the model again",
        )
    if isinstance(error, (ImportError, ValueError)) and attention_key is not None and "atten" in str(error).lower():
        fix = f"set {attention_key}: eager, which every architecture has"
    else:
        fix = "check the weight files: download or convert the model again"
    return UsageError(f"cannot load the model: {first_line(error)}", where=where, fix=fix)


def _check_report(report: dict[str, Any], where: str) -> None:
    """Refuse what transformers would fill with random numbers, and tell what it leaves unread."""
    surplus = sorted(report["unexpected_keys"])
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, in_file, asked_for = mismatched[0]
        raise UsageError(
            f"{_counted(mismatched)} other shapes than the configuration asks for, such as {name}: "
            f"{list(in_file)} in the file, {list(asked_for)} asked for",
            where=where,
            fix="config.json and weights belong to different models: download or convert the model again",
        )
    missing = sorted(str(key) for key in report["missing_keys"])
    if missing:
        instead = f"; it has {len(surplus)} that are not asked for, such as {surplus[0]}" if surplus else ""
        raise UsageError(
            f"the weight files lack {len(missing)} of the weights that the configuration asks for, such as "
            f"{missing[0]}{instead}",
            where=where,
            fix="download or convert the model again",
        )
    if surplus:
        logger.warning(
            "%s: %d weights of the files have no place in the model and are not read, such as %s",
            where,
            len(surplus),
            surplus[0],
        )


def _counted(names: Collection[object]) -> str:
    return "1 weight has" if len(names) == 1 else f"{len(names)} weights have"


def _state_ties(model: PreTrainedModel, where: str) -> None:
    """Make the configuration say what holds: weights that it ties, but that differ in the file, are two.

    Whoever builds a model from this configuration, or reads the student that is saved with it, would lose one of them.
    """
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter(target) is not model.get_parameter(source):
            logger.warning(
                "%s: config.json ties %s to %s, which differ in the weight files: they stay two", where, target, source
            )
            for module in model.modules():
                if isinstance(module, PreTrainedModel):
                    module.config.tie_word_embeddings = False
            return
