"""Mutants by file: the faults that the tests are known to notice. The next fault of a kind joins the list.

To add one: write down the text, which stands in its file once, what a hand could have made of it, and the test that
fails then (`make mutants` says whether it does). Equivalent changes, which no test can notice, do not belong here.
"""

from __future__ import annotations

from mutation import Mutant

from mutants import pipeline, stages, storage

MUTANTS: dict[str, list[Mutant]] = storage.MUTANTS | stages.MUTANTS | pipeline.MUTANTS
