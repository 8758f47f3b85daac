"""Conversion: a new store with an identity of its own, and rows that are the same, or honest."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import storage_cases as cases
import warm_process

from storage.codecs.sqrt_delta import SqrtDelta
from storage.commit import bounds
from storage.errors import CorruptionError, IdentityError, UsageError
from storage.files import open_files
from storage.files.local import LocalFiles
from storage.format.decode import scale_heads
from storage.plan import TargetSpec
from storage.reader import StoreReader
from storage.tools.convert import Conversion, convert
from storage.tools.diff import diff
from storage.tools.gc import collect_garbage
from storage.tools.smaller_head import smaller_head
from storage.tools.status import status
from storage.tools.verify import verify

EXACT = {"id": "exact"}
TARGETS = {
    "hybrid": TargetSpec(kind="hybrid", k=6, draws=4),
    "topk": TargetSpec(kind="topk", k=6),
    "topp": TargetSpec(kind="topp", k=6, p=0.8),
    "temperatures": TargetSpec(kind="topk", k=6, temperatures=(0.5, 2.0)),
}


def run(source, target, **changes):
    return list(convert(source, target, Conversion(**changes)))[-1]


def test_another_codec(sealed, store_at):
    old, new = cases.copy(sealed, store_at("old")), store_at("new")
    told = list(convert(old, new, Conversion(codec=EXACT)))
    written, read = StoreReader(new), StoreReader(old)
    assert {event.store for event in told} == {str(new)}
    assert [event.committed for event in told] == [1, 2, 3, 4, 5, 5]
    assert told[-1].digest == written.digest
    assert told[-1].rows == status(sealed).rows
    assert written.plan.codecs == {"logprob": EXACT}
    assert written.plan.store_id != read.plan.store_id
    assert written.plan.derived_from == {
        "store_id": read.plan.store_id,
        "digest": read.digest,
        "changed": {"codecs": {"from": {"logprob": dict(read.plan.codecs["logprob"])}, "to": {"logprob": EXACT}}},
    }
    assert verify(new).problems == []
    assert all(part.equal for part in diff(sealed, new).splits.values()), "decoded values, every bit"


def test_telling_progress_does_not_look_for_every_shard(sealed, tmp_path, monkeypatch):
    """As many looks at records of the new store after the first shards as after the later ones."""
    monkeypatch.setattr("storage.writer.LOOKS", 2)
    looks, told, found = [], [], []

    def noted(real):
        return lambda self, entry, **bound: looks.append(self.root / entry) or real(self, entry, **bound)

    for name in ("read_stamped", "exists"):
        monkeypatch.setattr(LocalFiles, name, noted(getattr(LocalFiles, name)))
    for event in convert(sealed, tmp_path / "new", Conversion(documents_per_shard=1)):
        told.append(event)
        found.append(sum(entry.parent == tmp_path / "new" / "commits" for entry in looks))
        looks.clear()
    assert [event.committed for event in told] == [*range(1, told[-1].shards + 1), told[-1].shards]
    assert len(found) > 20
    assert len(set(found[1:-3])) == 1


def test_the_source_is_not_touched(sealed, tmp_path):
    shutil.copytree(sealed, tmp_path / "old")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "old").rglob("*")}
    run(tmp_path / "old", tmp_path / "new", k=2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "old").rglob("*")} == before


@pytest.mark.parametrize("documents", [1, 5, 7, 100])
def test_another_sharding_keeps_every_row(sealed, store_at, documents):
    exact, new = store_at("exact"), store_at("new")
    run(sealed, exact, codec=EXACT)
    run(exact, new, documents_per_shard=documents)
    assert all(part.equal for part in diff(exact, new).splits.values())
    assert verify(new).problems == []


@pytest.mark.parametrize("codec", [SqrtDelta(), SqrtDelta(root_step=0.3, log_step=0.9), SqrtDelta(row_step=1.0)])
@pytest.mark.parametrize("ragged", [False, True])
def test_another_sharding_rounds_nothing_twice(tmp_path, ragged, codec):
    """Values that were quantised and scaled fall beside the codec's points; some would fall to another point."""
    plan = cases.make_plan(documents=400, documents_per_shard=100, codecs={"logprob": codec.parameters()})
    cases.write_store(tmp_path / "old", plan, longest=40, ragged=ragged)
    reader = StoreReader(tmp_path / "old")
    batch = reader.read(range(len(reader)))
    assert batch.rows > 4000
    again = scale_heads(
        codec.decode(codec.encode(batch.logprob, batch.head_size), batch.head_size), batch.head_size, batch.tail_logit
    )
    assert np.abs(again - batch.logprob).max() > 1e-3, "the test would prove nothing"
    run(tmp_path / "old", tmp_path / "new", documents_per_shard=150)
    assert all(part.equal for part in diff(tmp_path / "old", tmp_path / "new").splits.values())
    assert verify(tmp_path / "new").problems == []


