r"""Objectives that hold each response against a target of its own, not against the others.

r_i = log pi(y_i | x) - log pi_ref(y_i | x), S_i the scores, |y_i| a response's tokens, n the group's size.

Shapes: R responses, G groups.
"""

import math
from typing import Annotated

import torch
from torch import Tensor

from mpo_megatron.objectives.hyper import NotNegative, Positive, Range
from mpo_megatron.objectives.registry import GroupBatch, ObjectiveResult, register
from mpo_megatron.ragged.segments import (
    Segments,
    above_mean,
    first_highest,
    segment_any,
    segment_mean,
    segment_sum,
    spread,
)


@register(
    "kto",
    contrasts="each response against the mean log-ratio of the global batch",
    source="Ethayarajh et al. 2024, arXiv 2402.01306, Eq. 8",
    settings="beta 0.1, weights 1",
    needs_global_batch=True,
)
def kto(
    batch: GroupBatch,
    *,
    beta: Positive,
    desirable_weight: NotNegative = 1.0,
    undesirable_weight: NotNegative = 1.0,
) -> ObjectiveResult:
    """KTO, the mean over the group of: w+ (1 - sigma(beta (r_i - z0))) in Y+, w- (1 - sigma(beta (z0 - r_i))) outside.

    z0 is the matched reference point: max(0, mean of r over all responses of the global batch), detached. The paper
    estimates it from mismatched prompts and responses instead, which costs a forward pass of policy and reference over
    rows of their own. Source: Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization, with
    beta 0.1 and weights of 1.
    """
    ratios = batch.log_ratios
    reference_point = (ratios.detach().sum() / max(1, len(ratios))).clamp(min=0)
    distance = beta * (ratios - reference_point)
    terms = torch.where(
        batch.preferred,
        desirable_weight * torch.sigmoid(-distance),
        undesirable_weight * torch.sigmoid(distance),
    )
    return ObjectiveResult(segment_mean(terms, batch.groups), (beta * ratios).detach())


@register(
    "sppo",
    contrasts="each response against its rate of wins over the others",
    source="Wu et al. 2024, arXiv 2405.00675, Eq. 4.7",
    settings="beta (their 1 / eta) 0.001",
    needs_partition=False,
)
def sppo(batch: GroupBatch, *, beta: Positive) -> ObjectiveResult:
    """SPPO: sum_i (r_i - (P_i - 1/2) / beta)^2, P_i the mean over the others j of sigma(S_i - S_j).

    The scores are those of a Bradley-Terry model: a difference of 1 wins at odds of e. Source: Wu et al. 2024,
    Self-Play Preference Optimization; beta is 1 / eta of theirs, 0.001.
    """
    ratios, index = batch.log_ratios, batch.index
    own, other = index.both(batch.scores)
    others = index.first.segment != index.second.segment
    wins = segment_mean(torch.sigmoid(own - other), index.first, others)
    losses = segment_sum((ratios - (wins - 0.5) / beta).square(), batch.groups)
    return ObjectiveResult(losses, ratios.detach())


@register(
    "grpo_offline",
    contrasts="each response by its standardised score",
    source="Shao et al. 2024, arXiv 2402.03300, Eq. 3, on fixed responses (MPO paper, Appendix I)",
    settings="clip 0.2, dual_clip 3 (PPO's)",
    needs_partition=False,
)
def grpo_offline(
    batch: GroupBatch,
    *,
    clip: Annotated[float, Range(0, 1, above=True)] = 0.2,
    dual_clip: Annotated[float, Range(1, above=True)] = 3.0,
    length_normalised: bool = False,
) -> ObjectiveResult:
    """GRPO on fixed responses: -sum_i min(rho_i A_i, clamp(rho_i, 1 - clip, 1 + clip) A_i).

    A_i = (S_i - mean) / std, 0 in a group of equal scores; rho_i = exp(r_i), or exp(r_i / |y_i|) where
    `length_normalised` (Zheng et al. 2025, GSPO), which lets long responses move further before the clip. At the first
    step rho = 1 and the gradient is -A_i times that of r_i. Where A_i < 0, a term is at most -dual_clip A_i (Ye et al.
    2020, dual-clip PPO); without, a bad response that has become likely would have a loss without limit. Source: Shao
    et al. 2024, DeepSeekMath; clip and 0.2 are PPO's (Schulman et al. 2017).
    """
    advantages = standardised(batch.scores, batch.groups)
    ratios = batch.log_ratios / batch.lengths if length_normalised else batch.log_ratios
    # Beyond dual_clip no gradient is left, so that exp needs no larger argument.
    rho = torch.exp(ratios.clamp(max=math.log(dual_clip) + 1))
    gain = torch.minimum(rho * advantages, rho.clamp(1 - clip, 1 + clip) * advantages)
    gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return ObjectiveResult(-segment_sum(gain, batch.groups), ratios.detach())


def standardised(scores: Tensor, groups: Segments) -> Tensor:
    """[R] (S_i - mean) / std of the group, with the std of the n scores themselves; 0 where all are equal."""
    deviation = scores - spread(segment_mean(scores, groups), groups)
    std = segment_mean(deviation.square(), groups).sqrt()
    equal = ~segment_any(above_mean(scores, groups), groups)
    standard = deviation / spread(std.masked_fill(equal, 1), groups)
    return standard.masked_fill(spread(equal, groups), 0)


@register(
    "sft",
    contrasts="nothing: the best response alone",
    source="cross-entropy per token",
    settings="none",
    needs_reference=False,
    needs_partition=False,
)
def sft(batch: GroupBatch) -> ObjectiveResult:
    """Supervised fine-tuning: -log pi(y_w | x) / |y_w|, w the first of the best-scored responses."""
    rewards = batch.mean_logps
    best = first_highest(batch.scores, batch.groups)
    return ObjectiveResult(-segment_sum(rewards, batch.groups, best), rewards.detach())
