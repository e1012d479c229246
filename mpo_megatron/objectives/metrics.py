"""What is reported of a group beside its loss: reward margin and preference accuracy of the implicit rewards.

Shapes: R responses, G groups.
"""

import torch
from torch import Tensor

from mpo_megatron.objectives.ragged import group_pairs, segment_any, segment_mean
from mpo_megatron.objectives.registry import GroupBatch, ObjectiveResult

METRICS = ("loss", "reward_margin", "accuracy", "preferred_reward", "dispreferred_reward")


def group_metrics(batch: GroupBatch, result: ObjectiveResult) -> Tensor:
    """[len(METRICS), G], detached; the mean over groups is what is logged.

    - `reward_margin`: mean reward of the preferred responses minus mean reward of the dispreferred ones;
    - `accuracy`: part of the (preferred, dispreferred) pairs whose rewards are in that order; a tie counts one half, so
      that a policy equal to its reference has 0.5.

    A group with no preferred response, or with no other, has nothing to compare: margin 0, accuracy one half, and its
    mean reward as that of both sets.
    """
    rewards, preferred, group, num_groups = (
        result.rewards,
        batch.preferred,
        batch.group_index,
        batch.num_groups,
    )
    comparable = segment_any(preferred, group, num_groups) & segment_any(~preferred, group, num_groups)
    everyone = segment_mean(rewards, group, num_groups)
    above = segment_mean(rewards[preferred], group[preferred], num_groups).where(comparable, everyone)
    below = segment_mean(rewards[~preferred], group[~preferred], num_groups).where(comparable, everyone)
    first, second = group_pairs(group, num_groups)
    crossed = preferred[first] & ~preferred[second]
    first, second = first[crossed], second[crossed]
    ordered = 0.5 * (1 + torch.sign(rewards[first] - rewards[second]))
    accuracy = segment_mean(ordered, group[first], num_groups).where(comparable, 0.5)
    return torch.stack((result.losses.detach(), above - below, accuracy, above, below))
