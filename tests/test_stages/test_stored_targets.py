"""From logits through a real store to the losses: what a store keeps of a teacher, for every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.batches.microbatch import to_targets
from stages.corpus.tokenize import TokenWindow
from stages.losses import KDLoss, SparseTargets
from stages.targets import KINDS
from stages.targets.assemble import assemble
from stages.targets.positions import wanted_positions
from storage.codecs import CODECS
from storage.format.remap import build_remap, remap_sha256
from storage.plan import HeldoutRule, Plan, TargetSpec
from storage.reader import StoreReader
from storage.rows import SequenceBatch
from storage.tools.verify import verify
from storage.writer import StoreWriter

VOCABULARY, ROWS = 3000, 600
TARGETS = {
    "hybrid": TargetSpec(kind="hybrid", k=32, draws=8, temperatures=(0.5, 1.5)),
    "sampled": TargetSpec(kind="sampled", k=0, draws=50),
    "topk": TargetSpec(kind="topk", k=64, temperatures=(0.5, 1.5)),
    "topp": TargetSpec(kind="topp", k=64, p=0.95, temperatures=(0.5, 1.5)),
}
WITH_HEAD = [kind for kind in TARGETS if kind != "sampled"]
# Nats per row, on average. exact: half a unit in the last place of float32 log-probabilities from -16 to -8; how far
# sums over the vocabulary come out of that depends on the processor (1e-8 to 1.6e-7 seen).
DECODE_KL = {"sqrt-delta": 3e-4, "exact": 5e-7}


def logits_of(rows: int, seed: int = 0) -> Tensor:
    """Logits of as many shapes as a language model gives: from near certainty to a broad tail, float32 [rows, V]."""
    generator = torch.Generator().manual_seed(seed)
    slope_N1 = 0.8 + 1.6 * torch.rand(rows, 1, generator=generator)
    order_NV = torch.rand(rows, VOCABULARY, generator=generator).argsort(1)
    zipf_NV = -slope_N1 * torch.arange(1, VOCABULARY + 1).log()
    noise_NV = 0.5 * torch.randn(rows, VOCABULARY, generator=generator)
    return (zipf_NV + noise_NV).gather(1, order_NV)


def sequence_of(rows: int) -> TokenWindow:
    return TokenWindow(
        document=0,
        window_start=0,
        tokens=np.arange(rows + 1, dtype=np.uint32) % VOCABULARY,
        token_end_byte=np.arange(1, rows + 2, dtype=np.uint32),
        has_row=np.arange(rows + 1) < rows,
    )


def stored(path: Path, logits_NV: Tensor, target: TargetSpec, codec: str) -> SequenceBatch:
    """What a reader gives back of these rows."""
    sequence = sequence_of(len(logits_NV))
    rows = KINDS[target.kind].load()(logits_NV.clone(), wanted_positions([sequence]), target)
    remap = build_remap(np.ones(VOCABULARY, np.int64))
    plan = Plan(
        teacher={},
        tokenizer={"files": {}},
        vocab_size=VOCABULARY,
        corpus=(),
        documents=1,
        rendering={},
        target=target,
        heldout=HeldoutRule(),
        documents_per_shard=1,
        batching={},
        codecs={"logprob": CODECS[codec]().parameters()},
        remap_sha256=remap_sha256(remap),
    )
    writer = StoreWriter.create(path, plan, remap=remap, tokenizer_files={})
    writer.commit(plan.shards()[0], assemble([sequence], rows, target))
    writer.seal()
    return StoreReader(path).read([0])


def tail_mass(tail_logit: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(np.exp(-np.logaddexp(0.0, -tail_logit.astype(np.float64))))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", WITH_HEAD)
def test_decoding_costs_little(kind: str, codec: str, tmp_path: Path) -> None:
    """KL between the teacher and the decoded row over the head's entries and one outcome for the rest."""
    logits_NV = logits_of(ROWS)
    batch = stored(tmp_path / "store", logits_NV, TARGETS[kind], codec)
    logprob_NV = logits_NV.double().log_softmax(-1).numpy()
    row_H = np.repeat(np.arange(ROWS), batch.head_size)
    exact_H = logprob_NV[row_H, batch.head_ids]
    rest_NV = np.exp(logprob_NV)
    rest_NV[row_H, batch.head_ids] = 0.0
    rest_N = rest_NV.sum(1)
    head_N = np.bincount(row_H, np.exp(exact_H) * (exact_H - batch.logprob), minlength=ROWS)
    kl_N = head_N + rest_N * np.log(rest_N / tail_mass(batch.tail_logit))
    assert abs(kl_N.mean()) <= DECODE_KL[codec]
    assert kl_N.min() > -5e-6  # float32 sums over the vocabulary
    total_N = np.bincount(row_H, np.exp(batch.logprob.astype(np.float64)), minlength=ROWS) + tail_mass(batch.tail_logit)
    np.testing.assert_allclose(total_N, 1.0, atol=5e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("p", [0.999, 1.0 - 1e-6, 1.0 - 1e-9, 1.0])
def test_a_store_takes_heads_that_reach_nearly_all_of_the_mass(p: float, codec: str, tmp_path: Path) -> None:
    """What the heads' sizes come from and what the writer and `verify` ask for agree, where 1 - p is faint too."""
    logits_NV = logits_of(200) * torch.linspace(1.0, 40.0, 200)[:, None]
    batch = stored(tmp_path / "store", logits_NV, TargetSpec(kind="topp", k=64, p=p), codec)
    assert verify(tmp_path / "store").problems == []
    assert len(set(batch.head_size.tolist())) > 10


def buckets(logits_NV: Tensor, scale: float, batch: SequenceBatch) -> list[Tensor]:
    """Each row's distribution over its head's entries and the rest, from all logits: float64 [head + 1] per row."""
    p_NV = (logits_NV.double() * scale).softmax(-1)
    found, start = [], 0
    for p_V, size in zip(p_NV, batch.head_size.tolist(), strict=True):
        ids = torch.from_numpy(batch.head_ids[start : start + size].astype(np.int64))
        rest = torch.ones(VOCABULARY, dtype=torch.bool).index_fill_(0, ids, False)
        found.append(torch.cat([p_V[ids], p_V[rest].sum()[None]]))
        start += size
    return found


def divergence(name: str, p: Tensor, q: Tensor) -> Tensor:
    """From the definitions."""
    kl = lambda a, b: (a * (a.log() - b.log())).sum()  # noqa: E731
    middle = (p + q) / 2
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: (kl(p, middle) + kl(q, middle)) / 2,
    }[name]()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [0.5, 1.5])
