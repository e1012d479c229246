r"""Multi-Preference Optimization: the preferred set against the whole group, in log space.

For a group of responses y_1..y_n with scores S_i, partition Y+ = {i : S_i > mean S}, and implicit score
r_i = log pi(y_i | x) - log pi_ref(y_i | x):

    z_i  = beta r_i                             MPO     (paper Eq. 4)
    z_i  = beta r_i + alpha dW_i                W-MPO   (Eq. 7; dW_i = |S_i - mean S| absolute, Eq. 6, or
                                                         S_i - mean S signed, Eq. 14)
    loss = logsumexp_i z_i - logsumexp_{i in Y+} z_i    (Eq. 5 / Eq. 8)

with gradient d loss / d z_i = softmax(z)_i - softmax_{Y+}(z)_i (Lemma 6). The paper's code clamps the two
probability sums at 1e-10, which zeroes the gradient where the loss is largest; a difference of log-sum-exps
needs no clamp.

The paper is that of Multi-Preference Optimization (Gupta et al.; its first version was called SWEPO).

Shapes: R responses, G groups; `mpo_loss` takes [G, n] tensors.
"""

from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from mpo_megatron.objectives.hyper import NotNegative, Positive
from mpo_megatron.objectives.registry import GroupBatch, ObjectiveResult, register
from mpo_megatron.ragged.segments import (
    Segments,
    above_mean,
    first_highest,
    segment_any,
    segment_logsumexp,
    segment_mean,
    spread,
)
from mpo_megatron.ragged.transfer import to_device

Weighting = Literal["absolute", "signed"]


def set_contrast(z: Tensor, preferred: Tensor, groups: Segments) -> Tensor:
    """[G] logsumexp over the group minus logsumexp over its preferred set (paper Eq. 5).

    Args:
        z: [R] logits.
        preferred: [R] bool; every group has at least one, otherwise its loss is +inf.
        groups: the responses in G groups.
    """
    return segment_logsumexp(z, groups) - segment_logsumexp(z, groups, preferred)


def score_deviation(
    scores: Tensor, groups: Segments, weighting: Weighting, present: Tensor | None = None
) -> Tensor:
    """[R] deviation of each score from its group's mean: absolute (paper Eq. 6) or signed (Eq. 14).

    Args:
        present: [R] bool, the responses whose mean it is; None: all.
    """
    deviation = scores - spread(segment_mean(scores, groups, present), groups)
    return deviation.abs() if weighting == "absolute" else deviation


@register(
    "mpo",
    contrasts="the preferred set against the whole group",
    source="MPO paper, Eq. 5",
    settings="beta 0.01",
)
def mpo(batch: GroupBatch, *, beta: Positive) -> ObjectiveResult:
    """MPO (paper Eq. 5): the set contrast of z = beta r; at n = 2 it is DPO. Its authors used beta 0.01."""
    rewards = beta * batch.log_ratios
    return ObjectiveResult(set_contrast(rewards, batch.preferred, batch.groups), rewards.detach())


@register(
    "wmpo",
    contrasts="as mpo, responses weighted by their score's deviation",
    source="MPO paper, Eq. 8 (signed: Eq. 16)",
    settings="beta 0.01 to 0.05, alpha 0.1 or 10 by the scale of the scores",
)
def wmpo(
    batch: GroupBatch, *, beta: Positive, alpha: NotNegative, weighting: Weighting = "absolute"
) -> ObjectiveResult:
    """W-MPO (paper Eq. 7, 8; signed: Eq. 15, 16): alpha times the score's deviation is added to each logit.

    alpha is in 1 / (units of score), so no value fits all data: the paper uses 0.1 (section A.6) and 10 (Appendix J) on
    scores of different scales, with beta from 0.01 to 0.05.
    """
    rewards = beta * batch.log_ratios
    z = rewards + alpha * score_deviation(batch.scores, batch.groups, weighting)
    return ObjectiveResult(set_contrast(z, batch.preferred, batch.groups), rewards.detach())


@register(
    "mpo_reference_free",
    contrasts="the preferred set against the whole group, by log-prob per token",
    source="MPO paper, section A.2, with the reward and margin of SimPO",
    settings="as simpo",
    needs_reference=False,
)
def mpo_reference_free(batch: GroupBatch, *, beta: Positive, gamma: NotNegative) -> ObjectiveResult:
    """MPO on SimPO's reward (paper section A.2), which needs no reference; at n = 2 it is SimPO.

    z_i = beta log pi(y_i | x) / |y_i|, less the margin gamma for the preferred; loss = set contrast of z. The paper
    states no beta and gamma of its own; SimPO's authors used beta 2 to 10 and gamma 0.3 to 3.
    """
    rewards = beta * batch.mean_logps
    z = torch.where(batch.preferred, rewards - gamma, rewards)
    return ObjectiveResult(set_contrast(z, batch.preferred, batch.groups), rewards.detach())


