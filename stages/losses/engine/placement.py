"""DTensors as the losses take them: whole on every process, or cut by vocabulary over one dimension of their mesh.

A loss is that of the whole tensor, whatever its placements. Parts of rows or of the inner width are exchanged for parts
of the vocabulary, which are no larger, and partial sums are added up into such parts. (gloo cannot exchange: on CPUs
torch gathers the parts on the way.) Autograd brings the gradient back in kind.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard


def by_vocabulary(tensor: Tensor, dim: int, what: str) -> Tensor:
    """Return the tensor, cut in dimension `dim` if it was cut in another or held as partial sums.

    Args:
        tensor: a plain one is returned as it is.
        dim: its vocabulary dimension.
        what: how errors name it.

    Raises:
        ValueError: it is cut over more than one dimension of its mesh.
    """
    at = _cut_dimension(tensor, what)
    if at is None or vocab_group(tensor, dim) is not None:
        return tensor
    assert isinstance(tensor, DTensor)
    placements: list[Placement] = [Replicate()] * tensor.device_mesh.ndim
    placements[at] = Shard(dim % tensor.ndim)
    return tensor.redistribute(placements=placements)


def cut_group(tensor: Tensor, what: str) -> dist.ProcessGroup | None:
    """Return the processes that hold parts of a DTensor, of whatever kind; None: each holds all of it.

    Raises:
        ValueError: it is cut over more than one dimension of its mesh.
    """
    at = _cut_dimension(tensor, what)
    return tensor.device_mesh.get_group(at) if at is not None and isinstance(tensor, DTensor) else None


def vocab_group(tensor: Tensor, dim: int) -> dist.ProcessGroup | None:
    """Return the process group over which a DTensor is sharded in its vocabulary dimension; None: it is not."""
    for at in _cut_dimensions(tensor):
        assert isinstance(tensor, DTensor)
        if tensor.placements[at] == Shard(dim % tensor.ndim):
            return tensor.device_mesh.get_group(at)
    return None


def is_placed(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, which says itself how it lies on its processes."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return the local tensor of a DTensor, differentiably; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def replicated(tensor: Tensor) -> Tensor:
    """Return the whole tensor; a DTensor is gathered, and every process must bring its whole gradient."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = [Replicate()] * tensor.device_mesh.ndim
    return tensor.redistribute(placements=whole).to_local(grad_placements=whole)


def placed(tensor: Tensor) -> str:
    """Say how a tensor lies on its processes, for messages."""
    if not isinstance(tensor, DTensor):
        return "a plain tensor"
    return f"a DTensor with placements {list(tensor.placements)}"


def _cut_dimension(tensor: Tensor, what: str) -> int | None:
    found = _cut_dimensions(tensor)
    if len(found) > 1:
        raise ValueError(
            f"{what} is {placed(tensor)}, cut over {len(found)} dimensions of its mesh; a loss takes one. Give each "
            "process of the data-parallel dimension its own rows, and num_batch_labels for all of them; use a head "
            "that FSDP has sharded inside the wrapped module's forward"
        )
    return found[0] if found else None


def _cut_dimensions(tensor: Tensor) -> list[int]:
    """Return the dimensions of a DTensor's mesh whose processes do not all hold the same; none of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return []
    return [
        at
        for at, placement in enumerate(tensor.placements)
        if not placement.is_replicate() and tensor.device_mesh.size(at) > 1
    ]
