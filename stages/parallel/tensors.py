"""Tensors of a model that may be cut between processes: whole again, back in parts, clipped, checked.

Every function here is a plain one on tensors that are not cut. On those that are, all processes must call it alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

CUT_NORM_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


def whole(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Return the tensors whole, on the CPU those that were cut; names that share memory still do.

    Args:
        tensors: by name.
        keep: False in processes that take part but need nothing: an empty dictionary.
    """
    gathered: dict[tuple[int, int], Tensor] = {}
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            part = tensor.to_local()
            # Not its address, which is 0 for every empty part: all processes must find the same names to be one.
            memory = part.untyped_storage()._cdata, int(part.storage_offset())
            if memory not in gathered:
                full = tensor.full_tensor()
                gathered[memory] = full.cpu() if keep else full.new_empty(0)
            tensor = gathered[memory]
        if keep:
            kept[name] = tensor
    return kept


def like(full: Tensor, model: Tensor) -> Tensor:
    """Return `full` on the device of `model`, cut as that is cut if the shapes agree."""
    full = full.to(model.device)
    if not isinstance(model, DTensor) or full.shape != model.shape:
        return full
    return distribute_tensor(full, model.device_mesh, model.placements, src_data_rank=None)


def local_size(tensor: Tensor) -> int:
    """Return the number of elements that this process holds."""
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Tell whether all parts of it are free of NaN and infinity."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    wrong = (~local.isfinite()).any().to(torch.int32)
    if isinstance(tensor, DTensor):
        for dimension in range(tensor.device_mesh.ndim):
            dist.all_reduce(wrong, group=tensor.device_mesh.get_group(dimension))
    return not bool(wrong)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, riders: Tensor | None = None) -> float:
    """Scale all gradients together such that their norm is at most `limit`, and return the norm that they had.

    A norm that is not finite is returned as it is.

    Args:
        parameters: with their gradients.
        limit: of the norm.
        riders: float32 [N], summed in place over the processes, in the same reduction as the norm.
    """
    chosen = [parameter for parameter in parameters if parameter.grad is not None]
    cut = [parameter.grad for parameter in chosen if isinstance(parameter.grad, DTensor)]
    if not cut:
        return float(torch.nn.utils.clip_grad_norm_(chosen, limit))
    shared = [gradient.to_local() for gradient in cut if any(placement.is_shard() for placement in gradient.placements)]
    copied = [
        gradient.to_local() for gradient in cut if all(placement.is_replicate() for placement in gradient.placements)
    ]
    copied += [parameter.grad for parameter in chosen if not isinstance(parameter.grad, DTensor)]  # type: ignore[misc]
    squared = _norm(shared).square()
    summed = squared.reshape(1) if riders is None else torch.cat([squared.reshape(1), riders])
    dist.all_reduce(summed, group=cut[0].device_mesh.get_group("tp"))
    if riders is not None:
        riders.copy_(summed[1:])
    norm = float((summed[0] + _norm(copied).square()).sqrt())
    factor = min(1.0, limit / (norm + CUT_NORM_EPS)) if math.isfinite(norm) else 1.0
    if factor < 1.0:
        torch._foreach_mul_([*shared, *copied], factor)
    return norm


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors) if tensors else torch.zeros(())
