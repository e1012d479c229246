"""Differences between members on the same held-out groups and seeds.

Groups differ from one another far more than members do on a group, and members share groups, order and seeds: the
difference is taken group by group and seed by seed, and what varies of it is its error.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpo_megatron.means import mean_and_error

# A value for each group, by the group's id, for each seed.
BySeed = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Difference:
    """The mean difference over groups and seeds, with two standard errors.

    Attributes:
        over_groups: of the groups' differences, each the mean over seeds: what other held-out groups would change. None
            of a single group.
        over_seeds: of the seeds' differences, each the mean over groups: what other seeds would change. None of a
            single seed.
        groups, seeds: how many both members have.
    """

    mean: float
    over_groups: float | None
    over_seeds: float | None
    groups: int
    seeds: int

    @property
    def error(self) -> float | None:
        """Both together, as if independent: a little too large, since the noise of single values is in both. None
        without either.
        """
        known = [error for error in (self.over_groups, self.over_seeds) if error is not None]
        return math.hypot(*known) if known else None


def difference(member: BySeed, baseline: BySeed) -> Difference | None:
    """`member` less `baseline`, over the seeds and groups of both; None where they have none in common."""
    seeds = [seed for seed in member if seed in baseline]
    groups = [
        name
        for name in (member[seeds[0]] if seeds else ())
        if all(name in member[seed] and name in baseline[seed] for seed in seeds)
    ]
    if not groups:
        return None
    values = np.array([[member[seed][name] - baseline[seed][name] for name in groups] for seed in seeds])
    over_groups, over_seeds = (mean_and_error(values.mean(axis).tolist()).error for axis in (0, 1))
    return Difference(float(values.mean()), over_groups, over_seeds, len(groups), len(seeds))
