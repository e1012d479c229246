"""Which groups each global step takes, and in which order. Pure: a function of the sizes, the seed and the step."""

import functools
import math
from collections.abc import Iterator

import numpy as np


@functools.lru_cache(maxsize=2)
def epoch_order(num_groups: int, seed: int, epoch: int) -> np.ndarray:
    """[num_groups] the order in which an epoch visits the groups: a permutation drawn from (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(num_groups)


def steps_per_epoch(num_groups: int, global_batch_size: int) -> int:
    """Steps that visit every group once; the last may have fewer groups than the others."""
    return math.ceil(num_groups / global_batch_size)


def step_groups(step: int, num_groups: int, global_batch_size: int, seed: int) -> np.ndarray:
    """The groups of global step `step` (from 0, over all epochs), as positions in the data set."""
    epoch, within = divmod(step, steps_per_epoch(num_groups, global_batch_size))
    order = epoch_order(num_groups, seed, epoch)
    # A copy: a view would keep the whole epoch's order alive for every step that is held.
    return order[within * global_batch_size : (within + 1) * global_batch_size].copy()


def in_order(num_groups: int, global_batch_size: int) -> Iterator[np.ndarray]:
    """The data set front to back in steps of `global_batch_size` groups, for validation."""
    for start in range(0, num_groups, global_batch_size):
        yield np.arange(start, min(start + global_batch_size, num_groups))
