"""One chunk of student logits: the only buffer of vocabulary width that a loss holds.

Row kernels read logits from it, normalise it in place and leave the gradient in it.

Shape suffixes: C rows of the chunk, R rows of a block, S rows that are sure of a token, E entries per row, V local
vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.losses.engine.vocab import VocabShard

# Elements of one float32 block: 1 MiB, half of a core's second-level cache on the CPUs measured.
BLOCK_ELEMENTS = 1 << 18
_OTHER_BLOCK_ELEMENTS = 1 << 22  # on devices where the number of calls counts for more than their cache

# float16 has no number below 3e-8: of more columns, those that vanish can hold more than its rounding of the largest.
_FLOAT16_COLUMNS = 1 << 13


def row_dtype(device: torch.device) -> torch.dtype:
    """Return the precision of numbers per row and per entry, of which there are few: float64 where the device has it.

    Differences of log-probabilities near 80 keep seven digits this way, whatever the precision of the logits.
    """
    return torch.float32 if device.type == "mps" else torch.float64


class LogitChunk:
    """Logits [C, V] in one flat piece of memory with a scratch cell behind the last.

    Slots that hold nothing, or an id that lives on another process, are sent to the scratch cell: entries can then be
    written with one flat index_put_ without a mask. (A flat index_put_ needs no memory beside its operands, where
    scatter_ doubles its tensor on CPU.)
    """

    def __init__(self, rows: int, shard: VocabShard, dtype: torch.dtype, device: torch.device) -> None:
        self.shard = shard
        self._memory = torch.empty(rows * shard.size + 1, dtype=dtype, device=device)
        self.use(rows)

    def use(self, rows: int) -> None:
        """Take the first `rows` rows of the memory as the chunk."""
        self.logits_CV = self._memory[: rows * self.shard.size].view(rows, self.shard.size)

    @property
    def row_dtype(self) -> torch.dtype:
        """The precision of numbers per row and per entry."""
        return row_dtype(self._memory.device)

    @property
    def block_dtype(self) -> torch.dtype:
        """The precision of arithmetic over the vocabulary: float32, or float64 for float64 logits."""
        return torch.promote_types(self._memory.dtype, torch.float32)

    def locate(self, ids_CE: Tensor, used_CE: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the flat cell of each id, and the mask of those that are local and used."""
        column_CE, here_CE = self.shard.local(ids_CE)
        if used_CE is not None:
            here_CE = here_CE & used_CE
        row_C1 = torch.arange(len(ids_CE), device=ids_CE.device).unsqueeze(-1) * self.shard.size
        return torch.where(here_CE, column_CE + row_C1, len(self._memory) - 1), here_CE

    def read(self, cell_CE: Tensor, here_CE: Tensor) -> Tensor:
        """Return the logits of those cells from whichever process holds them, 0 for unused slots."""
        return self.shard.sum(self.read_local(cell_CE, here_CE))

    def read_local(self, cell_CE: Tensor, here_CE: Tensor) -> Tensor:
        """Return the cells as they are here, without asking other processes; 0 elsewhere."""
        return self._memory[cell_CE].to(self.row_dtype).masked_fill_(~here_CE, 0.0)

    def write(self, cell_CE: Tensor, value_CE: Tensor | float) -> None:
        """Overwrite cells; several slots may share the scratch cell, any other only with equal values."""
        value = torch.as_tensor(value_CE, dtype=self._memory.dtype, device=self._memory.device)
        self._memory.index_put_((cell_CE.reshape(-1),), value.expand(cell_CE.shape).reshape(-1))


def softmax_(logits_CV: Tensor) -> Tensor:
    """Turn logits into probabilities over the local columns, in place, and return their logsumexp [C].

    The largest probability is exp(largest logit - logsumexp) and, being at least 1/V, never underflows. A row without
    any finite logit becomes zeros, with logsumexp -inf.
    """
    top_C, empty_C = _top(logits_CV)
    if logits_CV.shape[1] == 0:  # a shard of padding only has nothing to normalise
        return top_C
    torch.ops.aten._softmax.out(logits_CV, -1, False, out=logits_CV)
    lse_C = top_C - _settle_(logits_CV)
    if bool(empty_C.any()):  # the softmax of a row of -inf is NaN
        logits_CV.masked_fill_(empty_C.unsqueeze(-1), 0.0)
    return lse_C.masked_fill_(empty_C, -torch.inf)


