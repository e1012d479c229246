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
        assert partition_by_mean(scores).tolist() == [score > exact_mean for score in scores]


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"partition='median_of' is not known; choose one of: .*mean"):
        preferred_mask([1.0, 2.0], "median_of")
    assert PARTITIONS["mean"] is partition_by_mean
