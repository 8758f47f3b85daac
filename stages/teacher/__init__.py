"""Teachers: backends that turn token ids into hidden states and logits, or into finished rows.

Data path: batch of TokenWindows -> **hidden states -> logits** -> target rows.

To add a backend: write a file with a class that satisfies `HiddenStateTeacher` or `CandidateTeacher` of backend.py, and
list its `load` in `BACKENDS`. Configuration, schema and tests read the table. It is here without a model library, which
a configuration must not load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from stages.teacher.backend import Loader


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to run a teacher.

    Attributes:
        about: what it runs, for the documentation of `teacher.backend`.
        loader: `module:function` that loads a model.
        hidden_states: whether it gives hidden states and a head, which serve every kind of target, live teachers and
            evaluation. Else it gives finished rows of its most probable tokens, for kinds that ask for no more.
    """

    about: str
    loader: str
    hidden_states: bool

    def load(self) -> Loader:
        """Return the function that `loader` names."""
        return cast("Loader", resolve_name(self.loader))


BACKENDS: Mapping[str, Backend] = {
    "hf": Backend(
        about="a Hugging Face causal language model, for every kind of target, live and evaluated",
        loader="stages.teacher.hf:HFTeacher.load",
        hidden_states=True,
    ),
}
REFERENCE = "hf"  # what students run with, and what every other backend is compared with
