"""What the checks of several processes share: one batch that all of them can make, and how numbers are compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from stages.losses import SparseTargets

N, D, V = 11, 6, 23
LABELS = torch.tensor([0, 22, -100, 4, 5, 13, 7, -100, 8, 20, 11])


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(draws: int = 5) -> SparseTargets:
    generator = torch.Generator().manual_seed(3)
    return SparseTargets.from_logits(rand(N, V, seed=1) * 2, 6, draws=draws, generator=generator, temperatures=(2.0,))


def split(world: int) -> list[int]:
    """Uneven shards that still cover V; a process of three may hold a single token."""
    return {1: [V], 2: [9, 14], 3: [1, 15, 7]}[world]


def part(full: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    sizes, rank = split(mesh.size()), mesh.get_local_rank()
    return full.narrow(dim, sum(sizes[:rank]), sizes[rank]).contiguous()


def close(found: Tensor, expected: Tensor, limit: float = 1e-9) -> None:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    difference = float((found.double() - expected.double()).norm())
    assert difference <= limit * (1e-3 + float(expected.double().norm())), (difference, found, expected)


def expect_error(text: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=text):
        call()
