r"""Objectives of a whole group at once: rankings, bins of a ranking, and distributions over the group.

In all of them z_i = beta r_i with r_i = log pi(y_i | x) - log pi_ref(y_i | x), S_i the scores, n the group's size.

Shapes: R responses, G groups, P pairs of responses of one group.
"""

from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor

from mpo_megatron.objectives.hyper import Positive, Range
from mpo_megatron.objectives.registry import GroupBatch, ObjectiveResult, register
from mpo_megatron.ragged.groups import GroupIndex
from mpo_megatron.ragged.segments import (
    above_mean,
    segment_any,
    segment_log_softmax,
    segment_logsumexp,
    segment_max,
    segment_mean,
    segment_sum,
    spread,
)


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
    return ObjectiveResult(ordered_contrast(rewards, ranks(batch), batch.index), rewards.detach())


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
    return ObjectiveResult(ordered_contrast(rewards, cut_bins(batch, k), batch.index), rewards.detach())


def ordered_contrast(z: Tensor, bins: Tensor, index: GroupIndex) -> Tensor:
    """[G] sum over a group's bins of logsumexp(this bin and all lower ones) - logsumexp(this bin).

    Args:
        z: [R] logits.
        bins: [R] the bin of each response; 0 is the highest.
        index: of the responses.
    """
    own, other = index.both(bins)
    of_other = spread(z, index.second)
    bin_and_lower = segment_logsumexp(of_other, index.first, other >= own)
    same = other == own
    one_bin = segment_logsumexp(of_other, index.first, same)
    # All members of a bin have its term; that of the first counts.
    counts = ~segment_any(same & (index.second.segment < index.first.segment), index.first)
    return segment_sum(bin_and_lower - one_bin, index.groups, counts)


def ranks(batch: GroupBatch) -> Tensor:
    """[R] rank of each score in its group from 0, the highest; equal scores in the order of the data."""
    index = batch.index
    own, other = index.both(batch.scores)
    ahead = (other > own) | ((other == own) & (index.second.segment < index.first.segment))
    return segment_sum(ahead.to(own.dtype), index.first)


def cut_bins(batch: GroupBatch, k: int) -> Tensor:
    """[R] bin of each response, 0 the highest, of at most k bins; see `ordered_bins`."""
    scores, groups, index = batch.scores, batch.groups, batch.index
    cut = spread(segment_any(batch.preferred, groups), groups)
    bins = (~batch.preferred & cut).to(scores.dtype)
    for _ in range(k - 2):
        own, other = index.both(bins)
        same = own == other
        above = _above_mean_of_bin(scores, index, same)
        deviation = scores - segment_mean(spread(scores, index.second), index.first, same)
        spreads = segment_sum(spread(deviation.square(), index.second), index.first, same)
        divisible = segment_any(spread(above, index.second) & same, index.first)
        spreads = spreads.masked_fill(~divisible, -1)
        largest = spread(segment_max(spreads, groups), groups)
        # The first of several.
        widest = -spread(segment_max(-bins, groups, spreads == largest), groups)
        moves = (bins > widest) | ((bins == widest) & ~above)
        bins = bins + ((largest >= 0) & moves)
    return bins


def _above_mean_of_bin(scores: Tensor, index: GroupIndex, same: Tensor) -> Tensor:
    """[R] bool `above_mean` of each response among those of its bin; `same` [P] bool, both responses are in one bin."""
    itself = index.first.segment == index.second.segment
    above = above_mean(spread(scores, index.second), index.first, same)
    return segment_any(above & itself, index.first)


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
    groups = batch.groups
    target = segment_log_softmax(batch.scores / alpha, groups).exp()
    losses = -segment_sum(target * segment_log_softmax(rewards, groups), groups)
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
    groups = batch.groups
    target = segment_log_softmax(batch.scores / alpha, groups).exp()
    drawn = segment_sum(target * F.logsigmoid(rewards), groups)
    noise = segment_mean(F.logsigmoid(-rewards), groups)
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
    groups = batch.groups
    wanted = eta * batch.scores
    if distance == "squared":
        # The mean over pairs of squared differences is twice the sample variance.
        gap = rewards - wanted
        centred = gap - spread(segment_mean(gap, groups), groups)
        pairs = (groups.sizes - 1).clamp(min=1)
        return ObjectiveResult(2 * segment_sum(centred.square(), groups) / pairs, rewards.detach())
    log_p = segment_log_softmax(wanted, groups)
    log_q = segment_log_softmax(rewards, groups)
    if distance == "bwd_kl":
        terms = log_p.exp() * (log_p - log_q)
    else:
        terms = log_q.exp() * (log_q - log_p)
    return ObjectiveResult(segment_sum(terms, groups), rewards.detach())
