"""What a batch must satisfy before it becomes a shard; every refusal names the document."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import storage_cases as cases

from storage.codecs import CODECS
from storage.errors import NumericsError
from storage.format.validate import check_batch
from storage.plan import TargetSpec
from storage.segments import sigmoid
from storage.tools.smaller_head import smaller_head

PLAN = cases.make_plan()
SHARD = PLAN.shards()[0]


def changed(name, index, value):
    def change(batch):
        values = getattr(batch, name).copy()
        values[index] = value
        return replace(batch, **{name: values})

    return change


def risen(batch):
    logprob = batch.logprob.copy()
    logprob[:2] = logprob[:2][::-1].copy()
    return replace(batch, logprob=logprob)


def repeated(batch):
    ids = batch.head_ids.copy()
    ids[1] = ids[0]
    return replace(batch, head_ids=ids)


def sampled_in_head(batch):
    ids = batch.tail_ids.copy()
    ids[0] = batch.head_ids[0]
    return replace(batch, tail_ids=ids)


def emptied(batch):
    """The draws of a row's first sample go to its second."""
    row = int(np.argmax(batch.tail_size > 1))
    at, count = int(batch.tail_size[:row].sum()), batch.count.copy()
    count[at : at + 2] = [0, count[at : at + 2].sum()]
    return replace(batch, count=count)


def reversed_documents(batch):
    return replace(batch, document=batch.document[::-1].copy())


NUMERICS = {
    "logprob NaN": changed("logprob", 8, np.nan),
    "logprob -inf": changed("logprob", 8, -np.inf),
    "logprob positive": changed("logprob", 0, 0.5),
    "entropy NaN": changed("entropy", 1, np.nan),
    "entropy inf": changed("entropy", 1, np.inf),
    "entropy negative": changed("entropy", 1, -0.1),
    "tail_logit NaN": changed("tail_logit", 1, np.nan),
    "tail mass does not fit": changed("tail_logit", 1, 9.0),
    "logsumexp beyond float16": changed("logsumexp", 1, 7e4),
    "next_logprob NaN": changed("next_logprob", 1, np.nan),
}
WRONG = {
    "head rises": (risen, "logprob rises within a row: document"),
    "id twice in the head": (repeated, "an id occurs twice in a row: document"),
    "sample in the head": (sampled_in_head, "an id occurs twice in a row: document"),
    "negative id": (
        lambda batch: replace(batch, head_ids=batch.head_ids.astype(np.int64) - cases.VOCAB),
        "head_ids holds id -",
    ),
    "id outside": (changed("head_ids", 0, cases.VOCAB), f"head_ids holds id {cases.VOCAB}; the vocabulary has"),
    "token outside": (changed("tokens", 0, cases.VOCAB), f"tokens holds id {cases.VOCAB}; the vocabulary has"),
    "tail id outside": (changed("tail_ids", 0, 2**32 - 1), f"tail_ids holds id {2**32 - 1}; the vocabulary has"),
    "count too high": (changed("count", 0, 9), "counts do not add up to 4 draws: document"),
    "count zero": (emptied, "a count is 0: document"),
    "head too large": (changed("head_size", 0, 99), "head_size and head_offset disagree: document"),
    "document of another shard": (changed("document", 0, 20), "document 20 is not one of shard 0"),
    "heldout document": (
        changed("document", 0, next(n for n in range(24) if PLAN.heldout.holds_out(n))),
        "is not one of shard 0",
    ),
    "documents out of order": (reversed_documents, "not in order of document and window: document"),
    "offset beyond": (changed("token_offset", -1, 10**6), "token_offset must rise from 0 to"),
    "offset falls": (changed("token_offset", 1, -1), "token_offset must rise from 0 to"),
    "row offset": (changed("row_offset", 1, 0), "head_size and head_offset disagree: document"),
    "short entropy": (lambda batch: replace(batch, entropy=batch.entropy[:-1]), "entropy has shape"),
    "short end bytes": (
        lambda batch: replace(batch, token_end_byte=batch.token_end_byte[:-1]),
        "token_end_byte has shape",
    ),
    "other draws": (lambda batch: replace(batch, draws=5), "the batch has 5 draws per row, the plan 4"),
    "negative window": (changed("window_start", 0, -1), "window_start is negative"),
}


def test_good_batches_pass():
    for shard in PLAN.shards():
        for ragged in (False, True):
            check_batch(PLAN, shard, cases.make_batch(PLAN, shard, ragged=ragged))


@pytest.mark.parametrize("name", NUMERICS)
def test_numbers(name):
    with pytest.raises(NumericsError, match=r"document \d+"):
        check_batch(PLAN, SHARD, NUMERICS[name](cases.make_batch(PLAN, SHARD)))


@pytest.mark.parametrize("name", WRONG)
def test_structure(name):
    change, told = WRONG[name]
    with pytest.raises(ValueError, match=told):
        check_batch(PLAN, SHARD, change(cases.make_batch(PLAN, SHARD)))


