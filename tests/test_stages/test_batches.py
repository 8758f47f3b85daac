"""stages/batches: cutting, packing, the label shift, targets, order, steps and read-ahead."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages.batches.microbatch import to_microbatch
from stages.batches.order import Order
from stages.batches.sequences import join, lengths, pack, part
from stages.batches.steps import (
    Step,
    StepShape,
    end_of_epochs,
    evenly_spaced,
    microbatches,
    prefetch,
    steps_of_epochs,
    training_steps,
)
from storage.errors import UsageError
from storage.reader import StoreReader
from storage.rows import SequenceBatch

VOCABULARY = 50


def make_sequences(sizes: list[int], *, overlap: int = 0, seed: int = 0) -> SequenceBatch:
    """Random sequences with rows of 1 to 4 head entries and 0 to 3 samples; the first `overlap` have no row."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, sum(sizes)).astype(np.uint32)
    has_row = np.concatenate([[overlap <= at < size - 1 for at in range(size)] for size in sizes])
    rows_S = [int(part.sum()) for part in np.split(has_row, np.cumsum(sizes)[:-1])]
    rows = sum(rows_S)
    head_size = random.integers(1, 5, rows).astype(np.int32)
    tail_size = random.integers(0, 4, rows).astype(np.int32)
    entries = [random.permutation(VOCABULARY)[: h + c] for h, c in zip(head_size, tail_size, strict=True)]
    row_offset = np.concatenate([[0], np.cumsum(rows_S)])
    head_at, tail_at = (np.concatenate([[0], np.cumsum(size)]) for size in (head_size, tail_size))
    counts = [np.array([4 - (c - 1), *[1] * (c - 1)]) if c else np.array([], int) for c in tail_size]
    return SequenceBatch(
        tokens=tokens,
        token_offset=np.concatenate([[0], np.cumsum(sizes)]),
        row_offset=row_offset,
        head_offset=head_at[row_offset],
        tail_offset=tail_at[row_offset],
        document=np.arange(len(sizes)),
        window_start=np.zeros(len(sizes), np.int64),
        token_end_byte=np.arange(len(tokens), dtype=np.uint32),
        has_row=has_row,
        head_size=head_size,
        tail_size=tail_size,
        head_ids=np.concatenate([e[:h] for e, h in zip(entries, head_size, strict=True)]).astype(np.uint32),
        logprob=np.log(np.concatenate([np.full(h, 0.9 / h) for h in head_size])).astype(np.float32),
        tail_ids=np.concatenate([e[h:] for e, h in zip(entries, head_size, strict=True)]).astype(np.uint32),
        count=np.concatenate(counts).astype(np.uint16),
        tail_logit=random.normal(size=rows).astype(np.float32),
        logsumexp=random.normal(size=rows).astype(np.float32),
        entropy=random.random(rows).astype(np.float32),
        next_logprob=-random.random(rows).astype(np.float32),
        draws=4,
    )


@dataclass
class InMemory:
    """A store in memory, which counts what is read."""

    sequences: SequenceBatch
    reads: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def tokens(self) -> int:
        return len(self.sequences.tokens)

    def read(self, indices: NDArray[np.int64], *, targets: bool = True) -> SequenceBatch:
        self.reads.append(len(indices))
        return join([part(self.sequences, index, index + 1) for index in indices.tolist()])


def assert_equal(left: SequenceBatch, right: SequenceBatch) -> None:
    for item in fields(SequenceBatch):
        np.testing.assert_array_equal(getattr(left, item.name), getattr(right, item.name), err_msg=item.name)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.data())
def test_parts_joined_again_are_the_whole(sizes: list[int], data: st.DataObject) -> None:
    batch = make_sequences(sizes)
    cut = data.draw(st.integers(0, len(sizes)))
    pieces = [piece for piece in (part(batch, 0, cut), part(batch, cut, len(sizes))) if len(piece)]
    assert_equal(join(pieces), batch)


