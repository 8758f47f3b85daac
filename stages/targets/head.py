"""The exact head of a distribution: its k most probable tokens.

Axis legend: N rows, V tokens of the vocabulary, K head entries, G blocks of BLOCK neighbouring tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 64  # near sqrt(V / K) for usual sizes, where finding blocks and searching in them cost the same


def blocked(values_NV: Tensor, fill: float) -> Tensor:
    """Return values_NGB: the vocabulary in blocks of BLOCK, the last one filled up. A view where that is possible."""
    missing = -values_NV.shape[1] % BLOCK
    if missing:
        values_NV = functional.pad(values_NV, (0, missing), value=fill)
    return values_NV.view(values_NV.shape[0], -1, BLOCK)


def top_entries(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k greatest logits and their ids, both [N, K], falling; equal logits in the order of their ids.

    The k blocks with the greatest maxima contain the k greatest logits, so only they are searched: exact, and 3 to 4
    times faster than a search over the whole vocabulary (measured for V = 49,152, k = 32). Where equal logits straddle
    the last place, which of them is kept is torch's choice, the same every time.
    """
    if logits_NV.shape[1] <= 4 * k * BLOCK:
        logit_NK, ids_NK = logits_NV.topk(k)
    else:
        blocks_NGB = blocked(logits_NV, -torch.inf)
        best_NK = blocks_NGB.amax(-1).topk(k, sorted=False).indices
        candidates_NKB = blocks_NGB.gather(1, best_NK[..., None].expand(-1, -1, BLOCK))
        logit_NK, place_NK = candidates_NKB.flatten(1).topk(k)
        ids_NK = best_NK.gather(1, place_NK // BLOCK) * BLOCK + place_NK % BLOCK
    ids_NK, by_id_NK = ids_NK.sort(dim=1)
    logit_NK, falling_NK = logit_NK.gather(1, by_id_NK).sort(dim=1, descending=True, stable=True)
    return logit_NK, ids_NK.gather(1, falling_NK)