@pytest.mark.parametrize("kind", TARGETS)
def test_a_smaller_head(tmp_path, kind):
    target = TARGETS[kind]
    plan = cases.make_plan(target=target, codecs={"logprob": EXACT})
    cases.write_store(tmp_path / "old", plan, ragged=kind == "topp")
    run(tmp_path / "old", tmp_path / "new", k=2)
    assert verify(tmp_path / "new").problems == []
    old, new = StoreReader(tmp_path / "old"), StoreReader(tmp_path / "new")
    a, b = (reader.read(range(len(reader))) for reader in (old, new))
    assert new.plan.target == replace(target, k=2)
    assert (b.head_size == np.minimum(a.head_size, 2)).all()
    kept = np.concatenate([np.arange(size) < 2 for size in a.head_size])
    assert (b.head_ids == a.head_ids[kept]).all()
    assert (b.logprob == a.logprob[kept]).all()
    inside = np.bincount(np.repeat(np.arange(b.rows), b.head_size), np.exp(b.logprob.astype(float)), minlength=b.rows)
    assert 1 / (1 + np.exp(-b.tail_logit.astype(float))) == pytest.approx(1 - inside, abs=2e-3)
    for name in ("tokens", "has_row", "logsumexp", "entropy", "next_logprob"):
        assert (getattr(b, name) == getattr(a, name)).all()
    assert status(tmp_path / "new").head_mass < status(tmp_path / "old").head_mass


def distribution(rng, vocab):
    logits = rng.normal(size=vocab) * 2
    return np.log(np.exp(logits) / np.exp(logits).sum())


def many_rows(rows, *, k, draws, temperatures=()):
    """One sequence whose rows hold one and the same distribution, each with its own draws; and that distribution."""
    rng = np.random.default_rng(7)
    vocab = 30
    logprob = distribution(rng, vocab)
    order = np.argsort(-logprob)
    plan = cases.make_plan(target=TargetSpec(kind="hybrid", k=k, draws=draws), vocab_size=vocab)
    tail = np.exp(logprob[order[k:]])
    tails = [np.unique(rng.choice(order[k:], size=draws, p=tail / tail.sum()), return_counts=True) for _ in range(rows)]
    sizes = np.array([len(ids) for ids, _ in tails], np.int32)
    empty = cases.batch_of(plan, [], rng)
    by_temperature = {}
    if temperatures:
        scaled = logprob[None, :] / np.array(temperatures)[:, None]
        p_TV = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
        r_T = p_TV[:, order[k:]].sum(axis=1)
        by_temperature = {
            "temperatures": tuple(temperatures),
            "tail_logit_T": np.tile(np.log(r_T / (1 - r_T)).astype(np.float32), (rows, 1)),
            "entropy_T": np.zeros((rows, len(temperatures)), np.float32),
        }
    has_row = np.ones(rows + 1, dtype=bool)
    has_row[-1] = False
    batch = replace(
        empty,
        tokens=np.zeros(rows + 1, np.uint32),
        token_offset=np.array([0, rows + 1]),
        row_offset=np.array([0, rows]),
        head_offset=np.array([0, rows * k]),
        tail_offset=np.array([0, int(sizes.sum())]),
        document=np.array([3]),
        window_start=np.array([0]),
        token_end_byte=None,
        has_row=has_row,
        head_size=np.full(rows, k, np.int32),
        tail_size=sizes,
        head_ids=np.tile(order[:k].astype(np.uint32), rows),
        logprob=np.tile(logprob[order[:k]].astype(np.float32), rows),
        tail_ids=np.concatenate([ids for ids, _ in tails]).astype(np.uint32),
        count=np.concatenate([counts for _, counts in tails]).astype(np.uint16),
        tail_logit=np.full(rows, np.log(tail.sum() / (1 - tail.sum())), np.float32),
        **{name: np.zeros(rows, np.float32) for name in ("logsumexp", "entropy", "next_logprob")},
        **by_temperature,
    )
    return batch, logprob, order


