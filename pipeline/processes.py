"""The processes of a training run: as many as the configuration says, started by torchrun, joined in one group.

gloo on the CPU, nccl on CUDA. The latter has never been run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from pipeline.config.train import TrainConfig
from stages.devices import resolve_device
from stages.parallel.processes import ALONE, Processes
from storage.errors import UsageError

_PEER_LOST = ("peer", "connection", "socket")  # how gloo words it, in lower case


@contextmanager
def processes_of(config: TrainConfig) -> Iterator[Processes]:
    """Join the processes that torchrun started; one process is alone.

    Raises:
        UsageError: there are more or fewer than `distributed` asks for, or the device cannot be shared.
        KeyboardInterrupt: another process has ended, which tells why; this one cannot go on.
    """
    wanted, found = config.distributed.tp, int(os.environ.get("WORLD_SIZE", "1"))
    if found != wanted:
        raise UsageError(
            f"distributed.tp is {wanted}, but there {'is 1 process' if found == 1 else f'are {found} processes'}",
            where="distributed.tp",
            fix=f"start them with: torchrun --nproc-per-node {wanted} -m pipeline train CONFIG"
            if wanted > 1
            else f"set distributed: {{tp: {found}}}, or run pipeline train CONFIG without torchrun",
        )
    if wanted == 1:
        yield ALONE
        return
    device = _own_device(config)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (wanted,), mesh_dim_names=("tp",))
    try:
        yield Processes(mesh=mesh)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _PEER_LOST):
            raise KeyboardInterrupt("another process of this run has ended") from error
        raise
    finally:
        dist.destroy_process_group()
        # torch keeps the mesh in caches, and with it the group, whose threads would run into the end of the interpreter
        # and abort it now and then (seen on a busy machine). Without the last reference they are joined here.
        getattr(mesh, "_pg_registry", {}).clear()


def _own_device(config: TrainConfig) -> torch.device:
    """The CPU, or the accelerator that torchrun means for this process."""
    device = resolve_device(config.device)
    if device.type == "mps" or ":" in str(device):
        raise UsageError(
            f"several processes cannot share device {str(device)!r}",
            where="device",
            fix="set device: auto, cuda or cpu; each process takes the accelerator of its LOCAL_RANK",
        )
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return device
