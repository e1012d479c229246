import itertools
import math

import numpy as np
import pytest

from mpo_megatron.data.partition import PARTITIONS, partition_by_mean, preferred_mask
from mpo_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([7.0, 3.0], [True, False]),
        ([1.0, 2.0, 3.0, 10.0], [False, False, False, True]),  # mean 4
        ([-1.0, -2.0, -3.0, -10.0], [True, True, True, False]),
        ([1.0, 2.0, 3.0], [False, False, True]),  # a tie with the mean is dispreferred
        ([0.0, 0.0, 1.0, 1.0], [False, False, True, True]),
        ([5.0], [False]),
        ([0.0, 0.0], [False, False]),
    ],
)
def test_strictly_above_the_mean(scores: list[float], expected: list[bool]) -> None:
    mask = preferred_mask(scores)
    assert mask.dtype == np.bool_
    assert mask.tolist() == expected


@pytest.mark.parametrize("n", range(2, 17))
@pytest.mark.parametrize("score", [0.1, 1 / 3, -0.7, 1e300, 5e-324, 1234567.89])
def test_equal_scores_have_no_preferred_response(score: float, n: int) -> None:
    assert not preferred_mask([score] * n).any()


def test_rounded_means_do_not_decide() -> None:
    """The mean of 0.3, 0.2 and 0.1 in float64 is below 0.2 or not, depending on their order."""
    rounded = {np.mean(order) < 0.2 for order in itertools.permutations([0.3, 0.2, 0.1])}
    assert rounded == {True, False}
    for order in itertools.permutations([0.3, 0.2, 0.1]):
        assert preferred_mask(order).tolist() == [score == 0.3 for score in order]


@pytest.mark.parametrize("scale", [1e-300, 1e-6, 1.0, 1e6, 1e300])
def test_scale_does_not_decide(scale: float) -> None:
    assert preferred_mask([1.0 * scale, 1.5 * scale, 0.2 * scale]).tolist() == [True, True, False]


def test_largest_floats_do_not_overflow() -> None:
    assert preferred_mask([1.7e308, 1.6e308, -1.7e308, -1.7e308]).tolist() == [True, True, False, False]


def test_small_differences_on_a_large_offset_count() -> None:
    assert preferred_mask([1e6, 1e6 + 1e-6]).tolist() == [False, True]


def test_mask_splits_at_the_mean_of_random_scores() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = rng.normal(size=rng.integers(2, 9)) * 10.0 ** rng.integers(-3, 4)
        exact_mean = math.fsum(scores) / len(scores)
        assert preferred_mask(list(scores)).tolist() == [score > exact_mean for score in scores]


@pytest.mark.parametrize(
    ("partition", "scores", "expected"),
    [
        ("median", [1.0, 2.0, 3.0, 10.0], [0, 0, 1, 1]),  # median 2.5
        ("median", [1.0, 2.0, 3.0], [0, 0, 1]),  # a tie with the median is dispreferred
        ("median", [5.0, 5.0, 5.0, 9.0], [0, 0, 0, 1]),
        ("median", [1.0, 5.0, 5.0, 5.0], [0, 0, 0, 0]),  # none is above
        # Of ten, 0 and 100 are left out: mean of the others 4.5, of all 13.6.
        ("trimmed_mean", [0, 1, 2, 3, 4, 5, 6, 7, 8, 100], [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]),
        ("mean", [0, 1, 2, 3, 4, 5, 6, 7, 8, 100], [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        ("trimmed_mean", [1.0, 2.0, 3.0, 10.0], [0, 0, 0, 1]),  # of four none is left out
        ("best", [1.0, 7.0, 3.0], [0, 1, 0]),
        ("best", [7.0, 1.0, 7.0], [1, 0, 0]),  # of the highest the first
    ],
)
def test_other_partitions(partition: str, scores: list[float], expected: list[int]) -> None:
    assert preferred_mask(scores, partition).tolist() == [bool(e) for e in expected]


@pytest.mark.parametrize(
    ("k", "scores", "expected"),
    [
        (2, [9.0, 1.0, 7.0, 3.0], [1, 0, 1, 0]),
        (2, [9.0, 8.0, 7.0, 3.0], [1, 1, 0, 0]),  # the mean, 6.75, would prefer three
        (1, [3.0, 3.0, 1.0], [1, 0, 0]),
        (3, [2.0, 7.0], [0, 1]),
        (2, [5.0, 5.0, 5.0, 5.0], [0, 0, 0, 0]),
    ],
)
def test_the_selected_best(k: int, scores: list[float], expected: list[int]) -> None:
    assert preferred_mask(scores, "selected", k).tolist() == [bool(e) for e in expected]


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("score", [0.0, 0.1, -1 / 3, 1e300])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 11])
def test_ties_have_no_preferred_response_under_any(partition: str, score: float, n: int) -> None:
    assert not preferred_mask([score] * n, partition, 1).any()


@pytest.mark.parametrize("partition", PARTITIONS)
def test_many_groups_as_each_alone(partition: str) -> None:
    scores = np.random.default_rng(0).normal(size=(50, 12)).round(1)
    together = PARTITIONS[partition](scores, 3)
    assert together.tolist() == [preferred_mask(one, partition, 3).tolist() for one in scores]
    assert together.any(axis=1).all()
    assert not together.all(axis=1).any()


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"partition='median_of' is not known; choose one of: .*mean"):
        preferred_mask([1.0, 2.0], "median_of")
    assert PARTITIONS["mean"] is partition_by_mean
