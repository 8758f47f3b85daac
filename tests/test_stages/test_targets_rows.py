"""Target rows against a naive float64 reference, and what may not change them."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from stages.targets import KINDS
from stages.targets.entries import BLOCK, draw, tail_blocks, top_entries, uniforms
from stages.targets.positions import Positions
from stages.targets.rows import TargetRows
from storage.errors import NumericsError, UsageError
from storage.plan import TargetSpec

GOLDEN_UNIFORMS = [
    [0.4614085803235233, 0.7546722765454852],
    [0.6255156004840166, 0.6118852285139226],
    [0.14293525091976678, 0.9081173281010364],
]


def logits_of(rows: int, vocab_size: int, *, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def positions(rows: int, vocab_size: int) -> Positions:
    number = np.arange(rows, dtype=np.int64)
    return Positions(document=number // 7, position=number % 7, next_token=(number * 31) % vocab_size)


def spec(
    kind: str = "hybrid", *, k: int = 8, draws: int = 6, p: float = 0.6, seed: int = 3, temperatures: tuple = ()
) -> TargetSpec:
    """A target of any kind, from what it takes of these."""
    target = TargetSpec(
        kind=kind,  # type: ignore[arg-type]
        k=0 if kind == "sampled" else k,
        p=p if kind == "topp" else None,
        draws=draws if kind in ("hybrid", "sampled") else 0,
        seed=seed,
        temperatures=temperatures,
    )
    target.check()
    return target


def heads_of(probability: NDArray[np.float64], target: TargetSpec) -> NDArray[np.int64]:
    """Entries of each row's head, from the probabilities in falling order [N, V]."""
    if target.p is None:
        return np.full(len(probability), target.k)
    return np.minimum((np.cumsum(probability, axis=1) < target.p).sum(1) + 1, target.k)


def rows_of(logits_NV: Tensor, target: TargetSpec, at: Positions | None = None) -> TargetRows:
    at = positions(*logits_NV.shape) if at is None else at
    return KINDS[target.kind].load()(logits_NV.clone(), at, target)


