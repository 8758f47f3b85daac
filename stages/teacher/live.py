"""A frozen teacher that reads the same packed micro-batches as the student, in place of stored rows.

Data path: packed micro-batch -> **teacher's hidden states and head** -> loss, which makes its logits chunk by chunk.

The body runs in the configured dtype, the head in float32, as in phase 1: low-precision logits move probabilities by up
to 11%.

Shape suffixes: N target rows, D hidden width of the teacher, V real tokens (or, cut between processes, rows of the
student's head).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from stages.batches.microbatch import MicroBatch
from stages.input_files import FileState
from stages.losses import TeacherHead
from stages.models.files import ModelDirectory
from stages.models.head import HeadRule
from stages.models.packed import PackLengths, packed_hidden, use_packed_attention
from stages.models.probe import body_of, length_borders
from stages.parallel.tensor_parallel import cut_model, cut_rows
from stages.teacher.backend import CandidateTeacher, Loader
from stages.teacher.hf import HFTeacher


@dataclass(frozen=True, kw_only=True, eq=False)
class LiveTeacher:
    """A loaded teacher.

    Attributes:
        body: the model without its head, without gradients or dropout, weights in the dtype of its forward.
        weight_VD, bias_V: its head in float32, padding cut off.
        rule: what it does to its logits.
        parameters: number of weights of the whole model.
        files: as they were when they were hashed. Torch may map weights from them, which then change with the files.
    """

    body: PreTrainedModel
    weight_VD: Tensor
    bias_V: Tensor | None
    rule: HeadRule
    parameters: int
    files: tuple[FileState, ...] = ()

    @classmethod
    def load(
        cls,
        files: ModelDirectory,
        *,
        vocab_size: int,
        device: torch.device,
        dtype: torch.dtype,
        attention: str,
        load: Loader = HFTeacher.load,
        key: str = "teacher_model",
        lengths: PackLengths | None = None,
    ) -> LiveTeacher:
        """Load the weights, and prove that its head is understood and that it keeps packed sequences apart.

        Args: as `HFTeacher.load`, `load` of a backend that gives hidden states, and `lengths` of what it will read.

        Raises:
            UsageError, NumericsError, OutOfSpaceError: as `HFTeacher.load`; or it mixes packed sequences.
        """
        loaded = load(files, vocab_size=vocab_size, device=device, dtype=dtype, attention=attention, key=key)
        assert not isinstance(loaded, CandidateTeacher), "callers ask for a backend that gives hidden states"
        where = f"{key}.attention"
        use_packed_attention(loaded.model, attention, lengths=lengths, role="teacher", key=where, known_causal=True)
        return cls(
            body=body_of(loaded.model),
            weight_VD=loaded.head.weight_VD,
            bias_V=loaded.head.bias_V,
            rule=loaded.head.rule,
            parameters=loaded.model.num_parameters(),
        )

    @property
    def length_borders(self) -> tuple[int, ...]:
        """Lengths whose two sides never share a forward."""
        return length_borders(self.body.config)

    def cut(self, tp: DeviceMesh, rows: int) -> LiveTeacher:
        """Keep this process's part: of the body, and of the head where a student's head of `rows` rows is cut.

        Raises:
            UsageError: the architecture cannot be cut between so many processes.
        """
        cut_model(self.body, tp, role="teacher")
        bias_V = None if self.bias_V is None else cut_rows(self.bias_V, rows, tp)
        return replace(self, weight_VD=cut_rows(self.weight_VD, rows, tp), bias_V=bias_V)

    @torch.no_grad()
    def rows(self, batch: MicroBatch) -> TeacherHead:
        """Return the teacher at the target rows of a micro-batch, which lies on the teacher's device."""
        return TeacherHead(
            hidden_ND=packed_hidden(self.body, batch).float(),
            weight_VD=self.weight_VD,
            bias_V=self.bias_V,
            softcap=self.rule.softcap,
            logit_multiplier=self.rule.logit_multiplier,
        )