def _settle_(p_CV: Tensor) -> Tensor:
    """Return the log of the largest probability of each row [C], from the others' sum where they have less than half.

    A probability near 1 holds few digits of its distance from 1, in bfloat16 none below 2^-9; the others have them all.
    Rows wider than half precision are divided by their sum, in place: on CPU torch adds up the V numbers of a softmax
    one by one, and is off by 1e-5 at V = 151,936 in float32.
    """
    top_C, dtype = _top(p_CV)[0], row_dtype(p_CV.device)
    log_top_C = top_C.log()
    rows = max(1, (BLOCK_ELEMENTS if p_CV.device.type == "cpu" else _OTHER_BLOCK_ELEMENTS) // p_CV.shape[1])
    if p_CV.dtype not in (torch.bfloat16, torch.float16):
        # Divide by the sum, and account for it in the largest.
        for start in range(0, len(p_CV), rows):
            p_RV = p_CV[start : start + rows]
            sum_R1 = p_RV.sum(-1, keepdim=True)
            p_RV.div_(sum_R1)
            log_top_C[start : start + rows] -= sum_R1.squeeze(-1).to(dtype).log()
    if p_CV.dtype == torch.float16 and p_CV.shape[1] > _FLOAT16_COLUMNS:
        # The others may have vanished: their sum says less than the largest itself.
        return log_top_C
    sure_S = (top_C > 0.5).nonzero().squeeze(-1)
    for start in range(0, len(sure_S), rows):
        p_RV = p_CV[sure_S[start : start + rows]]
        top_R, sum_R = _top(p_RV)[0], p_RV.sum(-1, dtype=dtype)
        log_top_C[sure_S[start : start + rows]] = torch.log1p((top_R - sum_R) / sum_R)
    return log_top_C


def normalise_(logits_CV: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Turn local logits into log-probabilities over the whole vocabulary, in place.

    Returns:
        The probabilities [C, V], and the rows' logsumexp [C], which is NaN for a row that rules out every token.
    """
    top_C = shard.max(_top(logits_CV)[0])
    # Differences to the largest logit are exact where they matter; logsumexp itself, near 80, would round them.
    logits_CV.sub_(top_C.unsqueeze(-1).to(logits_CV.dtype))
    q_CV = logits_CV.exp()
    sum_C = shard.sum(q_CV.sum(-1).to(top_C.dtype))
    q_CV.div_(sum_C.unsqueeze(-1).to(q_CV.dtype))
    lse_C = sum_C.log()
    logits_CV.sub_(lse_C.unsqueeze(-1).to(logits_CV.dtype))
    return q_CV, top_C + lse_C


def scale_logits_(logits_CV: Tensor, scale: float, shard: VocabShard) -> Tensor:
    """Multiply logits in place after taking off a row constant [C, 1], and return that.

    Differences to the largest logit are exact where they matter; scaling first would round large logits. Half
    precisions round either way and are only multiplied.
    """
    top_C = torch.zeros(len(logits_CV), dtype=row_dtype(logits_CV.device), device=logits_CV.device)
    if logits_CV.dtype in (torch.float32, torch.float64):
        # A row that rules out everything has no largest logit to take off.
        top_C = shard.max(_top(logits_CV)[0])
        top_C = top_C.masked_fill(top_C == -torch.inf, 0.0)
        logits_CV.sub_(top_C.unsqueeze(-1).to(logits_CV.dtype))
    logits_CV.mul_(scale)
    return top_C.unsqueeze(-1)


def ratio(log_part_C: Tensor, log_whole_C: Tensor) -> Tensor:
    """Return exp(part - whole), 0 where the part is empty."""
    return (log_part_C - log_whole_C).exp().masked_fill_(log_part_C == -torch.inf, 0.0)


def _top(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest value of each row [C], -inf without columns, and the mask of rows where it is -inf."""
    dtype = row_dtype(logits_CV.device)
    if logits_CV.shape[1] == 0:  # amax refuses rows without columns
        top_C = torch.full((len(logits_CV),), -torch.inf, dtype=dtype, device=logits_CV.device)
    else:
        top_C = logits_CV.amax(-1).to(dtype)
    return top_C, top_C == -torch.inf
