"""How much memory training takes, estimated from sizes before anything is run."""

from __future__ import annotations

from stages.student.model import Student


def memory_bytes(student: Student, tokens_per_batch: int, chunk_size: int) -> int:
    """Bytes of the four float32 copies of the weights (weight, gradient, two moments), of what one micro-batch keeps
    for backward, and of one chunk of logits with the head's gradient. The interpreter and its libraries come on top.

    Args:
        student: the model.
        tokens_per_batch: tokens of a micro-batch.
        chunk_size: rows of logits held at once.
    """
    config = student.model.config.get_text_config()
    width = student.dtype.itemsize
    hidden: int = config.hidden_size
    inner: int = getattr(config, "intermediate_size", None) or 4 * hidden
    # Per token and layer, about: two norms and the residual in float32 with their results; query, key, value and
    # attention output; gate, up, their product and its input in the forward's dtype.
    kept: int = config.num_hidden_layers * (10 * hidden * 4 + (4 * hidden + 4 * inner) * width)
    head = student.weight_VD
    chunk = chunk_size * head.shape[0] * width
    # The head in the forward's dtype, its gradient, and that of the embeddings before the two are added up.
    return 16 * student.parameters + tokens_per_batch * kept + chunk + head.numel() * (width + 4 + 4)
