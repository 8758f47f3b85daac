"""The processes of a run, which torchrun started, as a mesh with named dimensions; what only one of them may do.

The main process (global rank 0) owns the run directory. Errors of it are raised in every process; an error of any
other ends that process, and the others as soon as they need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from storage.errors import DistillError, IdentityError, PeerLostError

R = TypeVar("R")

DIMENSIONS = ("dp_replicate", "dp_shard", "tp")  # of the mesh, the slowest first: ranks of one tp are neighbours

_LOST = (
    "broken pipe",
    "connection closed",
    "connection refused",
    "connection reset",
    "connection was likely closed",
    "remote process exit",
    "timed out",
    "timeout",
)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that share the training of one student.

    Attributes:
        mesh: with the dimensions DIMENSIONS; None: this process is alone.
    """

    mesh: DeviceMesh | None = None

    @property
    def main(self) -> bool:
        """Whether this process owns the run directory: it has global rank 0."""
        return self.mesh is None or dist.get_rank() == 0

    @property
    def dp_size(self) -> int:
        """Number of shares into which the data of a step is dealt."""
        return 1 if self.mesh is None else self.mesh["dp_replicate"].size() * self.mesh["dp_shard"].size()

    @property
    def dp_rank(self) -> int:
        """Number of the share that this process takes, 0 <= dp_rank < dp_size."""
        if self.mesh is None:
            return 0
        replica, shard = (self.mesh.get_local_rank(name) for name in ("dp_replicate", "dp_shard"))
        return replica * self.mesh["dp_shard"].size() + shard

    @property
    def tp(self) -> DeviceMesh | None:
        """The processes among which models are cut, as a mesh of the one dimension `tp`; None: nothing is cut."""
        return None if self.mesh is None or self.mesh["tp"].size() == 1 else self.mesh["tp"]

    def on_main(self, function: Callable[[], R]) -> R:
        """Call `function` in the main process alone; every process gets its result, or its error.

        Args:
            function: without collective operations; its result can be pickled.

        Raises:
            DistillError: that the call raised, in every process. Any other error is raised as it is in the main
                process and told as a `DistillError` elsewhere; an interruption is a `PeerLostError` there.
        """
        if self.mesh is None:
            return function()
        message: list[Any] = [None, None]
        error: BaseException | None = None
        if self.main:
            try:
                message[0] = function()
            except BaseException as caught:  # passed on, then raised below
                error = caught
                message[1] = _told(caught)
        try:
            dist.broadcast_object_list(message, src=0)
        finally:
            if error is not None:
                raise error  # also where the others cannot be told any more
        if message[1] is not None:
            raise message[1]
        result: R = message[0]
        return result

    @contextmanager
    def main_holds(self, resource: AbstractContextManager[None]) -> Iterator[None]:
        """Hold a resource in the main process alone. Every process raises the error of taking it, as `on_main` does."""
        with ExitStack() as held:
            self.on_main(lambda: held.enter_context(resource))
            yield

    def require_same(self, value: str, what: str) -> None:
        """Raise IdentityError where the processes do not hold the same value of `what`."""
        if self.mesh is None:
            return
        values = gather(value)
        if len(set(values)) > 1:
            found = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise IdentityError(
                f"the processes differ in {what}: {found}", fix="give all of them the same files and the same versions"
            )


def gather(value: R) -> list[R]:
    """Return what each process of the run gives, by global rank. Every process calls; the value can be pickled."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_peer_lost(error: RuntimeError) -> bool:
    """Tell whether this error of a collective operation says that another process has ended or cannot be reached.

    torch has classes for its store and for nccl, which hold wrong setups and wrong calls too: there the words decide.
    What gloo throws is a plain RuntimeError that names its source file; where it says `enforce fail`, the processes do
    not agree in what they send, which is a bug.
    """
    text = str(error).lower()
    if isinstance(error, dist.DistError):
        return any(words in text for words in _LOST)
    return "gloo/transport" in text and "enforce fail" not in text


def _told(error: BaseException) -> DistillError:
    """Return what the other processes raise when the main one raises `error`."""
    if isinstance(error, DistillError):
        return error
    if isinstance(error, Exception):
        return DistillError(f"rank 0: {error!r}")
    return PeerLostError(  # KeyboardInterrupt, which is SIGTERM too, or SystemExit
        f"another process of this run has ended: rank 0 was interrupted ({type(error).__name__})",
        fix="the same command goes on from the newest checkpoint",
    )


ALONE = Processes()
