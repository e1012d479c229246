"""Preferred and dispreferred sets: from the scores of groups of one size to masks of their preferred responses.

A partition takes float64 scores [G, n] and the number k of a group's best responses that were selected, and returns
bool [G, n]; it is registered by name in `PARTITIONS`. A group whose responses tie has no preferred one, under every
partition. Tied means equal up to float64 rounding: the mean of [0.1, 0.1, 0.1] rounds to a value other than 0.1, and of
[0.3, 0.2, 0.1] to one below 0.2, so a bare comparison would prefer responses that tie with the mean, depending on the
order of the scores. A score counts as above a statistic when it exceeds it by more than that rounding can explain: 2n
units in the last place of the group's largest magnitude.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mpo_megatron.errors import ConfigError

Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]

TRIMMED = 0.1  # part of the scores that the trimmed mean leaves out at either end


def _relative(scores: Scores) -> Scores:
    """Scores as parts of their group's largest magnitude: in [-1, 1], so that sums cannot overflow."""
    largest = np.max(np.abs(scores), axis=-1, keepdims=True)
    return np.divide(scores, largest, out=np.zeros_like(scores), where=largest > 0)


def _above(relative: Scores, statistic: Scores) -> Mask:
    """Above by more than rounding can explain; `statistic` [G] is of `relative` [G, n]."""
    slack = 2 * relative.shape[-1] * np.finfo(np.float64).eps
    above: Mask = relative - statistic[..., None] > slack
    return above


def partition_by_mean(scores: Scores, k: int | None = None) -> Mask:
    """Y+ = {i : S_i > S_mean}, strictly: a score equal to the mean is dispreferred (paper Eq. 5)."""
    relative = _relative(scores)
    return _above(relative, relative.mean(axis=-1))


def partition_by_median(scores: Scores, k: int | None = None) -> Mask:
    """Y+ = {i : S_i > median}, strictly (paper Table 7); of an even number the mean of the two in the middle."""
    relative = _relative(scores)
    return _above(relative, np.median(relative, axis=-1))


def partition_by_trimmed_mean(scores: Scores, k: int | None = None) -> Mask:
    """Above the mean of the scores without the highest and the lowest 10% (paper Table 7), rounded down.

    Of fewer than ten responses nothing is left out: then it is the mean.
    """
    relative = np.sort(_relative(scores), axis=-1)
    cut = int(TRIMMED * scores.shape[-1])
    middle = relative[..., cut : scores.shape[-1] - cut]
    return _above(_relative(scores), middle.mean(axis=-1))


def partition_best(scores: Scores, k: int | None = None) -> Mask:
    """The best response against all others (the paper's MPO-1vsk); of several with the highest score the first."""
    return _top(scores, 1)


def partition_selected(scores: Scores, k: int | None = None) -> Mask:
    """The k best responses against the others: the sets that `keep_best` and `keep_worst` select (paper section 6).

    Of equal scores the first counts as the better; of a group of k or fewer the last is dispreferred.
    """
    assert k is not None, "partition=selected goes with keep_best"
    return _top(scores, k)


def _top(scores: Scores, k: int) -> Mask:
    relative = _relative(scores)
    # All equal, up to rounding: then none is above the lowest.
    differ = _above(relative, relative.min(axis=-1)).any(axis=-1, keepdims=True)
    mask: Mask = (ranks(scores) < min(k, scores.shape[-1] - 1)) & differ
    return mask


def ranks(scores: Scores) -> NDArray[np.int64]:
    """[G, n] the place of each score in its group, 0 the highest; of equal scores the first counts as the higher."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    return np.argsort(order, axis=-1, kind="stable")


PARTITIONS: dict[str, Callable[[Scores, int | None], Mask]] = {
    "mean": partition_by_mean,
    "median": partition_by_median,
    "trimmed_mean": partition_by_trimmed_mean,
    "best": partition_best,
    "selected": partition_selected,
}


def get_partition(name: str) -> Callable[[Scores, int | None], Mask]:
    """The partition function of that name. Raises ConfigError for a name that is not registered."""
    if name not in PARTITIONS:
        raise ConfigError(f"partition={name!r} is not known; choose one of: {', '.join(sorted(PARTITIONS))}")
    return PARTITIONS[name]


def preferred_mask(scores: Sequence[float], partition: str = "mean", k: int | None = None) -> Mask:
    """Bool [n]: which of a group's responses, with scores [n], are preferred. All False where none is."""
    return get_partition(partition)(np.asarray(scores, dtype=np.float64)[None], k)[0]