def test_labels_are_the_next_tokens_and_nothing_else_shifts() -> None:
    batch = make_sequences([3, 2, 4], overlap=0)
    batch.tokens[:] = [10, 11, 12, 20, 21, 30, 31, 32, 33]
    packed = to_microbatch(batch, with_targets=True)
    assert packed.tokens_1T.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32, 33]]
    assert packed.labels_T.tolist() == [11, 12, -100, 21, -100, 31, 32, 33, -100]
    assert packed.positions_1T.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert packed.rows_N.tolist() == [0, 1, 3, 5, 6, 7]
    assert packed.labels_N.tolist() == [11, 12, 21, 31, 32, 33]
    assert packed.targets is not None
    assert len(packed.targets) == packed.rows == 6


def test_positions_without_a_row_have_no_label() -> None:
    packed = to_microbatch(make_sequences([5], overlap=2), with_targets=False)
    assert (packed.labels_T != -100).tolist() == [False, False, True, True, False]


def test_targets_lie_beside_the_positions_that_they_belong_to() -> None:
    batch = make_sequences([4, 3, 6], overlap=1)
    targets = to_microbatch(batch, with_targets=True).targets
    assert targets is not None
    head_at = np.concatenate([[0], np.cumsum(batch.head_size)])
    tail_at = np.concatenate([[0], np.cumsum(batch.tail_size)])
    for row in range(batch.rows):
        head = batch.head_ids[head_at[row] : head_at[row + 1]].tolist()
        tail = batch.tail_ids[tail_at[row] : tail_at[row + 1]].tolist()
        size = len(head) + len(tail)
        assert targets.ids_NE[row, :size].tolist() == head + tail
        assert targets.head_NE[row].sum() == len(head)
        assert targets.count_NE[row, len(head) : size].tolist() == batch.count[tail_at[row] : tail_at[row + 1]].tolist()
        np.testing.assert_array_equal(
            targets.logprob_NE[row, : len(head)], batch.logprob[head_at[row] : head_at[row + 1]]
        )
    assert targets.draws == batch.draws


def test_every_number_of_a_row_reaches_the_loss_under_its_own_name() -> None:
    batch = make_sequences([4, 3, 6], overlap=1)
    stored = {"temperatures": (0.5, 2.0)}
    for name in ("tail_logit_T", "entropy_T"):
        stored[name] = np.random.default_rng(len(name)).random((batch.rows, 2), np.float32)
    targets = to_microbatch(replace(batch, **stored), with_targets=True).targets  # type: ignore[arg-type]
    assert targets is not None
    for name in ("tail_logit", "entropy", "next_logprob"):
        np.testing.assert_array_equal(getattr(targets, f"{name}_N"), getattr(batch, name), err_msg=name)
    for at, temperature in enumerate((0.5, 2.0)):
        np.testing.assert_array_equal(targets.tail_logit_by_temperature[temperature], stored["tail_logit_T"][:, at])
        np.testing.assert_array_equal(targets.entropy_by_temperature[temperature], stored["entropy_T"][:, at])


@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.integers(9, 30))
def test_micro_batches_hold_all_sequences_in_order_within_the_bound(sizes: list[int], bound: int) -> None:
    batch = make_sequences(sizes)
    packed = pack(batch, bound)
    assert all(len(piece.tokens) <= bound for piece in packed)
    assert_equal(join(packed), batch)


def test_a_sequence_longer_than_a_micro_batch_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match=r"12 tokens.*at most 10") as caught:
        pack(make_sequences([4, 12]), 10)
    assert caught.value.fix is not None
    assert "at least 12" in caught.value.fix


def test_without_targets_no_teacher_row_is_read() -> None:
    with_targets, without = (
        microbatches(make_sequences([5, 5]), StepShape(tokens_per_step=10, tokens_per_batch=10, with_targets=wanted))[0]
        for wanted in (True, False)
    )
    assert with_targets.targets is not None
    assert without.targets is None
    assert torch.equal(with_targets.labels_T, without.labels_T)


