"""Codecs for log-probabilities: what stands between float32 values and the numbers in a shard.

To add one: write a frozen dataclass in a file of this folder that satisfies `LogprobCodec`, list it in `CODECS`, and
add its golden bytes with `pytest tests/test_storage/test_codecs.py --refresh-goldens`. The tests run over the table.
A reader finds a codec by the id in the plan and in no other way, so nothing in a store can make it import anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from storage.codecs.exact import Exact
from storage.codecs.sqrt_delta import SqrtDelta
from storage.errors import UsageError
from storage.values import Json, canonical_json, require_section, short


class LogprobCodec(Protocol):
    """Turns the log-probabilities of the heads of rows into one array of numbers and back.

    It also rounds what a row has one of (tail mass, entropy, ...), which needs no decoding.

    Attributes:
        id: the name written into the plan.
        dtype: type of the stored numbers.
        row_dtype: type in which the numbers that a row has one of are stored.
        about: what it does to the numbers, for the documentation of configurations.
        renormalises: whether a reader scales each decoded head to the mass 1 - r that `tail_logit` states. True for
            codecs that round; the error bound below holds before that step.
    """

    id: ClassVar[str]
    about: ClassVar[str]
    dtype: ClassVar[np.dtype[np.generic]]
    row_dtype: ClassVar[np.dtype[np.generic]]
    renormalises: ClassVar[bool]

    def encode(self, logprob_H: NDArray[np.float32], head_size_R: NDArray[np.int32]) -> NDArray[np.generic]:
        """Return codes [H] of type `dtype`. Values are <= 0 and fall within a row."""
        ...

    def decode(self, codes_H: NDArray[np.generic], head_size_R: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return log-probabilities [H], again falling (or equal) within a row."""
        ...

    def decode_ranks(self, codes_KR: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return log-probabilities [K, R] of rows that all have K entries, stored rank after rank."""
        ...

    def round_numbers(self, values: NDArray[np.float32]) -> NDArray[np.generic]:
        """Return numbers per row as they are stored, of type `row_dtype`. Rounding them again changes nothing."""
        ...

    def error_bound(self, logprob_H: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the greatest |decoded - exact| [H], in nats, that this codec promises for these values."""
        ...

    def parameters(self) -> dict[str, Json]:
        """Return the id and the parameters, as the plan holds them."""
        ...


CODECS: Mapping[str, type[LogprobCodec]] = {
    SqrtDelta.id: SqrtDelta,
    Exact.id: Exact,
}
DEFAULT_CODEC = SqrtDelta.id  # of a new plan: the measured best, the same for every target kind so far


def logprob_codec(parameters: Mapping[str, Json]) -> LogprobCodec:
    """Build the codec that a plan names: `{"id": ..., parameter: value, ...}`.

    Raises:
        UsageError: the id is not in the table, or the parameters are not the codec's.
    """
    values = dict(parameters)
    name = values.pop("id", None)
    if not isinstance(name, str) or name not in CODECS:
        raise UsageError(
            f"unknown log-probability codec {name!r}; this version knows {', '.join(sorted(CODECS))}",
            where="plan.json: codecs.logprob.id",
            fix="install a version of topk-distill that knows it",
        )
    known = [item.name for item in fields(CODECS[name])]  # type: ignore[arg-type]  # a protocol cannot say dataclass
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise UsageError(
            f"codec {name} has no parameter {unknown[0]!r}; it has {', '.join(known) or 'none'}",
            where="plan.json: codecs.logprob",
        )
    try:
        return CODECS[name](**values)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"codec {name}: {error}", where="plan.json: codecs.logprob") from error


def check_codecs(codecs: Json) -> None:
    """Check the `codecs` field of a plan: one codec, of log-probabilities, with all of its parameters.

    Raises:
        UsageError: this version does not know it.
        ValueError: anything else.
    """
    require_section("codecs", codecs)
    if codecs.keys() != {"logprob"}:
        raise ValueError(f"codecs must hold logprob alone, found {short(sorted(codecs))}")
    parameters = codecs["logprob"]
    require_section("codecs.logprob", parameters)
    name = parameters.get("id")
    if not isinstance(name, str):
        raise ValueError(f"codecs.logprob.id must be the name of a codec, found {short(name)}")
    try:
        written = logprob_codec(parameters).parameters()
    except UsageError as error:
        if name in CODECS:
            raise ValueError(f"codecs.logprob: {error.what}") from error
        raise
    if canonical_json(dict(parameters)) != canonical_json(written):
        raise ValueError(f"codecs.logprob must be {written}, found {short(dict(parameters))}")