def reference(logits_NV: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return log-probabilities, logsumexp and entropy in float64, written as in a textbook."""
    z = logits_NV.double().numpy()
    top = z.max(1, keepdims=True)
    logsumexp = (top + np.log(np.exp(z - top).sum(1, keepdims=True)))[:, 0]
    logprob = z - logsumexp[:, None]
    p = np.exp(logprob)
    entropy = -np.where(p > 0, p * np.where(np.isfinite(logprob), logprob, 0.0), 0.0).sum(1)
    return logprob, logsumexp, entropy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
@pytest.mark.parametrize(("vocab_size", "k"), [(50, 8), (512, 8), (1000, 1), (5003, 8), (8192, 16)])
def test_against_float64(kind: str, vocab_size: int, k: int, scale: float) -> None:
    logits_NV = logits_of(40, vocab_size, scale=scale)
    at = positions(40, vocab_size)
    target = spec(kind, k=k)
    rows = rows_of(logits_NV, target)
    logprob, logsumexp, entropy = reference(logits_NV)
    order = np.argsort(-logprob, axis=1, kind="stable")
    ranked = np.take_along_axis(np.exp(logprob), order, 1)
    size = heads_of(ranked, target)
    np.testing.assert_array_equal(rows.head_size, size)
    np.testing.assert_array_equal(rows.head_ids, order[:, : target.k])
    np.testing.assert_allclose(rows.logprob, np.take_along_axis(logprob, order[:, : target.k], 1), atol=2e-5)
    np.testing.assert_allclose(rows.logsumexp, logsumexp, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(rows.entropy, entropy, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(rows.next_logprob, logprob[np.arange(40), at.next_token], rtol=1e-6, atol=2e-5)
    in_head = np.arange(vocab_size) < size[:, None]
    tail, head = (np.where(mask, ranked, 0.0).sum(1) for mask in (~in_head, in_head))
    with np.errstate(divide="ignore"):
        expected = np.where(tail < 1e-38, -np.inf, np.log(tail) - np.log(head))
    np.testing.assert_allclose(rows.tail_logit, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sampled"])
@pytest.mark.parametrize("temperature", [0.5, 1.5, 4.0, 50.0, 100.0])
def test_other_temperatures_against_float64(kind: str, temperature: float) -> None:
    """Tail mass and entropy of softmax(z / T), for the head that was chosen at temperature 1."""
    logits_NV = logits_of(40, 5003)
    logits_NV[:, ::3] = -torch.inf  # a teacher may forbid tokens, at every temperature
    at = Positions(document=np.zeros(40, np.int64), position=np.arange(40), next_token=np.ones(40, np.int64))
    rows = rows_of(logits_NV, spec(kind, temperatures=(0.25, temperature)), at)
    assert rows.tail_logit_T.shape == rows.entropy_T.shape == (40, 2)
    logprob, _, entropy = reference(logits_NV / temperature)
    ranked = np.sort(np.exp(logprob), axis=1)[:, ::-1]
    in_head = np.arange(5003) < rows.head_size[:, None]
    tail, head = (np.where(mask, ranked, 0.0).sum(1) for mask in (~in_head, in_head))
    np.testing.assert_allclose(rows.tail_logit_T[:, 1], np.log(tail) - np.log(head), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(rows.entropy_T[:, 1], entropy, rtol=1e-5, atol=2e-5)
    alone = rows_of(logits_NV, spec(kind), at)
    for item in ("head_ids", "logprob", "drawn", "tail_logit", "entropy"):
        np.testing.assert_array_equal(getattr(rows, item), getattr(alone, item), err_msg=item)


@pytest.mark.parametrize("chunk", [1, 3, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_matter(kind: str, chunk: int) -> None:
    logits_NV, at = logits_of(40, 5003), positions(40, 5003)
    target = spec(kind, temperatures=() if kind == "sampled" else (2.0,))
    whole = rows_of(logits_NV, target)
    cuts = [slice(first, first + chunk) for first in range(0, 40, chunk)]
    parts = TargetRows.concatenate([rows_of(logits_NV[cut], target, at[cut]) for cut in cuts])
    for item in fields(TargetRows):
        np.testing.assert_array_equal(getattr(parts, item.name), getattr(whole, item.name), err_msg=item.name)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 1.0])
def test_the_head_of_topp_is_the_least_that_reaches_its_mass(p: float) -> None:
    """One entry at least, k at most; without its last entry the mass would be missed."""
    rows = rows_of(logits_of(200, 900), spec("topp", k=20, p=p))
    assert set(rows.head_size.tolist()) <= set(range(1, 21))
    mass = np.exp(rows.logprob.astype(np.float64)).cumsum(1)
    reached = mass[np.arange(200), rows.head_size - 1]
    assert np.all((reached >= p - 1e-6) | (rows.head_size == 20))
    more = rows.head_size > 1
    assert np.all(mass[more, rows.head_size[more] - 2] < p + 1e-6)
    np.testing.assert_allclose(1.0 / (1.0 + np.exp(rows.tail_logit.astype(np.float64))), reached, rtol=1e-5)


@settings(max_examples=60)
@given(
    scale=st.floats(0.01, 30.0),  # from flat rows to peaked ones
    faint=st.floats(0.0, 14.0),  # p = 1 - 10 ** -faint
    k=st.integers(1, 300),
    seed=st.integers(0, 2**32),
)
def test_the_head_of_topp_is_never_an_id_short_or_long(scale: float, faint: float, k: int, seed: int) -> None:
    """Also where 1 - p is below what float32 resolves, and for the whole vocabulary; against sums in float64."""
    p = 1.0 - 10.0**-faint
    assume(p > 0.0)
    logits_NV = logits_of(20, 300, scale=scale, seed=seed)
    rows = rows_of(logits_NV, spec("topp", k=k, p=p))
    rising = np.sort(np.exp(reference(logits_NV)[0]), axis=1)
    after = rising.cumsum(1)[:, ::-1][:, 1:]  # mass outside of the 1, 2, ... most probable
    for slack, compare in ((2e-6, np.less_equal), (-2e-6, np.greater_equal)):  # the teacher's logits are float32
        size = np.minimum(1 + (after > (1.0 - p) * (1.0 + slack)).sum(1), k)
        assert compare(size, rows.head_size).all()
    outside = np.append(after, np.zeros((20, 1)), axis=1)[np.arange(20), rows.head_size - 1]
    seen = outside > 1e-30
    np.testing.assert_allclose(1.0 / (1.0 + np.exp(-rows.tail_logit[seen].astype(float))), outside[seen], rtol=3e-5)


@pytest.mark.parametrize("kind", ["hybrid", "sampled"])
@pytest.mark.parametrize("vocab_size", [200, 5003])
def test_draws_follow_the_tail(vocab_size: int, kind: str) -> None:
    """Chi-square over what is outside of the head, 200,000 draws of one distribution; ids are never of the head."""
    rows, draws, k = 400, 500, 8
    logits_NV = logits_of(1, vocab_size, scale=1.5).expand(rows, -1)
    found = rows_of(logits_NV, spec(kind, k=k, draws=draws))
    assert np.all(np.diff(found.drawn.astype(np.int64), axis=1) >= 0)
    assert np.all(np.isposinf(found.tail_logit)) == (kind == "sampled")
    counts = np.bincount(found.drawn.reshape(-1), minlength=vocab_size)
    assert counts[found.head_ids[0]].sum() == 0
    p = np.exp(reference(logits_NV[:1])[0][0])
    p[found.head_ids[0]] = 0.0
    expected = p / p.sum() * rows * draws
    frequent = expected >= 5.0
    observed = np.append(counts[frequent], counts[~frequent].sum())
    wanted = np.append(expected[frequent], expected[~frequent].sum())
    used = wanted > 0
    statistic = ((observed - wanted)[used] ** 2 / wanted[used]).sum()
    degrees = used.sum() - 1
    assert abs(statistic - degrees) < 4.0 * math.sqrt(2.0 * degrees)


def test_draws_depend_on_seed_document_position_only() -> None:
    logits_NV = logits_of(1, 900).expand(3, -1)
    same = Positions(document=np.array([5, 5, 6]), position=np.array([9, 9, 9]), next_token=np.array([1, 2, 3]))
    drawn = rows_of(logits_NV, spec(), same).drawn
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.any(drawn[0] != drawn[2])
    assert np.any(drawn != rows_of(logits_NV, spec(seed=4), same).drawn)
    more = rows_of(logits_NV, spec(draws=9), same).drawn
    assert all(np.isin(drawn[row], more[row]).all() for row in range(3))  # the first draws stay what they were


def test_random_numbers_are_what_they_were() -> None:
    """Golden: a store's draws must be computable again by later versions."""
    numbers = uniforms(7, np.array([0, 1, 2**40]), np.array([0, 511, 3]), 2)
    np.testing.assert_array_equal(numbers, GOLDEN_UNIFORMS)
    many = uniforms(0, np.repeat(np.arange(100), 100), np.tile(np.arange(100), 100), 8)
    assert abs(many.mean() - 0.5) < 4.0 / math.sqrt(12 * many.size)
    assert abs(np.corrcoef(many[:, 0], many[:, 1])[0, 1]) < 0.04
    assert len(np.unique(many)) == many.size


def test_the_whole_vocabulary_in_the_head() -> None:
    rows = rows_of(logits_of(5, 30), spec(k=30))
    assert np.all(np.isneginf(rows.tail_logit))
    assert np.allclose(np.exp(rows.logprob.astype(np.float64)).sum(1), 1.0)


def test_certain_rows_have_no_tail() -> None:
    logits_NV = logits_of(3, 5003)
    logits_NV[:, 17] = 300.0
    rows = rows_of(logits_NV, spec(k=1))
    assert np.all(np.isneginf(rows.tail_logit))
    assert np.all(rows.logprob[:, 0] == 0.0)
    assert np.all(rows.entropy == 0.0)


@pytest.mark.parametrize("gap", [10.0, 30.0, 60.0])
def test_faint_tails_are_exact(gap: float) -> None:
    """1 - sum(head) would be 0 or noise here: float32 resolves 6e-8."""
    logits_NV = logits_of(6, 5003)
    logits_NV[:, 17] = logits_NV.amax(1) + gap
    rows = rows_of(logits_NV, spec(k=1))
    p = np.exp(reference(logits_NV)[0])
    p[:, 17] = 0.0
    np.testing.assert_allclose(rows.tail_logit, np.log(p.sum(1)) - np.log1p(-p.sum(1)), rtol=1e-5)
    np.testing.assert_allclose(rows.entropy, reference(logits_NV)[2], rtol=1e-3, atol=1e-7)
    assert np.all(rows.drawn != 17)


def test_masked_tokens() -> None:
    """A teacher may forbid tokens with -inf."""
    logits_NV = logits_of(20, 700)
    logits_NV[:, ::2] = -torch.inf
    at = Positions(document=np.zeros(20, np.int64), position=np.arange(20), next_token=np.arange(20) % 2)
    rows = rows_of(logits_NV, spec(), at)
    np.testing.assert_allclose(rows.entropy, reference(logits_NV)[2], rtol=1e-5)
    assert np.all(rows.head_ids % 2 == 1)
    assert np.all(rows.drawn % 2 == 1)
    np.testing.assert_array_equal(np.isneginf(rows.next_logprob), at.next_token == 0)


@pytest.mark.parametrize("vocab_size", [300, 40 * BLOCK])
def test_equal_logits_keep_the_order_of_ids(vocab_size: int) -> None:
    logits_NV = torch.zeros(2, vocab_size)
    best = [vocab_size - 1, 5, 130, 77]
    logits_NV[0, best] = 2.0
    logits_NV[1, best[:2]] = 1.0
    logits_NV[1, best[2:]] = 3.0
    values_NK, ids_NK = top_entries(logits_NV, 4)
    assert ids_NK.tolist() == [[5, 77, 130, vocab_size - 1], [77, 130, 5, vocab_size - 1]]
    assert values_NK.tolist() == [[2.0] * 4, [3.0, 3.0, 1.0, 1.0]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_name_document_and_position(value: float) -> None:
    logits_NV = logits_of(20, 5003)
    logits_NV[16, 4000] = value
    with pytest.raises(NumericsError) as caught:
        rows_of(logits_NV, spec())
    assert caught.value.where == "document 2, position 2"


def test_a_row_without_any_mass_is_refused() -> None:
    logits_NV = logits_of(3, 100)
    logits_NV[1] = -torch.inf
    with pytest.raises(NumericsError, match="hold NaN or infinity") as caught:
        rows_of(logits_NV, spec())
    assert caught.value.where == "document 0, position 1"


def test_k_beyond_the_vocabulary() -> None:
    with pytest.raises(UsageError, match="k = 101 is more than the vocabulary of 100 tokens"):
        rows_of(logits_of(3, 100), spec(k=101))


def test_draws_do_not_depend_on_how_many_are_gathered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    blocks = tail_blocks(torch.rand(5, 700))
    uniform_NM = torch.rand(5, 40, dtype=torch.float64)
    at_once = draw(*blocks, uniform_NM)
    monkeypatch.setattr("stages.targets.entries._LARGEST_GATHER", 5 * 64 * 3)
    assert torch.equal(draw(*blocks, uniform_NM), at_once)


def test_a_draw_is_never_what_has_no_mass() -> None:
    """At 0, and where a number falls on the border of two blocks or of two tokens."""
    tail_NV = torch.zeros(1, 5 * BLOCK)
    at = [BLOCK + 3, BLOCK + 7, 3 * BLOCK + 5, 3 * BLOCK + 6]
    tail_NV[0, at] = 0.125
    uniform_NM = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0 - 2.0**-53]], dtype=torch.float64)
    assert draw(*tail_blocks(tail_NV), uniform_NM).tolist() == [[*at, at[-1]]]
