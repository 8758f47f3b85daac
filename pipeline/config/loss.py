"""The `loss` section of a training configuration: its fields are those of the loss itself, so the loss checks them.

Checking builds the loss once, which loads torch; only training configurations pay for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.base import FieldError

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
            fix=f"training mixes {LOSS} with cross-entropy by kd_ratio; kd_ratio: 0 is cross-entropy alone",
        )
    for key in fields.keys() & SET_ELSEWHERE.keys():
        raise FieldError(f"loss.{key} is not set here: it comes from {SET_ELSEWHERE[key]}", path=("loss", key))
    _build(fields)


def _build(fields: dict[str, Any]) -> None:
    from stages.losses import build_loss_config

    try:
        build_loss_config(LOSS, **fields)
    except (TypeError, ValueError) as error:
        key = next((key for key in fields if key in str(error)), None)
        raise FieldError(f"loss: {error}", path=("loss",) if key is None else ("loss", key)) from error
