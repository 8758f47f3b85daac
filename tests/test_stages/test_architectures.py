"""Packed rows and padded batches give what a sequence gives alone, or the model is refused, whatever its kind."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
import torture_results
from architectures import NAMES, Case, cases, verdict
from transformers.utils import logging

from stages.models.packed import PACKED_SDPA, PackLengths, use_packed_attention
from storage.errors import UsageError

# One of each kind: plain; local attention by a window that is handed over, by one that is not, and by chunks; positions
# scaled in two sets and by every length; not causal, under each attention; and a head with a layer before it.
QUICK = [
    ("llama", "plain", "student", "sdpa", "right"),
    ("qwen2", "plain", "student", "sdpa", "right"),
    ("phimoe", "plain", "student", "sdpa", "right"),
    ("llama4", "plain", "student", "sdpa", "right"),
    ("llama4", "plain", "teacher", "sdpa", "right"),
    ("phi3", "longrope", "student", "sdpa", "right"),
    ("phi3", "longrope", "teacher", "eager", "right"),
    ("llama", "dynamic", "student", "sdpa", "refused"),
    ("llama", "dynamic", "teacher", "sdpa", "refused"),
    ("bert-generation", "plain", "student", "sdpa", "refused"),
    ("bert-generation", "plain", "teacher", "sdpa", "refused"),
    ("xlnet", "plain", "teacher", "eager", "refused"),
    ("cpmant", "plain", "teacher", "eager", "refused"),
    ("bert", "decoder", "student", "sdpa", "refused"),
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "variant", "role", "attention", "expected"), QUICK)
def test_one_of_each_kind(name: str, variant: str, role: str, attention: str, expected: str) -> None:
    assert verdict(Case(name=name, variant=variant).model(), role, attention) == expected


@pytest.mark.parametrize(
    ("name", "attention"), [("qwen2", PACKED_SDPA), ("phi3", PACKED_SDPA), ("phimoe", "sdpa"), ("llama4", "sdpa")]
)
def test_windows_that_are_not_handed_over_stay_with_the_mask(name: str, attention: str) -> None:
    model = Case(name=name).model()
    use_packed_attention(model, "sdpa", lengths=PackLengths(longest=60, tokens_per_batch=120))
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case(name="bert-generation"), r"see the tokens after them \(hidden states change by .*is_decoder: true"),
        (Case(name="llama", variant="dynamic"), r"beside one of 60 tokens than beside one of 9 .*window within"),
    ],
    ids=str,
)
def test_a_refusal_says_what_and_why(case: Case, words: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){words}"):
        use_packed_attention(case.model(), "sdpa", lengths=PackLengths(longest=60, tokens_per_batch=120))


@torch.no_grad()
@pytest.mark.torture
@pytest.mark.filterwarnings("ignore")
def test_every_architecture() -> None:
    """Build each causal language model of transformers tiny, in each state, as teacher and student, sdpa and eager."""
    started = time.perf_counter()
    verdicts: Counter[str] = Counter()
    built: set[str] = set()
    not_built: dict[str, str] = {}
    wrong: list[str] = []
    for name in NAMES:
        try:
            states = list(cases(name))
        except Exception as error:  # transformers' own defaults do not make a text model
            not_built[name] = str(error)
            continue
        for case in states:
            try:
                case.model()
            except Exception as error:  # an architecture's own checks of a tiny size raise whatever they like
                not_built[str(case)] = str(error)
                continue
            built.add(name)
            for role in ("teacher", "student"):
                for attention in ("sdpa", "eager"):
                    found = verdict(case.model(), role, attention)
                    verdicts[f"{role}_{found}"] += 1
                    if found == "wrong":
                        wrong.append(f"{case}, {role}, {attention}")
    torture_results.save(
        "architectures, packed and padded as alone",
        started=started,
        architectures=len(NAMES),
        architectures_built=len(built),
        states_not_built=len(not_built),
        **verdicts,
    )
    assert not wrong
    assert len(built) > 0.8 * len(NAMES), not_built
    assert verdicts["teacher_right"] > 400
    assert verdicts["student_right"] > 300
