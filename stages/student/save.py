"""RUN/model: a plain Hugging Face directory, so that a student is used without this product.

Data path: trained student -> **model directory** with weights, configuration, the store's tokenizer and a model card.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from stages.durable import durable_directory
from stages.models.files import quiet
from stages.parallel.processes import ALONE, Processes
from stages.parallel.tensors import whole
from stages.student.identity import write_tokenizer
from stages.student.padding import names_of


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the model card says.

    Attributes:
        teacher: its name, as the store records it.
        store_digest: of the store that the student learned from; without a store, of corpus and live teacher.
        store_id: of the plan; None: it learned from a live teacher.
        initialisation: where the first weights came from.
        loss: in words, such as `0.7 * KDLoss(divergence=forward_kl) + 0.3 * cross-entropy`.
        parameters: number of weights.
        steps: optimizer steps.
        tokens: tokens trained on.
    """

    teacher: str
    store_digest: str
    store_id: str | None
    initialisation: str
    loss: str
    parameters: int
    steps: int
    tokens: int


def save_student(
    model: PreTrainedModel,
    directory: Path,
    *,
    weights: dict[str, Tensor] | None = None,
    tokenizer_files: Mapping[str, bytes],
    facts: CardFacts,
    processes: Processes = ALONE,
) -> None:
    """Write the model directory whole and durably, in place of an older one.

    Args:
        directory: RUN/model.
        weights: what `weights_to_save` returns; None: the model's, as they are.
        tokenizer_files: the store's tokenizer files by name.
        facts: for the model card.
        processes: that share the model; all of them call, the main one writes.
    """
    if weights is None:
        weights = whole(model.state_dict(), keep=processes.main)
    embeddings: Any = model.get_input_embeddings()
    name = names_of(model, embeddings.weight)[0]

    def write() -> None:
        with durable_directory(directory) as temporary:
            rows = len(weights[name])
            with quiet():
                model.save_pretrained(temporary, state_dict=weights)  # empties the dictionary
            if rows < len(embeddings.weight):  # padding was cut off
                config = copy.deepcopy(model.config)
                config.get_text_config().vocab_size = rows
                config.save_pretrained(temporary)
            write_tokenizer(tokenizer_files, temporary)
            (temporary / "README.md").write_text(model_card(facts), encoding="utf-8")

    processes.on_main(write)


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md. It holds nothing that changes from one equal run to the next."""
    if facts.store_id is None:
        means = "the live teacher's next-token distributions over its whole vocabulary"
        data = f"corpus and teacher | digest `{facts.store_digest}`"
    else:
        means = "a store of the teacher's sparse next-token distributions"
        data = f"store | id `{facts.store_id}`, digest `{facts.store_digest}`"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- knowledge-distillation
- topk-distill
---

# A student distilled from {facts.teacher}

Trained with topk-distill from {means}.

| | |
|---|---|
| teacher | {facts.teacher} |
| {data} |
| initialisation | {facts.initialisation} |
| loss | {facts.loss} |
| parameters | {facts.parameters:,} |
| steps | {facts.steps:,} ({facts.tokens:,} tokens) |

Its licence and its limits follow from the teacher's and from those of the corpus.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```
"""
