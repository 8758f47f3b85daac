"""The entries of a row: the exact head, and ids drawn from the teacher's distribution outside of it.

Data path: logits chunk -> **head, samples of the tail** -> target rows.

Samples come by inverse transform in a fixed order, so that one uniform number gives one id: first the block in which
the cumulative mass passes the number, then the token within the block. No pass over the whole vocabulary is needed per
draw.

Axis legend: N rows, V tokens of the vocabulary, K head entries, M draws, G blocks of BLOCK neighbouring tokens, B the
tokens of a block.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from storage.permutation import mix64

BLOCK = 64  # near sqrt(V / K) for usual sizes, where finding blocks and searching in them cost the same
_LARGEST_GATHER = 1 << 22  # probabilities of the drawn blocks that are held at once, whatever the number of draws


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
        logit_NK, index_NK = candidates_NKB.flatten(1).topk(k)
        ids_NK = best_NK.gather(1, index_NK // BLOCK) * BLOCK + index_NK % BLOCK
    ids_NK, by_id_NK = ids_NK.sort(dim=1)
    logit_NK, falling_NK = logit_NK.gather(1, by_id_NK).sort(dim=1, descending=True, stable=True)
    return logit_NK, ids_NK.gather(1, falling_NK)


def tail_blocks(tail_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities in blocks, tail_NGB, and the cumulative mass of the blocks, float64 [N, G] on the CPU.

    `tail_NV` holds probabilities, zero at head entries. The last column of the second is the mass of the tail: a sum
    of its own terms, never one minus something.
    """
    tail_NGB = blocked(tail_NV, 0.0)
    # float64 on the CPU whatever the device (mps has none), so that a draw is the same function everywhere.
    return tail_NGB, tail_NGB.sum(-1).cpu().double().cumsum(-1)


def draw(tail_NGB: Tensor, mass_NG: Tensor, uniform_NM: Tensor) -> Tensor:
    """Return ids drawn with replacement, int64 [N, M] on the CPU, from uniform numbers in [0, 1), float64.

    Rows without any tail mass give ids that mean nothing.
    """
    together = max(1, _LARGEST_GATHER // (max(1, len(uniform_NM)) * BLOCK))
    parts = [_draw(tail_NGB, mass_NG, part_NM) for part_NM in torch.split(uniform_NM, together, dim=1)]
    return torch.cat(parts, dim=1)


def _draw(tail_NGB: Tensor, mass_NG: Tensor, uniform_NM: Tensor) -> Tensor:
    total_N1 = mass_NG[:, -1:]
    target_NM = _below(uniform_NM * total_N1, total_N1)
    # right=True: the first block whose cumulative mass exceeds the target, hence never one without mass.
    block_NM = torch.searchsorted(mass_NG, target_NM, right=True).clamp_(max=mass_NG.shape[1] - 1)
    before_NM = torch.where(block_NM > 0, mass_NG.gather(1, (block_NM - 1).clamp_(min=0)), 0.0)
    share_NM = (target_NM - before_NM) / (mass_NG.gather(1, block_NM) - before_NM)

    index_NMB = block_NM.to(tail_NGB.device)[..., None].expand(-1, -1, BLOCK)
    within_NMB = tail_NGB.gather(1, index_NMB).cpu().double().cumsum(-1)
    weight_NM1 = within_NMB[..., -1:]
    inner_NM1 = _below(share_NM[..., None] * weight_NM1, weight_NM1)
    return block_NM * BLOCK + torch.searchsorted(within_NMB, inner_NM1, right=True)[..., 0].clamp_(max=BLOCK - 1)


def _below(value: Tensor, limit: Tensor) -> Tensor:
    """Keep a product of `limit` and a number below 1 from being rounded up to `limit`."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))


def uniforms(
    seed: int, document_N: NDArray[np.int64], position_N: NDArray[np.int64], draws: int
) -> NDArray[np.float64]:
    """Return numbers in [0, 1), float64 [N, draws], one per document number, position in the document and draw.

    Each depends on what it is for and on nothing else, so the samples of a position are the same in any batch, chunk,
    shard or worker. A generator per shard or worker could not promise that.
    """
    state_N = _absorb(_absorb(mix64(np.array([seed], dtype=np.uint64)), document_N), position_N)
    hash_NM = _absorb(state_N[:, None], np.arange(draws, dtype=np.int64)[None, :])
    return (hash_NM >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _absorb(state: NDArray[np.uint64], value: NDArray[np.int64]) -> NDArray[np.uint64]:
    return mix64(state ^ mix64(value.astype(np.uint64)))