@register(
    "softmax_dpo",
    contrasts="the best response against all others",
    source="Chen et al. 2024, arXiv 2406.09215; MPO-1vsk in the MPO paper",
    settings="beta 1",
)
def softmax_dpo(batch: GroupBatch, *, beta: Positive) -> ObjectiveResult:
    """Softmax-DPO: -log sigma(-log sum_{l != w} exp(z_l - z_w)), w the first of the best-scored, z = beta r.

    That is exactly MPO with w alone preferred, which the MPO paper calls MPO-1vsk. Source: Chen et al. 2024, On Softmax
    Direct Preference Optimization for Recommendation, with beta 1.
    """
    rewards = beta * batch.log_ratios
    best = first_highest(batch.scores, batch.groups)
    return ObjectiveResult(set_contrast(rewards, best, batch.groups), rewards.detach())


def mpo_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    scores: Tensor,
    *,
    beta: float,
    alpha: float = 0.0,
    weighting: str = "absolute",
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """MPO / W-MPO loss of groups, for a trainer of your own. Needs torch alone.

    The preferred set of a group is its responses with a score above the group's mean (strictly). A group
    whose scores are all equal has none: it is skipped, its loss is 0 and it does not count in the mean (paper
    section 4.4).

    Args:
        policy_logps: [G, n] sums of log pi(y | x) over the tokens of each response, with gradient.
        reference_logps: [G, n] the same under the frozen reference policy.
        scores: [G, n] scores, any scale; higher is better.
        beta: strength of the implicit reward (DPO's beta), > 0.
        alpha: weight of the score deviation in the logits, in 1 / (units of score); 0 is MPO.
        weighting: `absolute` (paper Eq. 6), `signed` (Eq. 14) or `none`.
        mask: [G, n] bool, True where there is a response, for groups of different sizes; None: all are there.
        reduction: `mean` over the groups that count, `sum`, or `none` for the [G] losses.

    Returns:
        A scalar, or [G] with `reduction="none"`. Computed in float32, or float64 where the inputs are
        float64. If no group counts, `mean` is 0 (with zero gradient).

    Raises:
        ValueError: shapes that differ, an unknown weighting or reduction, beta that is not positive.

    Example:
        >>> policy = torch.tensor([[-12.0, -15.0, -11.0]], requires_grad=True)
        >>> reference = torch.tensor([[-12.0, -15.0, -11.0]])
        >>> scores = torch.tensor([[9.0, 3.0, 2.0]])
        >>> round(mpo_loss(policy, reference, scores, beta=0.1).item(), 4)  # log(3 / 1): nothing is learned yet
        1.0986
    """
    if not policy_logps.shape == reference_logps.shape == scores.shape or policy_logps.dim() != 2:
        raise ValueError(
            f"policy_logps {tuple(policy_logps.shape)}, reference_logps {tuple(reference_logps.shape)} and scores "
            f"{tuple(scores.shape)} must have one shape [groups, responses]"
        )
    if mask is not None and mask.shape != scores.shape:
        raise ValueError(f"mask {tuple(mask.shape)} must have the shape of scores {tuple(scores.shape)}")
    weightings = (*get_args(Weighting), "none")
    if weighting not in weightings:
        raise ValueError(f"weighting={weighting!r} is not one of {', '.join(weightings)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is not one of mean, sum, none")
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive")

    num_groups, size = scores.shape
    present = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    absent = ~present.flatten()
    groups = to_device(Segments.of(np.repeat(np.arange(num_groups), size), num_groups), scores.device)
    dtype = torch.promote_types(policy_logps.dtype, torch.float32)
    # What stands where there is no response, may be anything.
    policy, reference, flat_scores = (
        values.flatten().to(dtype).masked_fill(absent, 0)
        for values in (policy_logps, reference_logps.detach(), scores)
    )
    preferred = above_mean(flat_scores, groups, ~absent) & ~absent
    z = beta * (policy - reference)
    if weighting != "none":
        z = z + alpha * score_deviation(flat_scores, groups, cast(Weighting, weighting), ~absent)
    counts = segment_any(preferred, groups)
    losses = set_contrast(z.masked_fill(absent, -torch.inf), preferred, groups).masked_fill(~counts, 0)
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum().clamp(min=1) if reduction == "mean" else losses.sum()