def test_each_epoch_holds_every_sequence_once_in_another_order() -> None:
    order = Order(sequences=23, seed=1, digest="a")
    epochs = order.take(0, 46).reshape(2, 23)
    assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(23))] * 2
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(np.concatenate([order.take(0, 5), order.take(5, 41)]), epochs.reshape(-1))
    for other in (Order(sequences=23, seed=2, digest="a"), Order(sequences=23, seed=1, digest="b")):
        assert not np.array_equal(other.take(0, 23), epochs[0])


def steps_of(source: InMemory, shape: StepShape, *, count: int, cursor: int = 0) -> list[Step]:
    order = Order(sequences=len(source), seed=0, digest="x")
    return list(islice(training_steps(source, order, shape, cursor=cursor), count))


def tokens_of(step: Step) -> list[int]:
    return [token for batch in step.batches for token in batch.tokens_1T[0].tolist()]


def test_steps_hold_whole_sequences_up_to_the_bound_and_epochs_follow_each_other() -> None:
    sizes = [3, 9, 5, 7, 2, 8, 6]
    source = InMemory(make_sequences(sizes))
    shape = StepShape(tokens_per_step=20, tokens_per_batch=10)
    steps = steps_of(source, shape, count=12)
    order = Order(sequences=len(sizes), seed=0, digest="x")
    expected = source.read(order.take(0, steps[-1].cursor)).tokens.tolist()
    assert [token for step in steps for token in tokens_of(step)] == expected
    cursors = [0, *(step.cursor for step in steps)]
    for step, first, end in zip(steps, cursors, cursors[1:], strict=False):
        assert step.tokens <= 20
        following = order.take(end, 1)[0]
        assert step.tokens + sizes[following] > 20
        assert step.rows == sum(sizes[index] - 1 for index in order.take(first, end - first))


def test_a_step_resumed_at_its_cursor_is_the_same_step() -> None:
    source = InMemory(make_sequences(np.random.default_rng(0).integers(2, 9, 40).tolist()))
    shape = StepShape(tokens_per_step=24, tokens_per_batch=12)
    whole = steps_of(source, shape, count=10)
    resumed = steps_of(source, shape, count=6, cursor=whole[3].cursor)
    assert [tokens_of(step) for step in resumed] == [tokens_of(step) for step in whole[4:]]


def test_the_size_of_micro_batches_does_not_change_what_a_step_holds() -> None:
    source = InMemory(make_sequences([3, 9, 5, 7, 2, 8, 6]))
    few, many = (steps_of(source, StepShape(tokens_per_step=27, tokens_per_batch=bound), count=5) for bound in (27, 9))
    assert [tokens_of(step) for step in few] == [tokens_of(step) for step in many]
    assert max(len(step.batches) for step in few) == 1 < max(len(step.batches) for step in many)