def test_samples_of_the_larger_tail_stay_unbiased():
    """20,000 rows of 8 draws: the share of each id outside of the new head is its share of the distribution."""
    rows, draws = 20_000, 8
    batch, logprob, order = many_rows(rows, k=6, draws=draws)
    small = smaller_head(batch, TargetSpec(kind="hybrid", k=2, draws=draws), origin="here")
    drawn = np.bincount(small.tail_ids, weights=small.count, minlength=30)
    assert np.bincount(np.repeat(np.arange(rows), small.tail_size), weights=small.count).tolist() == [draws] * rows
    tail = np.exp(logprob)
    tail[order[:2]] = 0
    expected = rows * draws * tail / tail.sum()
    assert (drawn[order[:2]] == 0).all()
    outside = order[2:]
    chi_square = ((drawn - expected) ** 2 / np.maximum(expected, 1e-12))[outside].sum()
    assert chi_square < 27 + 5 * np.sqrt(2 * 27), "27 degrees of freedom, five standard deviations"
    # Draws of a row are independent: the number that fell on some ids that left the head has a binomial's variance.
    row = np.repeat(np.arange(rows), small.tail_size)
    for some in (order[2:6], order[2:3]):
        share = tail[some].sum() / tail.sum()
        chosen = np.isin(small.tail_ids, some)
        per_row = np.bincount(row[chosen], weights=small.count[chosen], minlength=rows)
        assert per_row.mean() == pytest.approx(draws * share, rel=0.02)
        assert per_row.var() == pytest.approx(draws * share * (1 - share), rel=0.05)
    assert (
        smaller_head(batch, TargetSpec(kind="hybrid", k=2, draws=draws), origin="here").count.tobytes()
        == small.count.tobytes()
    )
    other = smaller_head(batch, TargetSpec(kind="hybrid", k=2, draws=draws, seed=1), origin="here")
    assert other.tail_ids.tobytes() != small.tail_ids.tobytes()


def test_a_head_made_smaller_twice_stays_unbiased():
    """6 -> 3 -> 1: what decided in the first step which draws were kept must not decide again in the second."""
    rows, draws = 20_000, 2
    batch, logprob, order = many_rows(rows, k=6, draws=draws)
    for k, origin in ((3, "first"), (1, "second")):
        batch = smaller_head(batch, TargetSpec(kind="hybrid", k=k, draws=draws), origin=origin)
    drawn = np.bincount(batch.tail_ids, weights=batch.count, minlength=30)
    outside = order[1:]
    tail = np.exp(logprob[outside])
    expected = rows * draws * tail / tail.sum()
    chi_square = ((drawn[outside] - expected) ** 2 / expected).sum()
    assert chi_square < 28 + 5 * np.sqrt(2 * 28), "28 degrees of freedom, five standard deviations"


def test_each_conversion_of_a_chain_draws_by_its_origin(sealed, tmp_path, monkeypatch):
    origins = []

    def noted(batch, target, *, origin):
        origins.append(origin)
        return smaller_head(batch, target, origin=origin)

    monkeypatch.setattr("storage.tools.convert.smaller_head", noted)
    run(sealed, tmp_path / "3", k=3)
    run(tmp_path / "3", tmp_path / "1", k=1)
    assert set(origins) == {StoreReader(path).plan.store_id for path in (sealed, tmp_path / "3")}


def test_two_conversions_share_the_work_and_forbid_garbage_collection(sealed, fresh):
    pair = [convert(sealed, fresh, Conversion(k=2)) for _ in range(2)]
    for _ in range(2):
        for part in pair:
            next(part)
            with pytest.raises(UsageError, match="of this machine works on shard"):
                collect_garbage(fresh, apply=True)
    ends = [list(part)[-1] for part in pair]
    assert sum(end.rows for end in ends) == status(fresh).rows, "each shard was computed once"
    assert open_files(fresh).entries("tmp") == set()


def test_mass_outside_is_summed_without_cancellation():
    """A tail of 1e-9 and a dropped entry of 1e-8: 1 - sum would have no correct digit in float32."""
    batch, _, _ = many_rows(1, k=2, draws=1)
    head = np.array([-1.1e-8, np.log(1e-8)], np.float32)
    batch = replace(batch, logprob=head, tail_logit=np.array([np.log(1e-9)], np.float32))
    small = smaller_head(batch, TargetSpec(kind="hybrid", k=1, draws=1), origin="here")
    assert np.exp(float(small.tail_logit[0])) == pytest.approx(1.1e-8, rel=1e-5)


