"""The processes of a training run: as many as the configuration says, started by torchrun, joined in one group.

gloo on the CPU, nccl on CUDA. The latter has never been run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from pipeline.config.train import TrainConfig
from pipeline.launchers import whole_number
from pipeline.runtime import signals_end_process
from stages.devices import dtype_name, resolve_device, resolve_dtype
from stages.parallel.processes import ALONE, DIMENSIONS, Processes, gather, is_peer_lost
from storage.errors import PeerLostError, UsageError

JOIN_TIMEOUT = timedelta(minutes=3)  # for a process that has not joined; torch may wait for it more than once


@contextmanager
def processes_of(config: TrainConfig) -> Iterator[Processes]:
    """Join the processes that torchrun started; one process is alone.

    Raises:
        UsageError: the environment does not let this process join the others, they have different configurations, there
            are more or fewer than `distributed` asks for, or they cannot share the device.
        PeerLostError: another process has ended, cannot be reached or has not joined; this one cannot go on.
    """
    found = whole_number("WORLD_SIZE", least=1)
    if found == 1:
        _mesh_sizes(config, found)
        yield ALONE
        return
    mesh: DeviceMesh | None = None
    try:
        _join(found)
        _require_same(
            config.model_dump(mode="json"),
            "the processes have different configurations",
            fix="give all of them the same configuration and the same --set",
        )
        sizes = _mesh_sizes(config, found)
        device = _own_device(config)
        own = {"device": device.type, "dtype": dtype_name(resolve_dtype(config.dtype, device))}
        if config.teacher_model is not None:
            own["teacher_model.dtype"] = dtype_name(resolve_dtype(config.teacher_model.dtype, device))
        _require_same(own, "auto is not the same everywhere", fix="set a device and a dtype that all processes have")
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=DIMENSIONS)
        yield Processes(mesh=mesh)
    except RuntimeError as error:
        if is_peer_lost(error):
            raise _peer_lost(
                error, fix="look for the error of that process; the same command goes on from the newest checkpoint"
            ) from error
        raise
    finally:
        _leave(mesh)


def _join(found: int) -> None:
    """Join the group. It speaks over gloo before any device is chosen, so that even that may differ."""
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        with signals_end_process():
            store, rank, count = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
            dist.init_process_group(backends, store=store, rank=rank, world_size=count, timeout=JOIN_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        address = ", ".join(f"{name} is {os.environ.get(name, 'not set')}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        if isinstance(error, RuntimeError) and is_peer_lost(error):
            raise _peer_lost(
                error,
                fix="look for the error of a process that has ended; if there is none, all processes need the same "
                f"MASTER_ADDR, MASTER_PORT and WORLD_SIZE and a RANK each (here {address})",
            ) from error
        raise UsageError(
            f"WORLD_SIZE is {found}, but this process cannot join the others: {_reason(error)} ({address})",
            where="environment",
            fix="start the processes with torchrun, or unset WORLD_SIZE to run one process; where you start them "
            "yourself, check MASTER_ADDR, MASTER_PORT, RANK and GLOO_SOCKET_IFNAME",
        ) from error
    # From here on a process may wait long for another one, which reads a corpus or writes a checkpoint.
    store.set_timeout(dist.default_pg_timeout)
    _set_pg_timeout(dist.default_pg_timeout)


def _leave(mesh: DeviceMesh | None) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    # torch keeps the mesh in caches, and with it the group, whose threads would run into the end of the interpreter
    # and abort it now and then (seen on a busy machine). Without the last reference they are joined here.
    getattr(mesh, "_pg_registry", {}).clear()


def _require_same(own: Mapping[str, Any], what: str, *, fix: str) -> None:
    """Raise UsageError, in every process, that names each field in which they differ."""
    everyones = gather(dict(own))
    differing: dict[str, str] = {}
    for key in own:
        ranks: dict[str, list[str]] = {}
        for rank, values in enumerate(everyones):
            ranks.setdefault(json.dumps(values[key], sort_keys=True), []).append(str(rank))
        if len(ranks) > 1:
            differing[key] = ", ".join(f"{value} on rank {' and '.join(held)}" for value, held in ranks.items())
    if differing:
        raise UsageError(
            f"{what}: {'; '.join(f'{key} is {found}' for key, found in differing.items())}",
            where=", ".join(differing),
            fix=fix,
        )


def _mesh_sizes(config: TrainConfig, found: int) -> tuple[int, int, int]:
    """Return the size of each of DIMENSIONS.

    Raises:
        UsageError: their product is not the number of processes found; it names the sizes that would fit.
    """
    wanted = config.distributed.tp  # the configuration admits no data parallelism
    if found != wanted:
        start = f"torchrun --nproc-per-node {wanted} -m pipeline train CONFIG"
        raise UsageError(
            f"distributed.tp is {wanted}, but there {'is 1 process' if found == 1 else f'are {found} processes'}",
            where="distributed.tp",
            fix=f"set distributed: {{tp: {found}}}, the only sizes that fit, or start with: "
            f"{start if wanted > 1 else 'pipeline train CONFIG, without torchrun'}",
        )
    return 1, 1, wanted


def _peer_lost(error: RuntimeError, *, fix: str) -> PeerLostError:
    return PeerLostError(
        f"another process of this run has ended or cannot be reached: {_reason(error).split('. ', 1)[0]}", fix=fix
    )


def _reason(error: Exception) -> str:
    """Return the error in one line, without gloo's source file."""
    return " ".join(str(error).split("] ", 1)[-1].split())


def _own_device(config: TrainConfig) -> torch.device:
    """Return the CPU, or the accelerator that torchrun means for this process."""
    device = resolve_device(config.device)
    if device.type == "mps" or ":" in str(device):
        raise UsageError(
            f"several processes cannot share device {str(device)!r}",
            where="device",
            fix="set device: auto, cuda or cpu; each process takes the accelerator of its LOCAL_RANK",
        )
    if device.type == "cuda":
        torch.cuda.set_device(whole_number("LOCAL_RANK"))
    return device
