"""The processes of a run, which torchrun started, and what only one of them may do.

The main process (rank 0) owns the run directory. Errors of it are raised in every process; an error of any other ends
that process, upon which torchrun ends all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from storage.errors import DistillError, IdentityError

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that share one student, in one dimension.

    Attributes:
        mesh: of tensor parallelism; None: this process is alone.
    """

    mesh: DeviceMesh | None = None

    @property
    def main(self) -> bool:
        """Whether this process owns the run directory."""
        return self.mesh is None or self.mesh.get_local_rank() == 0

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.mesh is None else self.mesh.size()

    def on_main(self, function: Callable[[], R]) -> R:
        """Call `function` in the main process alone; every process gets its result, or its error.

        Args:
            function: without collective operations; its result can be pickled.

        Raises:
            DistillError: that the call raised, in every process. Any other error is raised as it is in the main
                process and told as a `DistillError` elsewhere.
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
                message[1] = caught if isinstance(caught, DistillError) else DistillError(f"rank 0: {caught!r}")
        dist.broadcast_object_list(message, group=self.mesh.get_group(), group_src=0)
        if error is not None:
            raise error
        if message[1] is not None:
            raise message[1]
        result: R = message[0]
        return result

    def require_same(self, value: str, what: str) -> None:
        """Raise IdentityError where the processes do not hold the same value of `what`."""
        if self.mesh is None:
            return
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.mesh.get_group())
        if len(set(values)) > 1:
            found = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise IdentityError(
                f"the processes differ in {what}: {found}", fix="give all of them the same files and the same versions"
            )


ALONE = Processes()
