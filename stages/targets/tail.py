"""Samples of the tail: ids drawn from the teacher's distribution outside the head.

By inverse transform in a fixed order, so that one uniform number gives one id: first the block in which the cumulative
mass passes the number, then the token within the block. No pass over the whole vocabulary is needed per draw.

Axis legend: N rows, V tokens of the vocabulary, M draws, G blocks of BLOCK tokens, B tokens of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.targets.head import BLOCK, blocked

_LARGEST_GATHER = 1 << 22  # probabilities of the drawn blocks that are held at once, whatever the number of draws


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
