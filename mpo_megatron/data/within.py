"""Figures within groups: how far scores are apart as groups grow, and how lengths go with scores.

Shapes: G groups, R responses; those of a group lie one after the other, as `sizes` [G] says.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Sizes = NDArray[np.int64]

# Spacing is given up to so many responses.
MOST_RESPONSES = 32


@dataclass(frozen=True)
class Spacing:
    """The mean gap between neighbouring scores when n responses of a group are drawn (paper Fig. 10).

    Attributes:
        n: responses.
        groups: that have so many, and so count.
        mean: over the groups, in units of score.
        deviation: standard deviation over the groups; 0 of a single one.
    """

    n: int
    groups: int
    mean: float
    deviation: float


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error, None where there are too few groups for one."""

    value: float
    error: float | None


@dataclass(frozen=True)
class LengthsByScore:
    """How lengths go with scores.

    Attributes:
        preferred: mean length of the preferred responses of a group, mean over the groups that have both kinds.
        dispreferred: the same of the others that are kept.
        difference: preferred less dispreferred, group by group.
        correlation: of length and score within groups, both less their group's mean, over all responses; None where
            lengths or scores do not differ within groups. Its error is found by leaving out one group at a time.
    """

    preferred: float
    dispreferred: float
    difference: Estimate
    correlation: Estimate | None


def spacing(sizes: Sizes, scores: Floats) -> list[Spacing]:
    """Spacing for n = 2, 3, ... up to the largest group's size, or to MOST_RESPONSES.

    A group of N responses gives the expectation over all its subsets of n, exactly: the mean gap of a subset is its
    range over n - 1, and the i-th of N ascending scores is the highest of C(i - 1, n - 1) of the C(N, n) subsets.

    Args:
        scores: [R].
    """
    most = min(int(sizes.max(initial=0)), MOST_RESPONSES)
    found: dict[int, list[Floats]] = {n: [] for n in range(2, most + 1)}
    offsets = np.cumsum(sizes) - sizes
    for size in np.unique(sizes):
        ordered = np.sort(scores[offsets[sizes == size][:, None] + np.arange(size)], axis=1)
        for n in range(2, min(int(size), most) + 1):
            found[n].append(ordered @ _range_weights(int(size), n) / (n - 1))
    spacings = []
    for n, parts in found.items():
        gaps = np.concatenate(parts)
        deviation = float(gaps.std(ddof=1)) if gaps.size > 1 else 0.0
        spacings.append(Spacing(n, gaps.size, float(gaps.mean()), deviation))
    return spacings


def _range_weights(size: int, n: int) -> Floats:
    """[size] weights of ascending scores whose sum is the expected range of a subset of n."""
    highest = np.array([math.comb(i, n - 1) / math.comb(size, n) for i in range(size)])
    return highest - highest[::-1]


def lengths_by_score(
    sizes: Sizes,
    scores: Floats,
    lengths: Floats,
    preferred: NDArray[np.bool_],
    dispreferred: NDArray[np.bool_],
) -> LengthsByScore | None:
    """None where no group has both preferred and dispreferred responses.

    Args:
        scores, lengths, preferred, dispreferred: [R]; a response that is not kept is neither of the last two.
    """
    group = np.repeat(np.arange(sizes.size), sizes)
    counts = [np.bincount(group[mask], minlength=sizes.size) for mask in (preferred, dispreferred)]
    both = (counts[0] > 0) & (counts[1] > 0)
    if not both.any():
        return None
    above, below = (
        np.bincount(group[mask], lengths[mask], sizes.size)[both] / count[both]
        for mask, count in zip((preferred, dispreferred), counts, strict=True)
    )
    return LengthsByScore(
        float(above.mean()),
        float(below.mean()),
        _mean(above - below),
        _correlation(group, sizes, scores, lengths),
    )


def _mean(values: Floats) -> Estimate:
    error = float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else None
    return Estimate(float(values.mean()), error)


def _correlation(group: Sizes, sizes: Sizes, first: Floats, second: Floats) -> Estimate | None:
    """Of two values [R], each less its group's mean."""
    first, second = (values - (np.bincount(group, values) / sizes)[group] for values in (first, second))
    products, squares, others = (
        np.bincount(group, left * right)
        for left, right in ((first, second), (first, first), (second, second))
    )
    if squares.sum() == 0 or others.sum() == 0:
        return None
    value = products.sum() / math.sqrt(squares.sum() * others.sum())
    rest = (squares.sum() - squares) * (others.sum() - others)
    if not (rest > 0).all():
        return Estimate(float(value), None)
    without = (products.sum() - products) / np.sqrt(rest)
    error = math.sqrt((1 - 1 / sizes.size) * float(np.square(without - without.mean()).sum()))
    return Estimate(float(value), error)


def length_by_place(sizes: Sizes, scores: Floats, lengths: Floats) -> tuple[Floats, Floats]:
    """By place in its group, the highest score first: how much longer a response is than its group's mean.

    Of equal scores the first counts as the higher. Places beyond MOST_RESPONSES are left out.

    Returns:
        ([K] means over the groups that have the place, [K] their standard errors, 0 of a single group).
    """
    group = np.repeat(np.arange(sizes.size), sizes)
    longer = lengths - (np.bincount(group, lengths) / sizes)[group] if sizes.size else lengths
    order = np.lexsort((-scores, group))
    place = np.empty(scores.size, dtype=np.int64)
    place[order] = np.arange(scores.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shown = [longer[place == k] for k in range(min(int(sizes.max(initial=0)), MOST_RESPONSES))]
    means = np.array([values.mean() for values in shown])
    errors = np.array(
        [values.std(ddof=1) / math.sqrt(values.size) if values.size > 1 else 0.0 for values in shown]
    )
    return means, errors