@pytest.mark.parametrize("epochs", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("sizes", [[8] * 40, [10] * 41, [3, 9, 5, 30, 7, 2, 8, 6]])
@pytest.mark.parametrize("tokens_per_step", [15, 16, 20, 39])
def test_steps_of_epochs_are_those_that_see_every_sequence_so_often(
    epochs: float, sizes: list[int], tokens_per_step: int
) -> None:
    source = InMemory(make_sequences(sizes))
    order = Order(sequences=len(sizes), seed=0, digest="x")
    length_S = lengths(source.sequences)
    end = end_of_epochs(len(sizes), epochs)
    steps = list(
        training_steps(source, order, StepShape(tokens_per_step=tokens_per_step, tokens_per_batch=50), end=end)
    )
    assert steps[-1].cursor == end == math.ceil(epochs * len(sizes))
    for done, cursor in enumerate([0, *(step.cursor for step in steps)]):
        assert done + steps_of_epochs(length_S, order, tokens_per_step, epochs, cursor=cursor) == len(steps)


@pytest.mark.parametrize(("sequences", "epochs", "end"), [(10, 1.1, 11), (30, 0.1, 3), (7, 0.5, 4), (3, 2.0, 6)])
def test_passes_end_where_their_decimals_say(sequences: int, epochs: float, end: int) -> None:
    assert end_of_epochs(sequences, epochs) == end


def test_steps_are_counted_across_blocks_of_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    length_S = np.random.default_rng(0).integers(2, 30, 50)
    order = Order(sequences=50, seed=0, digest="x")
    whole = steps_of_epochs(length_S, order, 20, 3.0)
    monkeypatch.setattr("stages.batches.steps._POSITIONS", 7)
    assert steps_of_epochs(length_S, order, 20, 3.0) == whole


def test_a_store_without_training_sequences_is_refused() -> None:
    empty = part(make_sequences([3]), 0, 0)
    with pytest.raises(UsageError, match="no training sequences"):
        steps_of(InMemory(empty), StepShape(tokens_per_step=8, tokens_per_batch=8), count=1)


def test_validation_takes_sequences_that_are_spread_evenly() -> None:
    source = InMemory(make_sequences([4, 3, 6, 5, 2, 8, 7]))
    for count, indices in ((1, [0]), (3, [0, 2, 4]), (4, [0, 1, 3, 5]), (9, list(range(7)))):
        batches = evenly_spaced(source, count, StepShape(tokens_per_step=20, tokens_per_batch=9))
        taken = [token for batch in batches for token in batch.tokens_1T[0].tolist()]
        assert taken == source.read(np.array(indices)).tokens.tolist()


def test_validation_leaves_out_what_has_no_rows() -> None:
    shape = StepShape(tokens_per_step=20, tokens_per_batch=9)
    source = InMemory(make_sequences([4, 9, 3], overlap=3))
    assert [batch.tokens for batch in evenly_spaced(source, 3, shape)] == [9]
    assert evenly_spaced(source, 1, shape) == ()
    assert evenly_spaced(InMemory(part(source.sequences, 0, 0)), 3, shape) == ()


def test_training_never_sees_a_held_out_document(tiny_store: Path) -> None:
    reader = StoreReader(tiny_store)
    heldout = StoreReader(tiny_store, split="heldout")
    rule = reader.plan.heldout
    order = Order(sequences=len(reader), seed=0, digest=reader.digest)
    seen = reader.read(order.take(0, len(reader))).document.tolist()
    assert len(heldout) > 0
    assert not any(rule.holds_out(document) for document in seen)
    assert all(rule.holds_out(document) for document in heldout.read(np.arange(len(heldout))).document.tolist())


def running() -> int:
    return sum(thread.name.startswith("topk_distill-prefetch") for thread in threading.enumerate())


def test_read_ahead_gives_the_same_items_and_ends_its_thread() -> None:
    assert list(prefetch(iter(range(5)))) == [0, 1, 2, 3, 4]
    assert running() == 0


def test_read_ahead_stays_one_item_ahead_and_ends_its_thread_when_closed() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with closing(prefetch(items())) as ready:
        assert [next(ready), next(ready)] == [0, 1]
    assert running() == 0
    assert len(made) <= 3


def test_an_error_ahead_is_raised_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise UsageError("broken")

    ready = prefetch(items())
    assert next(ready) == 1
    with pytest.raises(UsageError, match="broken"):
        next(ready)
    assert running() == 0


def test_lengths() -> None:
    assert lengths(make_sequences([4, 2, 3])).tolist() == [4, 2, 3]


def test_added_columns_are_cut_and_joined_with_their_rows_and_sequences() -> None:
    whole = make_sequences([3, 5, 2, 7], overlap=1)
    rows, sequences = np.arange(whole.rows), np.arange(4)
    whole = replace(whole, row_columns={"mark": rows}, sequence_columns={"weight": sequences})
    parts = [part(whole, 0, 1), part(whole, 1, 4)]
    assert [len(one.row_columns["mark"]) for one in parts if one.row_columns] == [one.rows for one in parts]
    again = join(parts[::-1])
    assert again.row_columns is not None
    assert again.sequence_columns is not None
    assert again.sequence_columns["weight"].tolist() == [1, 2, 3, 0]
    assert again.row_columns["mark"].tolist() == [*rows[parts[0].rows :], *rows[: parts[0].rows]]
