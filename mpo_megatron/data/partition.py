"""Preferred and dispreferred sets: from the scores of one group [n] to a mask [n] of its preferred responses.

A partition function takes float64 scores [n] and returns bool [n]; it is registered by name in `PARTITIONS`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mpo_megatron.errors import ConfigError

Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]


def partition_by_mean(scores: Scores) -> Mask:
    """Y+ = {i : S_i > S_mean}, strictly: a score equal to the mean is dispreferred (paper Eq. 5).

    Equal means equal up to float64 rounding. The mean of [0.1, 0.1, 0.1] rounds to a value other than 0.1,
    and of [0.3, 0.2, 0.1] to one below 0.2, so a bare comparison would prefer responses that tie with the
    mean, depending on the order of the scores. A score counts as above when it exceeds the mean by more than
    that rounding can explain: 2n units in the last place of the group's largest magnitude.
    """
    largest = np.max(np.abs(scores))
    if largest == 0.0:
        return np.zeros(len(scores), dtype=np.bool_)
    relative = scores / largest  # in [-1, 1], so that the sum cannot overflow
    above: Mask = relative - relative.mean() > 2 * len(scores) * np.finfo(np.float64).eps
    return above


PARTITIONS: dict[str, Callable[[Scores], Mask]] = {"mean": partition_by_mean}


def get_partition(name: str) -> Callable[[Scores], Mask]:
    """The partition function of that name. Raises ConfigError for a name that is not registered."""
    if name not in PARTITIONS:
        raise ConfigError(f"partition={name!r} is not known; choose one of: {', '.join(sorted(PARTITIONS))}")
    return PARTITIONS[name]


def preferred_mask(scores: Sequence[float], partition: str = "mean") -> Mask:
    """Bool [n]: which of a group's responses, with scores [n], are preferred. All False where none is."""
    return get_partition(partition)(np.asarray(scores, dtype=np.float64))
