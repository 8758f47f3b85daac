"""The `loss` section of a training configuration: its fields are those of the loss itself, so the loss checks them.

Checking builds the loss once, which loads torch; only training configurations pay for it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.config.base import FieldError
from pipeline.config.problems import right_key, shown

LOSS = "KDLoss"
# Fields of KDLoss that a training run takes from elsewhere, and from where.
SET_ELSEWHERE = {
    "chunk_size": "the key chunk_size",
    "ignore_index": "the positions that have a row",
    "vocab_size": "the teacher's tokenizer",
    "tp_group": "the process group",
    "fp32_upcast": "the fused form, which always sums rows in float32",
}


def check_loss(loss: Mapping[str, Any]) -> None:
    """Check the name and the fields of the loss.

    Raises:
        FieldError: an unknown loss or field, a value that the loss refuses, or a field that is not set here.
    """
    fields = dict(loss)
    name = fields.pop("name", LOSS)
    if name != LOSS:
        raise FieldError(
            f"loss.name: expected {LOSS}, found {name!r}",
            path=("loss", "name"),
            fix=f"{LOSS} compares teacher and student, always in its fused form; kd_ratio mixes cross-entropy in, "
            "kd_ratio: 0 is cross-entropy alone",
        )
    _check_keys(fields)
    _build(fields)


def loss_spelled_out(loss: Mapping[str, Any]) -> dict[str, Any]:
    """What a valid `loss` section computes, with all defaults: jsd and jsd(0.5) are the same."""
    from stages.losses import KDLossConfig
    from stages.losses.divergences import spelled_out

    fields = vars(KDLossConfig(**{key: value for key, value in loss.items() if key != "name"}))
    named = {"name": LOSS, "divergence": spelled_out(fields["divergence"])}
    # check only looks: it changes nothing that is computed.
    return {key: value for key, value in fields.items() if key not in SET_ELSEWHERE and key != "check"} | named


def _check_keys(keys: Iterable[str]) -> None:
    from stages.losses import KDLossConfig

    known = ["name", *(field.name for field in dataclasses.fields(KDLossConfig) if field.name not in SET_ELSEWHERE)]
    for key in keys:
        if key in SET_ELSEWHERE:
            what, fix = f"loss.{key} is not set here: it comes from {SET_ELSEWHERE[key]}", f"leave loss.{key} out"
            raise FieldError(what, path=("loss", key), fix=fix)
        if key not in known:
            raise FieldError(f"unknown key {key!r} in loss", path=("loss", key), fix=right_key(key, known))


def _build(fields: dict[str, Any]) -> None:
    from stages.losses import KDLossConfig

    try:
        KDLossConfig(**fields)
    except (TypeError, ValueError) as error:
        # Only what stands behind a divergence's name is told without its key.
        key = next((key for key in fields if re.search(rf"\b{key}\b", str(error))), "divergence")
        default = getattr(KDLossConfig, key)
        what = f"loss: {error}"
        if isinstance(error, TypeError):
            expected = {float: "a number", bool: "true or false"}.get(type(default), "text")
            what = f"loss.{key}: expected {expected}, found {shown(fields[key])}"
        fix = f"leave loss.{key} out for its default, {json.dumps(default)}"
        raise FieldError(what, path=("loss", key), fix=fix) from error