def test_tail_mass_at_other_temperatures():
    batch, logprob, order = many_rows(3, k=6, draws=2, temperatures=(0.5, 2.0))
    small = smaller_head(batch, TargetSpec(kind="hybrid", k=2, draws=2, temperatures=(0.5, 2.0)), origin="here")
    for column, temperature in enumerate((0.5, 2.0)):
        p = np.exp(logprob / temperature)
        r = p[order[2:]].sum() / p.sum()
        assert small.tail_logit_T[:, column] == pytest.approx(np.log(r / (1 - r)), abs=1e-4)


def test_rows_without_a_tail():
    """A head that held everything: the new tail is what left it, and nothing at all if nothing did."""
    batch, logprob, order = many_rows(200, k=6, draws=8)
    inside = logprob[order[:6]] - np.log(np.exp(logprob[order[:6]]).sum())
    batch = replace(
        batch,
        logprob=np.tile(inside.astype(np.float32), 200),
        tail_logit=np.full(200, -np.inf, np.float32),
        tail_size=np.zeros(200, np.int32),
        tail_offset=np.zeros(2, np.int64),
        tail_ids=np.zeros(0, np.uint32),
        count=np.zeros(0, np.uint16),
    )
    small = smaller_head(batch, TargetSpec(kind="hybrid", k=2, draws=8), origin="here")
    assert set(small.tail_ids.tolist()) == set(order[2:6].tolist())
    assert int(small.count.sum()) == 200 * 8
    same = smaller_head(batch, TargetSpec(kind="hybrid", k=6, draws=8), origin="here")
    assert (len(same.tail_ids), same.tail_size.sum()) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "nothing would change"),
        ({"k": 6}, "nothing would change"),
        ({"documents_per_shard": 6}, "nothing would change"),
        ({"codec": {"id": "sqrt-delta"}}, "nothing would change"),
        ({"k": 7}, "beyond that nothing is known"),
        ({"k": 0}, "not a smaller head"),
        ({"codec": {"id": "other"}}, "unknown"),
        ({"codec": {"id": "sqrt-delta", "root_step": 2.0}}, "root_step"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_begun(sealed, tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        run(sealed, tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_shards_too_large_are_refused_and_nothing_begun(sealed, tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "LARGEST_SEQUENCES", len(StoreReader(sealed)) // 2)
    with pytest.raises(UsageError, match=r"1000 documents would put about .* sequences into a shard"):
        run(sealed, tmp_path / "new", documents_per_shard=1000)
    assert not (tmp_path / "new").exists()


def test_rows_of_samples_have_no_head(tmp_path):
    target = TargetSpec(kind="sampled", k=0, draws=4)
    cases.open_writer(tmp_path / "old", cases.make_plan(target=target, documents=0)).seal()
    with pytest.raises(UsageError, match="no head"):
        run(tmp_path / "old", tmp_path / "new", k=2)


def test_inside_of_the_source(sealed):
    with pytest.raises(UsageError, match="in place"):
        run(sealed, sealed / "sub", k=2)


def test_in_place_unfinished_foreign_and_damaged(sealed, store_at):
    store, part, new = cases.copy(sealed, store_at("store")), store_at("part"), store_at("new")
    with pytest.raises(UsageError, match="in place"):
        run(store, store, k=2)
    cases.write_store(part, shards=[0])
    with pytest.raises(UsageError, match="not finished"):
        run(part, new, k=2)
    run(store, new, k=2)
    before = cases.tree(new)
    with pytest.raises(IdentityError, match=r"target\.k: 2 -> 3"):
        run(store, new, k=3)
    assert cases.tree(new) == before
    victim = cases.find(store, "shards/000001-*/entropy/c/0")
    cases.put(store, victim, cases.contents(store)[victim][:-1] + b"x")
    with pytest.raises(CorruptionError, match="entropy"):
        run(store, begun := store_at("from-damaged"), k=2)
    assert status(begun).committed == 1, "the shard before the damage"


@pytest.mark.parametrize("fault", ["plan-linked:1", "encode:30", "shard-write:90", "record-link:2", "seal-link:1"])
def test_killed_in_the_middle_it_ends_in_the_same_bytes(sealed, tmp_path, fault):
    command = (warm_process.pipeline, "convert", sealed, tmp_path / "new", "--k", "3")
    killed = warm_process.run(*command, environment={"TOPK_DISTILL_FAULT": fault})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = warm_process.run(*command)
    assert again.returncode == 0, again.stderr
    run(sealed, tmp_path / "uninterrupted", k=3)
    assert cases.tree(tmp_path / "new") == cases.tree(tmp_path / "uninterrupted")
    assert verify(tmp_path / "new").problems == []
