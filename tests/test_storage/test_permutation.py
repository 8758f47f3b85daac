"""The order of an epoch is a bijection that depends on nothing but its arguments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.permutation import Permutation


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-(2**40), 2**70), epoch=st.integers(0, 1000))
def test_every_item_occurs_once(n, seed, epoch):
    items = Permutation(n, seed, epoch)(np.arange(n))
    np.testing.assert_array_equal(np.sort(items), np.arange(n))


@pytest.mark.parametrize("n", [2**20, 2**20 + 1, 10**12, 2**62])
def test_large_ranges(n):
    positions = np.random.default_rng(0).integers(0, n, 5000)
    items = Permutation(n, 0, 0)(positions)
    assert items.min() >= 0
    assert items.max() < n
    assert len(np.unique(items)) == len(np.unique(positions))


def test_positions_can_be_asked_in_any_portion_and_shape():
    order = Permutation(1000, 7, 2, "digest")
    whole = order(np.arange(1000))
    np.testing.assert_array_equal(np.concatenate([order(np.arange(0, 300)), order(range(300, 1000))]), whole)
    assert order(np.arange(6).reshape(2, 3)).shape == (2, 3)
    assert int(order(np.array(5))) == whole[5]


def test_seed_epoch_digest_and_length_all_change_the_order():
    orders = [(1000, 0, 0, ""), (1000, 1, 0, ""), (1000, 0, 1, ""), (1000, 0, 0, "x"), (999, 0, 0, "")]
    items = [Permutation(*arguments)(np.arange(900)).tolist() for arguments in orders]
    assert len({tuple(order) for order in items}) == len(orders)


def test_it_looks_random():
    """Neighbours are far apart and positions uncorrelated, as for a random order (bounds at about five sigma)."""
    items = Permutation(10_000, 1, 0)(np.arange(10_000))
    assert abs(np.corrcoef(items, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.abs(np.diff(items)).mean() / 10_000 - 1 / 3) < 0.02
    assert (items == np.arange(10_000)).sum() < 10


def test_golden():
    """Changing this order would break the resumption of training."""
    assert Permutation(10, 0, 0)(np.arange(10)).tolist() == GOLDEN


def test_out_of_range():
    with pytest.raises(IndexError, match="positions 3 to 3; the order has 3"):
        Permutation(3, 0, 0)([3])
    assert Permutation(0, 0, 0)([]).shape == (0,)
    with pytest.raises(ValueError, match="n is -1"):
        Permutation(-1, 0, 0)


GOLDEN = [1, 9, 3, 6, 0, 8, 5, 2, 4, 7]
