"""What is reported of a group beside its loss: reward margin and preference accuracy of the implicit rewards.

Shapes: R responses, G groups.
"""

import torch
from torch import Tensor

from mpo_megatron.objectives.pairwise import cross_pairs
from mpo_megatron.objectives.registry import GroupBatch, ObjectiveResult
from mpo_megatron.ragged.segments import segment_any, segment_mean

METRICS = ("loss", "reward_margin", "accuracy", "preferred_reward", "dispreferred_reward")


def group_metrics(batch: GroupBatch, result: ObjectiveResult) -> Tensor:
    """[len(METRICS), G], detached; the mean over groups is what is logged.

    - `reward_margin`: mean reward of the preferred responses minus mean reward of the dispreferred ones;
    - `accuracy`: part of the (preferred, dispreferred) pairs whose rewards are in that order; a tie counts one half, so
      that a policy equal to its reference has 0.5.

    A group with no preferred response, or with no other, has nothing to compare: margin 0, accuracy one half, and its
    mean reward as that of both sets.

    A tie is an exact one, without a tolerance. Responses of equal log-probs have equal rewards to the last bit, since
    sums over tokens are added up in the tokens' order on every device (`mpo_megatron.ragged.segments`). So policy and
    reference are equal at step 0 where the model's own kernels give the same numbers twice for the same row: those of a
    CPU and, on a GPU, forward passes of matrix products and attention do; the atomic additions that some backward
    passes use, FlashAttention's by default, make gradients differ from run to run, not log-probs at the same weights.
    """
    rewards, preferred, groups = result.rewards, batch.preferred, batch.groups
    comparable = segment_any(preferred, groups) & segment_any(~preferred, groups)
    everyone = segment_mean(rewards, groups)
    above = segment_mean(rewards, groups, preferred).where(comparable, everyone)
    below = segment_mean(rewards, groups, ~preferred).where(comparable, everyone)
    first, second = batch.index.both(rewards)
    ordered = 0.5 * (1 + torch.sign(first - second))
    accuracy = segment_mean(ordered, batch.index.pairs, cross_pairs(batch)).masked_fill(~comparable, 0.5)
    return torch.stack((result.losses.detach(), above - below, accuracy, above, below))
