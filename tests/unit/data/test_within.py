"""Spacing of scores and lengths by score, against all subsets and against figures by hand."""

import itertools
import math

import numpy as np
import pytest

from mpo_megatron.data.within import (
    MOST_RESPONSES,
    Estimate,
    length_by_place,
    lengths_by_score,
    spacing,
)

SIZES = np.array([5, 2, 3, 7])


def test_spacing_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(0)
    groups = [np.round(rng.normal(size=size), 1) for size in SIZES]
    found = spacing(SIZES, np.concatenate(groups))
    assert [(of.n, of.groups) for of in found] == [(2, 4), (3, 3), (4, 2), (5, 2), (6, 1), (7, 1)]
    for of in found:
        by_group = [
            np.mean([np.diff(np.sort(subset)).mean() for subset in itertools.combinations(scores, of.n)])
            for scores in groups
            if scores.size >= of.n
        ]
        assert of.mean == pytest.approx(np.mean(by_group), abs=1e-12)
        assert of.deviation == pytest.approx(np.std(by_group, ddof=1) if of.groups > 1 else 0.0, abs=1e-12)


def test_spacing_of_scores_that_are_evenly_spread() -> None:
    """n of many uniform scores have the mean gap 1 / (n + 1): it falls as 1 / n (paper Theorem 2's model)."""
    size = 400
    found = spacing(np.array([size]), (np.arange(size) + 0.5) / size)
    assert len(found) == MOST_RESPONSES - 1
    for of in found:
        assert of.mean == pytest.approx(1 / (of.n + 1), rel=0.01)


def test_no_groups() -> None:
    nothing, nobody = np.zeros(0), np.zeros(0, dtype=np.bool_)
    sizes = np.zeros(0, dtype=np.int64)
    assert spacing(sizes, nothing) == []
    assert lengths_by_score(sizes, nothing, nothing, nobody, nobody) is None
    assert [values.size for values in length_by_place(sizes, nothing, nothing)] == [0, 0]


def test_lengths_by_score_by_hand() -> None:
    sizes = np.array([3, 2, 2])
    scores = np.array([3.0, 1.0, 2.0, 5.0, 4.0, 1.0, 1.0])
    lengths = np.array([10.0, 40.0, 20.0, 6.0, 8.0, 1.0, 3.0])
    preferred = np.array([True, False, False, True, False, False, False])
    dispreferred = np.array([False, True, False, False, True, True, True])
    found = lengths_by_score(sizes, scores, lengths, preferred, dispreferred)
    # The third group has no preferred response; the third response of the first is not kept.
    assert found is not None
    assert (found.preferred, found.dispreferred) == (8.0, 24.0)
    assert found.difference.value == -16.0
    assert found.difference.error == pytest.approx(14.0)
    # Less the group's mean: scores (1, -1, 0), (1/2, -1/2), (0, 0), lengths (-40, 50, -10) / 3, (-1, 1), (-1, 1).
    products, squares, others = (
        np.array([-30.0, -1.0, 0.0]),
        np.array([2.0, 0.5, 0.0]),
        np.array([1400 / 3, 2, 2]),
    )
    assert found.correlation is not None
    assert found.correlation.value == pytest.approx(-31 / math.sqrt(2.5 * (1400 / 3 + 4)))
    without = [
        np.delete(products, g).sum() / math.sqrt(np.delete(squares, g).sum() * np.delete(others, g).sum())
        for g in range(3)
    ]
    assert found.correlation.error == pytest.approx(
        math.sqrt(2 / 3 * np.sum(np.square(without - np.mean(without))))
    )


def test_a_correlation_that_cannot_be_told() -> None:
    sizes, up = np.array([2, 2]), np.array([0.0, 1.0, 0.0, 1.0])
    best = up > 0
    same = lengths_by_score(sizes, up, np.full(4, 7.0), best, ~best)
    assert same is not None
    assert same.correlation is None
    one = lengths_by_score(np.array([2]), up[:2], up[:2], best[:2], ~best[:2])
    assert one is not None
    assert (one.difference, one.correlation) == (Estimate(1.0, None), Estimate(1.0, None))


def test_the_correlation_sees_no_difference_between_groups() -> None:
    """Prompts with long answers and high scores: only what differs within a group counts; its error is a fair one."""
    rng = np.random.default_rng(1)
    errors, values = [], []
    for _ in range(40):
        level = np.repeat(rng.normal(scale=10, size=100), 4)
        scores, lengths = level + rng.normal(size=400), 50 + level + rng.normal(size=400)
        found = lengths_by_score(np.full(100, 4), scores, lengths, scores > level, scores <= level)
        assert found is not None
        assert found.correlation is not None
        assert found.correlation.error is not None
        values.append(found.correlation.value)
        errors.append(found.correlation.error)
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(40)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)


def test_length_by_place() -> None:
    sizes = np.array([3, 2])
    means, errors = length_by_place(
        sizes, np.array([1.0, 5.0, 1.0, 0.0, 9.0]), np.array([4.0, 1.0, 7.0, 2.0, 8.0])
    )
    # Places (2, 1, 3) and (2, 1); lengths less their mean (0, -3, 3) and (-3, 3).
    assert means.tolist() == [0.0, -1.5, 3.0]
    assert errors.tolist() == [pytest.approx(3.0), pytest.approx(1.5), 0.0]
