"""How much memory training takes, estimated from sizes before anything is run."""

from __future__ import annotations

from stages.parallel.tensors import local_size
from stages.student.model import Student
from stages.teacher.live import LiveTeacher
from stages.training.step import Learner


def memory_bytes(learner: Learner, tokens_per_batch: int, chunk_size: int) -> int:
    """Return the bytes that training takes in this process, for student and live teacher. The interpreter and its
    libraries come on top.

    Args:
        tokens_per_batch: tokens of a micro-batch.
        chunk_size: rows of logits held at once.
    """
    teacher = 0 if learner.teacher is None else _teacher_bytes(learner.teacher, tokens_per_batch, chunk_size)
    return _student_bytes(learner.student, tokens_per_batch, chunk_size) + teacher


def _student_bytes(student: Student, tokens_per_batch: int, chunk_size: int) -> int:
    """Add up the four float32 copies of the weights (weight, gradient, two moments), what one micro-batch keeps for
    backward, and one chunk of logits with the head's gradient."""
    config = student.model.config.get_text_config()
    width = student.dtype.itemsize
    hidden: int = config.hidden_size
    inner: int = getattr(config, "intermediate_size", None) or 4 * hidden
    # Per token and layer, about: two norms and the residual in float32 with their results; query, key, value and
    # attention output; gate, up, their product and its input in the forward's dtype.
    kept: int = config.num_hidden_layers * (10 * hidden * 4 + (4 * hidden + 4 * inner) * width)
    head = student.weight_VD
    rows = local_size(head) // head.shape[1]
    chunk = chunk_size * rows * width
    weights = sum(local_size(parameter) for parameter in student.model.parameters())
    # The head in the forward's dtype, its gradient, and that of the embeddings before the two are added up.
    return 16 * weights + tokens_per_batch * kept + chunk + local_size(head) * (width + 4 + 4)


def _teacher_bytes(teacher: LiveTeacher, tokens_per_batch: int, chunk_size: int) -> int:
    """Add up the weights, the head in float32 unless it is the weight itself, one layer's activations, the hidden
    states in both precisions, and one chunk of float32 logits."""
    config, dtype, parameters = teacher.body.config.get_text_config(), teacher.body.dtype, [*teacher.body.parameters()]
    weights = sum(local_size(parameter) for parameter in parameters) * dtype.itemsize
    own_head = not any(teacher.weight_VD.data_ptr() == parameter.data_ptr() for parameter in parameters)
    hidden: int = config.hidden_size
    inner: int = getattr(config, "intermediate_size", None) or 4 * hidden
    kept = (8 * hidden + 3 * inner) * dtype.itemsize + 4 * hidden
    head = local_size(teacher.weight_VD)
    return weights + own_head * 4 * head + tokens_per_batch * kept + chunk_size * head // teacher.weight_VD.shape[1] * 4
