r"""Objectives of a whole group at once: rankings, bins of a ranking, and distributions over the group.

In all of them z_i = beta r_i with r_i = log pi(y_i | x) - log pi_ref(y_i | x), S_i the scores, n the group's size.

Shapes: R responses, G groups, P pairs of responses of one group.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_megatron.objectives.hyper import Positive, Range
from mpo_megatron.objectives.ragged import (
    above_mean,
    first_highest,
    group_pairs,
    group_starts,
    segment_any,
    segment_log_softmax,
    segment_logsumexp,
    segment_mean,
    segment_size,
    segment_sum,
)
from mpo_megatron.objectives.registry import GroupBatch, ObjectiveResult, register


@register(
    "plackett_luce",
    contrasts="each response against all that are ranked below it",
    source="Plackett 1975; MPO paper, section 3.2",
    settings="beta 0.01",
)
def plackett_luce(batch: GroupBatch, *, beta: Positive) -> ObjectiveResult:
    """Plackett-Luce: -sum_j [z_(j) - logsumexp(z_(j), .., z_(n))], (1) .. (n) the order of falling scores.

    Equal scores keep the order of the data. Source: Plackett 1975, The Analysis of Permutations; MPO paper section 3.2,
    whose authors used beta 0.01.
    """
    rewards = beta * batch.log_ratios
    losses = ordered_contrast(rewards, ranks(batch), batch.group_index, batch.num_groups)
    return ObjectiveResult(losses, rewards.detach())


@register(
    "ordered_bins",
    contrasts="each of k score-ordered bins against all lower ones",
    source="MPO paper, Fig. 7",
    settings="k between 2 and n, beta 0.01",
)
def ordered_bins(batch: GroupBatch, *, beta: Positive, k: Annotated[int, Range(2)]) -> ObjectiveResult:
    """The likelihood of k score-ordered bins B_1 > .. > B_k; k = 2 is MPO, k = n is Plackett-Luce.

    loss = sum_c [logsumexp of z over B_c and all lower bins - logsumexp of z over B_c]. The MPO paper (Fig. 7, beta
    0.01) does not say how the bins are cut. Here the first cut is the partition, and each further one divides the bin
    with the largest sum of squared deviations (the upper one of several) at its mean score. So a group has at most as
    many bins as responses; equal scores that the partition leaves together stay together.
    """
    rewards = beta * batch.log_ratios
    losses = ordered_contrast(rewards, cut_bins(batch, k), batch.group_index, batch.num_groups)
    return ObjectiveResult(losses, rewards.detach())


def ordered_contrast(z: Tensor, bins: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    """[G] sum over a group's bins of logsumexp(this bin and all lower ones) - logsumexp(this bin).

    Args:
        z: [R] logits.
        bins: [R] int64 in [0, n), the bin of each response; 0 is the highest.
        group_index: [R] group of each response.
    """
    # A group has as many slots as responses, and bin b has slot b: R slots in all, some of them without a member.
    starts, num_slots = group_starts(group_index, num_groups)[group_index], len(z)
    slot = starts + bins
    # Of each slot, the responses of its group that lie in its bin or in a lower one.
    of_slot, response = group_pairs(group_index, num_groups)
    lower = bins[response] >= of_slot - starts[of_slot]
    bin_and_lower = segment_logsumexp(z[response[lower]], of_slot[lower], num_slots)
    own = segment_logsumexp(z, slot, num_slots)
    used = segment_size(slot, num_slots) > 0
    return segment_sum((bin_and_lower[used] - own[used]), group_index[used], num_groups)


def ranks(batch: GroupBatch) -> Tensor:
    """[R] int64 rank of each score in its group from 0, the highest; equal scores in the order of the data."""
    scores = batch.scores
    first, second = group_pairs(batch.group_index, batch.num_groups)
    ahead = (scores[second] > scores[first]) | ((scores[second] == scores[first]) & (second < first))
    return segment_sum(ahead.long(), first, len(scores))


def cut_bins(batch: GroupBatch, k: int) -> Tensor:
    """[R] int64 bin of each response, 0 the highest, of at most k bins; see `ordered_bins`."""
    scores, group, num_groups = batch.scores, batch.group_index, batch.num_groups
    starts, num_slots = group_starts(group, num_groups)[group], len(scores)
    bins = (~batch.preferred & segment_any(batch.preferred, group, num_groups)[group]).long()
    for _ in range(k - 2):
        slot = starts + bins
        above = above_mean(scores, slot, num_slots)
        deviation = scores - segment_mean(scores, slot, num_slots)[slot]
        spread = segment_sum(deviation.square(), slot, num_slots)
        spread = torch.where(segment_any(above, slot, num_slots), spread, -1.0)
        widest = first_highest(spread, group, num_groups)  # [G] slot
        divides = (spread[widest] >= 0)[group]
        widest_bin = (widest - starts[widest])[group]
        moves = (bins > widest_bin) | ((bins == widest_bin) & ~above)
        bins = bins + (divides & moves)
    return bins


@register(
    "infonca",
    contrasts="the whole group, towards a softmax of the scores",
    source="Chen et al. 2024, arXiv 2402.05369, Eq. 7",
    settings="beta 0.01, alpha by the scale of the scores",
    needs_partition=False,
)
def infonca(batch: GroupBatch, *, beta: Positive, alpha: Positive) -> ObjectiveResult:
    """InfoNCA: -sum_i p_i log softmax(z)_i with p = softmax(S / alpha); gradient softmax(z) - p (MPO paper Lemma 5).

    alpha is in units of the score. Source: Chen et al. 2024, Noise Contrastive Alignment of Language Models with
    Explicit Rewards; MPO paper Eq. 3. Its authors used beta 0.01 on UltraFeedback.
    """
    rewards = beta * batch.log_ratios
    group, num_groups = batch.group_index, batch.num_groups
    target = segment_log_softmax(batch.scores / alpha, group, num_groups).exp()
    losses = -segment_sum(target * segment_log_softmax(rewards, group, num_groups), group, num_groups)
    return ObjectiveResult(losses, rewards.detach())


@register(
    "nca",
    contrasts="each response alone, more by its share of a softmax of the scores",
    source="Chen et al. 2024, arXiv 2402.05369, Eq. 11",
    settings="beta 0.01, alpha by the scale of the scores",
    needs_partition=False,
)
def nca(batch: GroupBatch, *, beta: Positive, alpha: Positive) -> ObjectiveResult:
    """NCA: -sum_i [p_i log sigma(z_i) + (1/n) log sigma(-z_i)] with p = softmax(S / alpha).

    Unlike InfoNCA it fixes each z_i, not their differences alone. alpha is in units of the score. Source as `infonca`.
    At n = 2 with p one-hot it is the pairwise NCA.
    """
    rewards = beta * batch.log_ratios
    group, num_groups = batch.group_index, batch.num_groups
    target = segment_log_softmax(batch.scores / alpha, group, num_groups).exp()
    drawn = segment_sum(target * F.logsigmoid(rewards), group, num_groups)
    noise = segment_mean(F.logsigmoid(-rewards), group, num_groups)
    return ObjectiveResult(-drawn - noise, rewards.detach())


@register(
    "rpo",
    contrasts="the whole group, towards the gaps between the scores",
    source="NeMo-Aligner; Sun et al. 2025, arXiv 2502.00203",
    settings="beta 0.1, eta 1 (NeMo-Aligner's defaults)",
    needs_partition=False,
)
def rpo(
    batch: GroupBatch,
    *,
    beta: Positive,
    eta: Positive,
    distance: Literal["bwd_kl", "fwd_kl", "squared"] = "bwd_kl",
) -> ObjectiveResult:
    """Reward-aware preference optimization: the distance of p = softmax(eta S) from q = softmax(z).

    bwd_kl     sum_i p_i (log p_i - log q_i); it differs from InfoNCA at alpha = 1 / eta by a constant
    fwd_kl     sum_i q_i (log q_i - log p_i)
    squared    mean over the pairs i < j of (z_i - z_j - eta (S_i - S_j))^2

    At n = 2 they are NeMo-Aligner's rpo_bwd_kl, rpo_fwd_kl and rpo_sq, with eta its gt_reward_scale, in 1 / (units of
    score). Source: Sun et al. 2025, Reward-aware Preference Optimization.
    """
    rewards = beta * batch.log_ratios
    group, num_groups = batch.group_index, batch.num_groups
    wanted = eta * batch.scores
    if distance == "squared":
        # The mean over pairs of squared differences is twice the sample variance.
        gap = rewards - wanted
        centred = gap - segment_mean(gap, group, num_groups)[group]
        pairs = (segment_size(group, num_groups) - 1).clamp(min=1)
        return ObjectiveResult(2 * segment_sum(centred.square(), group, num_groups) / pairs, rewards.detach())
    log_p = segment_log_softmax(wanted, group, num_groups)
    log_q = segment_log_softmax(rewards, group, num_groups)
    if distance == "bwd_kl":
        terms = log_p.exp() * (log_p - log_q)
    else:
        terms = log_q.exp() * (log_q - log_p)
    return ObjectiveResult(segment_sum(terms, group, num_groups), rewards.detach())