def test_heads_have_at_most_k_entries():
    smaller = replace(PLAN, target=replace(PLAN.target, k=5))
    with pytest.raises(ValueError, match=r"head_size exceeds k = 5: document \d+, window at 0, row 0"):
        check_batch(smaller, SHARD, cases.make_batch(PLAN, SHARD))


def test_offsets_that_fall_on_the_way_are_refused():
    """Those of an axis that no other array is held against: each sequence but two keeps its tokens."""
    batch = cases.make_batch(PLAN, SHARD)
    offset = batch.token_offset.copy()
    offset[1], offset[2] = offset[2] + 1, offset[1]
    with pytest.raises(ValueError, match="token_offset must rise"):
        check_batch(PLAN, SHARD, replace(batch, token_offset=offset))


def test_a_row_at_the_last_token_of_a_sequence():
    batch = cases.make_batch(PLAN, SHARD)
    has_row = batch.has_row.copy()
    first = int(np.flatnonzero(has_row)[0])
    sequence = int(np.searchsorted(batch.token_offset, first, side="right"))
    has_row[first], has_row[batch.token_offset[sequence] - 1] = False, True
    with pytest.raises(ValueError, match="last token"):
        check_batch(PLAN, SHARD, replace(batch, has_row=has_row))


@pytest.mark.parametrize(("off", "refused"), [(0.004, False), (-0.004, False), (0.006, True), (-0.006, True)])
def test_mass_may_be_off_by_half_a_percent(off, refused):
    """Of one row: the mass of its tail is stored in half precision."""
    batch = cases.make_batch(PLAN, SHARD)
    tail = sigmoid(batch.tail_logit[1].astype(np.float64)) + off
    given = changed("tail_logit", 1, np.log(tail / (1.0 - tail)))(batch)
    if not refused:
        check_batch(PLAN, SHARD, given)
        return
    with pytest.raises(NumericsError, match=r"head and tail mass do not add up to 1: document \d+"):
        check_batch(PLAN, SHARD, given)


def test_the_message_names_document_window_and_row():
    batch = cases.make_batch(PLAN, SHARD)
    sequence = int(np.argmax(np.diff(batch.row_offset)))
    row = int(batch.row_offset[sequence]) + 1
    where = f"document {batch.document[sequence]}, window at {batch.window_start[sequence]}, row 1"
    with pytest.raises(NumericsError, match=f"entropy is NaN: {where}"):
        check_batch(PLAN, SHARD, changed("entropy", row, np.nan)(batch))


@pytest.mark.parametrize("codec", CODECS)
def test_a_head_of_topp_that_is_not_full_reaches_its_mass(codec):
    """Exactly, but for how the codec rounds: p is what the worst row of fewer than k entries reaches, or a bit more."""
    codec = CODECS[codec]()
    plan = cases.make_plan(target=cases.TARGETS["topp"], codecs={"logprob": codec.parameters()})
    batch = cases.make_batch(plan, SHARD)
    rounded = replace(batch, tail_logit=codec.round_numbers(batch.tail_logit).astype(np.float32))
    reached = float(sigmoid(-batch.tail_logit[batch.head_size < plan.target.k].max()))
    good, bad = (replace(plan, target=replace(plan.target, p=reached + more)) for more in (0.0, 0.02))
    for given in (batch, rounded):
        check_batch(good, SHARD, given)
        with pytest.raises(ValueError, match=r"fewer than 9 entries and does not reach mass .*: document \d+"):
            check_batch(bad, SHARD, given)
        check_batch(replace(bad, derived_from={}), SHARD, given)
    full = replace(good, target=replace(good.target, k=3))
    check_batch(full, SHARD, smaller_head(batch, full.target, origin=""))


def test_mass_1_is_reached_by_rows_without_a_tail_alone():
    plan = cases.make_plan(vocab_size=12, target=TargetSpec(kind="topp", k=12, p=1.0))
    batch = cases.make_batch(plan, SHARD)
    check_batch(replace(plan, target=replace(plan.target, k=16)), SHARD, batch)  # there are 12 tokens
    with pytest.raises(ValueError, match=r"does not reach mass 1\.0"):
        check_batch(plan, SHARD, smaller_head(batch, replace(plan.target, k=11), origin=""))


def test_a_row_without_a_head_is_of_kind_sampled():
    empty = smaller_head(cases.make_batch(PLAN, SHARD), replace(PLAN.target, k=0), origin="")
    with pytest.raises(ValueError, match="kind hybrid has no head: document"):
        check_batch(PLAN, SHARD, empty)


def test_large_shards_are_compared_in_blocks(monkeypatch):
    import storage.format.validate

    monkeypatch.setattr(storage.format.validate, "_BLOCK_VALUES", 40)
    check_batch(PLAN, SHARD, cases.make_batch(PLAN, SHARD))
    batch = cases.make_batch(PLAN, SHARD)
    ids = batch.head_ids.copy()
    ids[-1] = ids[-2]
    with pytest.raises(ValueError, match="twice"):
        check_batch(PLAN, SHARD, replace(batch, head_ids=ids))
