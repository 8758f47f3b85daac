"""What can be said of a store before its teacher runs, beside its rows: its tokenizer's size, what it will lack.

Data path: configuration -> plan -> **notes, bytes** -> `pipeline plan`.
"""

from __future__ import annotations

import numpy as np

from storage.commit.manifest import compress_tokenizer_file
from storage.plan import Plan

# Of a 135M teacher on real text the 16, 64 and 256 likeliest tokens hold 82, 91 and 96%: rank r has about r ** -1.54.
TAIL_EXPONENT = 1.54
_PIECE = 1 << 20  # bytes


def notes(plan: Plan) -> tuple[str, ...]:
    """Say which temperatures would leave most of the teacher in one bucket, which training could only tell later."""
    tails = {at: expected_tail(plan.target.k, plan.vocab_size, at) for at in plan.target.temperatures}
    return tuple(
        f"at temperature {at:g} about {tail:.0%} of what a teacher says lies outside of its {plan.target.k} likeliest "
        "tokens, and training sees it as one bucket: set a larger target.k, or lower target.temperatures"
        for at, tail in tails.items()
        if tail > 0.5
    )


def expected_tail(k: int, vocab_size: int, temperature: float) -> float:
    """Return the probability outside of the k likeliest tokens that a language model's distribution usually has."""
    weight_V = np.arange(1, vocab_size + 1) ** (-TAIL_EXPONENT / temperature)
    return float(weight_V[k:].sum() / weight_V.sum())


def stored_size(data: bytes) -> int:
    """Return about how many bytes a tokenizer's file takes in a store; of a large one, samples are compressed."""
    step = max(len(data) // 4, _PIECE)
    sample = b"".join(data[at : at + _PIECE] for at in range(0, len(data), step))
    return round(len(compress_tokenizer_file(sample)) * len(data) / max(len(sample), 1))
