"""How a loss is computed: chunk by chunk, by kernels that leave the gradient where the logits were.

Reading order: call.py (one call over all tokens), chunk.py (one piece of its logits), kernel.py (what a kernel is),
then sparse.py (stored rows), dense.py (full vocabulary) and objective.py (which divergence, of what).
"""