@pytest.mark.parametrize("kind", WITH_HEAD)
@pytest.mark.filterwarnings("ignore:at temperature .* mean tail mass")
def test_a_stored_temperature_is_the_bucket_form_of_the_whole_teacher(
    kind: str, temperature: float, name: str, tmp_path: Path
) -> None:
    """Exact codec: to rounding. Default codec: to what its steps and float16 leave."""
    teacher_NV, student_NV = logits_of(60), logits_of(60, seed=1)
    labels_N = torch.zeros(60, dtype=torch.int64)
    loss = KDLoss(temperature=temperature, divergence=name)
    for codec, tolerance in (("exact", 2e-6), ("sqrt-delta", 3e-3)):
        batch = stored(tmp_path / codec, teacher_NV, TARGETS[kind], codec)
        pairs = zip(
            buckets(teacher_NV, 1 / temperature, batch), buckets(student_NV, 1 / temperature, batch), strict=True
        )
        expected = temperature**2 * torch.stack([divergence(name, p, q) for p, q in pairs]).mean()
        found = loss(student_NV.double(), to_targets(batch), labels_N)
        assert float(found) == pytest.approx(float(expected), rel=tolerance), codec
    # a teacher scale s asks for T/s
    scaled = KDLoss(temperature=2 * temperature, divergence=name, target_logits_scale=2.0, logits_scale=2.0)
    same = scaled(student_NV.double(), to_targets(batch), labels_N) / 4
    assert float(same) == pytest.approx(float(found), rel=1e-9)


@pytest.mark.parametrize("kind", WITH_HEAD)
def test_a_temperature_that_is_not_stored_names_the_key(kind: str, tmp_path: Path) -> None:
    targets = to_targets(stored(tmp_path / "store", logits_of(5), TARGETS[kind], "exact"))
    with pytest.raises(ValueError, match=r"stored besides 1: 0.5, 1.5.*target.temperatures"):
        KDLoss(temperature=2.0)(logits_of(5), targets, torch.zeros(5, dtype=torch.int64))


def estimate(targets: SparseTargets) -> NDArray[np.float64]:
    """p_hat of every row: the head as it is, r count / draws on samples, [N, V]."""
    p_NE = torch.where(targets.head_NE, targets.logprob_NE.double().exp(), 0.0)
    if targets.draws:
        p_NE += targets.count_NE / targets.draws * targets.tail_logit_N.double().sigmoid()[:, None]
    p_NV = torch.zeros(len(targets), VOCABULARY, dtype=torch.float64)
    return p_NV.scatter_add_(1, targets.ids_NE, p_NE).numpy()


@pytest.mark.parametrize("kind", TARGETS)
def test_the_mean_over_redraws_is_the_teacher(kind: str, tmp_path: Path) -> None:
    """2,000 redraws of one row. Exact kinds know the head and the mass of the rest; the others estimate it all."""
    redraws, target = 2000, TARGETS[kind]
    logits_NV = logits_of(1).expand(redraws, -1)
    targets = to_targets(stored(tmp_path / "store", logits_NV, target, "exact"))
    p_V = logits_NV[0].double().softmax(-1).numpy()
    p_hat_NV = estimate(targets)
    r = float(targets.tail_logit_N[0].double().sigmoid())
    if not target.draws:
        head_V = p_hat_NV[0] > 0
        np.testing.assert_allclose(p_hat_NV[:, head_V], np.tile(p_V[head_V], (redraws, 1)), rtol=1e-5)
        assert r == pytest.approx(p_V[~head_V].sum(), rel=1e-5)
        return
    np.testing.assert_allclose(p_hat_NV.sum(1), 1.0, atol=1e-6)
    mean_V = p_hat_NV.mean(0)
    # counts are multinomial: the variance of a mean is r p / (draws * redraws) for a token outside of the head
    spread_V = np.sqrt(r * p_V / (target.draws * redraws)) + 1e-6
    score_V = (mean_V - p_V) / spread_V
    likely_V = p_V * target.draws * redraws > 50 * r
    assert likely_V.sum() > 40
    assert np.abs(score_V[likely_V]).max() < 4.5
    assert abs(score_V[likely_V].mean()) < 0.5
