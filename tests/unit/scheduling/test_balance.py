"""Bins by hand where the answer is known, and what must hold of any bins over random weights."""

import math
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_megatron.scheduling import balance

weight_lists = st.lists(st.integers(1, 100), max_size=60)


def loads(bins: balance.Bins, weights: Sequence[float]) -> list[float]:
    return [sum(weights[item] for item in items) for items in bins]


def items_of(bins: balance.Bins) -> list[int]:
    return sorted(item for items in bins for item in items)


def test_first_fit_decreasing_by_hand() -> None:
    # 6 | 5 | 4 joins the 6, 3 and 2 the 5.
    assert balance.first_fit_decreasing([2, 6, 3, 5, 4], 10) == [[1, 4], [3, 2, 0]]
    assert balance.first_fit_decreasing([], 10) == []
    assert balance.first_fit_decreasing([10], 10) == [[0]]
    assert balance.first_fit_decreasing([1] * 5, 1) == [[0], [1], [2], [3], [4]]


@settings(max_examples=150, deadline=None)
@given(weight_lists, st.integers(100, 300))
def test_first_fit_decreasing_is_that_of_the_textbook(weights: list[int], capacity: int) -> None:
    expected: balance.Bins = []
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        for items in expected:
            if sum(weights[other] for other in items) + weights[item] <= capacity:
                items.append(item)
                break
        else:
            expected.append([item])
    assert balance.first_fit_decreasing(weights, capacity) == expected


def test_fit_evens_out_what_longest_processing_time_leaves() -> None:
    # Longest processing time gives 17, 16 and 12; the even bins are 9+6, 8+7 and 5+5+5.
    weights = [9, 8, 7, 6, 5, 5, 5]
    bins = balance.fit(weights, 3, 100, goal=15)
    assert bins is not None
    assert loads(bins, weights) == [15, 15, 15]


def test_fit_falls_back_to_first_fit_decreasing() -> None:
    # By longest processing time these are [5, 3, 3] and [5, 4]; within 10 they are [5, 5] and [4, 3, 3].
    weights = [5, 5, 4, 3, 3]
    bins = balance.fit(weights, 2, 10, goal=10)
    assert bins is not None
    assert loads(bins, weights) == [10, 10]
    assert balance.fit([6, 6, 6], 2, 10, goal=10) is None


@settings(max_examples=150, deadline=None)
@given(weight_lists, st.integers(100, 300), st.integers(1, 12))
def test_fit_is_within_capacity_and_no_worse_than_first_fit_decreasing(
    weights: list[int], capacity: int, num_bins: int
) -> None:
    goal = max(math.ceil(sum(weights) / num_bins), max(weights, default=0))
    bins = balance.fit(weights, num_bins, capacity, goal)
    if bins is None:
        assert len(balance.first_fit_decreasing(weights, capacity)) > num_bins
        return
    assert len(bins) == num_bins
    assert items_of(bins) == list(range(len(weights)))
    assert max(loads(bins, weights)) <= capacity


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(1, 100), max_size=8), min_size=1, max_size=8), st.booleans(), st.data())
def test_even_out_only_helps(content: list[list[int]], keep_counts: bool, data: st.DataObject) -> None:
    weights = [weight for items in content for weight in items]
    numbers = iter(range(len(weights)))
    bins = [[next(numbers) for _ in items] for items in content]
    base = [float(data.draw(st.integers(0, 50))) for _ in content]
    before = max(b + load for b, load in zip(base, loads(bins, weights), strict=True))
    balance.even_out(bins, weights, 0, base=base, keep_counts=keep_counts)
    assert items_of(bins) == list(range(len(weights)))
    assert max(b + load for b, load in zip(base, loads(bins, weights), strict=True)) <= before
    if keep_counts:
        assert [len(items) for items in bins] == [len(items) for items in content]


def test_even_out_stops_at_the_goal() -> None:
    weights = [4, 3, 3, 2]
    bins = [[0, 1, 2], [3]]
    balance.even_out(bins, weights, goal=10)
    assert bins == [[0, 1, 2], [3]]
    balance.even_out(bins, weights, goal=9)
    assert sorted(loads(bins, weights)) == [6, 6]


def test_deal_makes_hands_equally_long_and_gives_the_heavy_to_the_light() -> None:
    # The first hand already holds a card, so the other two get one each before it gets any.
    hands = balance.deal([5, 4, 3, 2, 1], range(5), lengths=[1, 0, 0], base=[0, 10, 0])
    assert hands == [[2], [1, 4], [0, 3]]
    assert balance.deal([5, 4], [1], lengths=[0, 0], base=[0, 0]) == [[1], []]


def test_trade_swaps_items_between_hands_and_keeps_bins_within_capacity() -> None:
    # Costs are 14 and 1. To swap 9 for 1 is best, but makes the first bin's size 10; 5 for 1 makes it 8.
    costs, sizes = [9.0, 5.0, 1.0], [2, 4, 6]
    for capacity, expected in ((10, [6.0, 9.0]), (8, [10.0, 5.0])):
        bins = [[0, 1], [2]]
        balance.trade([[0], [1]], bins, costs, sizes, capacity, goal=5.0, base=[0.0, 0.0])
        assert loads(bins, costs) == expected
    # Here it makes the second bin's size 10; 9 for 0 leaves it at 7.
    costs, sizes = [9.0, 5.0, 1.0, 0.0], [5, 3, 2, 5]
    for capacity, expected in ((10, [6.0, 9.0]), (8, [5.0, 10.0])):
        bins = [[0, 1], [2, 3]]
        balance.trade([[0], [1]], bins, costs, sizes, capacity, goal=5.0, base=[0.0, 0.0])
        assert loads(bins, costs) == expected


def test_trade_leaves_what_is_balanced_by_its_base() -> None:
    bins = [[0, 1], [2, 3]]
    balance.trade([[0], [1]], bins, [9.0, 5.0, 3.0, 1.0], [1] * 4, 9, goal=14.0, base=[0.0, 10.0])
    assert bins == [[0, 1], [2, 3]]
