"""Which part of the vocabulary this process holds, and the reductions over those who hold the rest.

Losses never differentiate through a collective: they reduce row sums without gradient and write the closed-form
local gradient. A single process is the case where nothing needs reducing.

Shape suffixes: C rows, E entries per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stages.losses.engine.placement import by_vocabulary, cut_group, local_part, placed


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """The contiguous range of token ids whose logits are local.

    Attributes:
        start: first local id.
        size: number of local ids, real tokens only.
        columns: local columns, padding included.
        total: number of real tokens over all processes.
        width: columns over all processes, padding included.
        widest: columns of the widest shard: what must be the same everywhere may depend on it.
        declared: whether the number of real tokens was given, so that other widths are padding.
        group: the processes that hold the other ranges; None when this process holds them all.
    """

    start: int
    size: int
    columns: int
    total: int
    width: int
    widest: int
    declared: bool
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(
        cls, columns: int, labels_N: Tensor, *, group: dist.ProcessGroup | None, vocab_size: int | None
    ) -> VocabShard:
        """Describe `columns` local logit columns.

        Shards lie in rank order and may be uneven; their sizes are gathered once. Columns at or beyond `vocab_size`
        (the real tokens) are padding of the head and count for nothing.

        Raises:
            ValueError: vocab_size beyond the columns, or a group whose processes hold different labels.
        """
        sizes, rank = [columns], 0
        if group is not None:
            rank = dist.get_rank(group)
            sizes = _gather_sizes(columns, labels_N, group=group)
        start, width = sum(sizes[:rank]), sum(sizes)
        total = width if vocab_size is None else vocab_size
        if total > width:
            raise ValueError(f"vocab_size is {total}, but the logits have only {width} columns")
        return cls(
            start=start,
            size=max(0, min(columns, total - start)),
            columns=columns,
            total=total,
            width=width,
            widest=max(sizes),
            declared=vocab_size is not None,
            group=group,
        )

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the group, in place where there is one."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def max(self, value: Tensor) -> Tensor:
        """Take the maximum over the group, in place where there is one."""
        if self.group is not None:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value

    def logsumexp(self, value_C: Tensor) -> Tensor:
        """Return log of the sum of exp(value) over the group; -inf where every part is -inf."""
        if self.group is None:
            return value_C
        top_C = self.max(value_C.clone())
        top_C = top_C.masked_fill(top_C == -torch.inf, 0.0)
        return top_C + self.sum((value_C - top_C).exp()).log()

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the local column of each id, 0 where it is elsewhere, and the mask of ids that are local."""
        column = ids - self.start
        here = (column >= 0) & (column < self.size)
        return column.masked_fill(~here, 0), here

    def slice_of(self, full: Tensor, what: str) -> Tensor:
        """Return the local part of a teacher's vocabulary axis (the last), given whole or already sharded.

        Args:
            full: [*, V] or [*, columns]; a DTensor must be cut over the processes that the student is cut over.
            what: how errors name it.

        Raises:
            ValueError: a vocabulary that fits neither, or a teacher that is cut where the student is not.
        """
        group = cut_group(full, what)
        if group is not None and _members(group) != _members(self.group):
            student = "whole on every process" if self.group is None else "cut over other processes"
            raise ValueError(
                f"{what} is {placed(full)}, the student's vocabulary is {student}; cut both alike, or give "
                f"{what} whole, by full_tensor()"
            )
        full = local_part(by_vocabulary(full, -1, what))
        width = full.shape[-1]
        if width == self.columns:
            return full[..., : self.size]
        if group is not None:
            raise ValueError(
                f"{what} has {width} vocabulary columns here, the student has {self.columns}; both must be cut at the "
                f"same tokens: distribute both at the same width, or give {what} whole, by full_tensor()"
            )
        if width == self.width or (self.declared and width >= self.total):
            return full[..., self.start : self.start + self.size]
        raise ValueError(
            f"{what} has {width} vocabulary columns, the student has {self.columns}; if both share a vocabulary "
            "and differ in padding only, give vocab_size, the number of real tokens; others cannot be compared"
        )


def _gather_sizes(columns: int, labels_N: Tensor, *, group: dist.ProcessGroup) -> list[int]:
    """Return the columns of each process, after making sure that all hold the same rows."""
    rank = dist.get_rank(group)
    position_N = torch.arange(1, len(labels_N) + 1, device=labels_N.device)
    gathered = torch.zeros(dist.get_world_size(group), 2, dtype=torch.int64, device=labels_N.device)
    gathered[rank, 0], gathered[rank, 1] = columns, (labels_N * position_N).sum() + len(labels_N)
    dist.all_reduce(gathered, group=group)
    if bool((gathered[:, 1] != gathered[rank, 1]).any()):
        raise ValueError(
            "the processes that share this vocabulary hold different labels. Tensor parallelism needs the same rows "
            "on all of them; a head that FSDP has sharded must be used inside the wrapped module's forward"
        )
    sizes: list[int] = gathered[:, 0].tolist()
    return sizes


def _members(group: dist.ProcessGroup | None) -> list[int]:
    """Return the ranks of a group in its order; none without."""
    return [] if group is None else dist.get_process_group_ranks(group)


def check_vocab_size(vocab_size: int | None) -> None:
    """Raise ValueError unless it is a number of tokens, or None where every column is one."""
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}, expected at least 1 token, or None where no column is padding")
