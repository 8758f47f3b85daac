"""The `loss` section of a training configuration: its fields are those of the loss itself, so the loss checks them.

Checking builds the loss once, which loads torch; only training configurations pay for it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
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
    "reduction": "the step, which takes the mean over all of its rows",
    "fp32_upcast": "the fused form, which always sums rows in float32",
}


def check_loss(loss: Mapping[str, Any]) -> None:
    """Check the name and the fields of the loss.

    Raises:
        FieldError: an unknown loss or field, a value that the loss refuses, or a field that is not set here.
    """
    name = loss.get("name", LOSS)
    if name != LOSS:
        raise FieldError(
            f"loss.name: expected {LOSS}, found {name!r}",
            path=("loss", "name"),
            fix=f"{LOSS} compares teacher and student, always in its fused form; kd_ratio mixes cross-entropy in, "
            "kd_ratio: 0 is cross-entropy alone",
        )
    _check_keys(loss)
    _build(loss)


def loss_fields(loss: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of KDLossConfig that a `loss` section names; its other keys are parameters of the divergence.

    Raises:
        TypeError, ValueError: an unknown divergence, or parameters that it does not take.
    """
    from stages.losses import KDLossConfig
    from stages.losses.divergences import spelled_out, with_parameters

    own = {field.name for field in dataclasses.fields(KDLossConfig)}
    fields = {key: value for key, value in loss.items() if key in own}
    parameters = {key: value for key, value in loss.items() if key not in own and key != "name"}
    if parameters:
        divergence = fields.get("divergence", KDLossConfig.divergence)
        fields["divergence"] = spelled_out(with_parameters(divergence, parameters))
    return fields


def loss_schema(schema: dict[str, Any]) -> None:
    """Add the divergences and their parameters to the JSON Schema of a `loss` section. Loads torch."""
    from stages.losses.divergences import DIVERGENCES, parameters

    users: dict[str, list[str]] = {}
    for name in DIVERGENCES:
        for key in parameters(name):
            users.setdefault(key, []).append(name)
    written = {"type": "string", "pattern": rf"^({'|'.join(DIVERGENCES)})\("}
    about = "What is measured, with its parameters in parentheses behind it or as keys beside it."
    schema["properties"] = {
        "divergence": {"anyOf": [{"enum": list(DIVERGENCES)}, written], "description": about},
        **{key: {"type": "number", "description": f"Of {', '.join(names)}."} for key, names in users.items()},
    }


def loss_spelled_out(loss: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a valid `loss` section computes, with all defaults: jsd and jsd(0.5) are the same."""
    from stages.losses import KDLossConfig
    from stages.losses.divergences import spelled_out

    fields = vars(KDLossConfig(**loss_fields(loss)))
    named = {"name": LOSS, "divergence": spelled_out(fields["divergence"])}
    # check only looks: it changes nothing that is computed.
    return {key: value for key, value in fields.items() if key not in SET_ELSEWHERE and key != "check"} | named


def _check_keys(loss: Mapping[str, Any]) -> None:
    from stages.losses import KDLossConfig
    from stages.losses.divergences import parameters

    for key in (key for key in loss if key in SET_ELSEWHERE):
        what, fix = f"loss.{key} is not set here: it comes from {SET_ELSEWHERE[key]}", f"leave loss.{key} out"
        raise FieldError(what, path=("loss", key), fix=fix)
    known = ["name", *(field.name for field in dataclasses.fields(KDLossConfig) if field.name not in SET_ELSEWHERE)]
    try:
        known += parameters(loss.get("divergence", KDLossConfig.divergence))
    except (TypeError, ValueError):
        return  # no divergence, as building the loss will tell: it would have said which other keys there are
    for key in loss:
        if key not in known:
            raise FieldError(f"unknown key {key!r} in loss", path=("loss", key), fix=right_key(key, known))


def _build(loss: Mapping[str, Any]) -> None:
    from stages.losses import KDLossConfig

    try:
        KDLossConfig(**loss_fields(loss))
    except (TypeError, ValueError) as error:
        defaults = _defaults(loss)
        # Only what stands behind a divergence's name is told without its key.
        key = next((key for key in loss if key in defaults and re.search(rf"\b{key}\b", str(error))), "divergence")
        what = f"loss: {error}"
        fix: str | None = f"leave loss.{key} out for its default, {json.dumps(defaults[key])}"
        if isinstance(error, TypeError):
            expected = {float: "a number", bool: "true or false"}.get(type(defaults[key]), "text")
            what = f"loss.{key}: expected {expected}, found {shown(loss.get(key))}"
        elif key not in vars(KDLossConfig) and "(" in str(loss.get("divergence", "")):
            fix = f"leave loss.{key} out, or the parentheses behind the divergence"
        elif "did you mean" in what:
            fix = None
        raise FieldError(what, path=("loss", key), fix=fix) from error


def _defaults(loss: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default of each key that the section may have, as far as its divergence is known."""
    from stages.losses import KDLossConfig
    from stages.losses.divergences import parameters

    own = {field.name: getattr(KDLossConfig, field.name) for field in dataclasses.fields(KDLossConfig)}
    try:
        return own | parameters(loss.get("divergence", own["divergence"]))
    except (TypeError, ValueError):
        return own
