"""What is reported of a group beside its loss: reward margin and preference accuracy of the implicit rewards.

Shapes: R responses, G groups.
"""

import torch
from torch import Tensor

from mpo_megatron.objectives.registry import GroupBatch, ObjectiveResult, segment_mean

METRICS = ("loss", "reward_margin", "accuracy", "preferred_reward", "dispreferred_reward")


def group_metrics(batch: GroupBatch, result: ObjectiveResult) -> Tensor:
    """[len(METRICS), G], detached; the mean over groups is what is logged.

    - `reward_margin`: mean reward of the preferred responses minus mean reward of the dispreferred ones;
    - `accuracy`: part of the (preferred, dispreferred) pairs whose rewards are in that order; a tie counts one half, so
      that a policy equal to its reference has 0.5.
    """
    rewards, preferred, group = result.rewards, batch.preferred, batch.group_index
    above = segment_mean(rewards[preferred], group[preferred], batch.num_groups)
    below = segment_mean(rewards[~preferred], group[~preferred], batch.num_groups)
    first, second = torch.where(preferred[:, None] & ~preferred[None] & (group[:, None] == group[None]))
    ordered = 0.5 * (1 + torch.sign(rewards[first] - rewards[second]))
    accuracy = segment_mean(ordered, group[first], batch.num_groups)
    return torch.stack((result.losses.detach(), above - below, accuracy, above, below))
