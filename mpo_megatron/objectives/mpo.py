r"""Multi-Preference Optimization: the preferred set against the whole group, in log space.

For a group of responses y_1..y_n with scores S_i, partition Y+ = {i : S_i > mean S}, and implicit score
r_i = log pi(y_i | x) - log pi_ref(y_i | x):

    z_i  = beta r_i                             MPO     (paper Eq. 4)
    z_i  = beta r_i + alpha dW_i                W-MPO   (Eq. 7; dW_i = |S_i - mean S| absolute, Eq. 6, or
    signed, Eq. 14)
    loss = logsumexp_i z_i - logsumexp_{i in Y+} z_i    (Eq. 5 / Eq. 8)

with gradient d loss / d z_i = softmax(z)_i - softmax_{Y+}(z)_i (Lemma 6). The paper's code clamps the two
probability sums at 1e-10, which zeroes the gradient where the loss is largest; a difference of log-sum-exps
needs no clamp.

Shapes: R responses, G groups; `mpo_loss` takes [G, n] tensors.
"""

import torch
from torch import Tensor

from mpo_megatron.objectives.registry import (
    GroupBatch,
    ObjectiveResult,
    register,
    segment_logsumexp,
    segment_mean,
)

WEIGHTINGS = ("absolute", "signed", "none")


def set_contrast(z: Tensor, preferred: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    """[G] logsumexp over the group minus logsumexp over its preferred set (paper Eq. 5).

    Args:
        z: [R] logits.
        preferred: [R] bool; every group has at least one, otherwise its loss is +inf.
        group_index: [R] group of each response.
    """
    everyone = segment_logsumexp(z, group_index, num_groups)
    chosen = segment_logsumexp(z[preferred], group_index[preferred], num_groups)
    return everyone - chosen


def score_deviation(scores: Tensor, group_index: Tensor, num_groups: int, weighting: str) -> Tensor:
    """[R] deviation of each score from its group's mean: absolute (paper Eq. 6), signed (Eq. 14) or none (zeros)."""
    if weighting == "none":
        return torch.zeros_like(scores)
    deviation = scores - segment_mean(scores, group_index, num_groups)[group_index]
    return deviation.abs() if weighting == "absolute" else deviation


@register("mpo")
def mpo(batch: GroupBatch, *, beta: float, alpha: float = 0.0, weighting: str = "none") -> ObjectiveResult:
    """MPO (paper Eq. 5): the set contrast of beta * r. `alpha` and `weighting` belong to W-MPO and are not used."""
    rewards = beta * (batch.policy_logps - batch.reference_logps)
    losses = set_contrast(rewards, batch.preferred, batch.group_index, batch.num_groups)
    return ObjectiveResult(losses, rewards.detach())


@register("wmpo")
def wmpo(batch: GroupBatch, *, beta: float, alpha: float, weighting: str = "absolute") -> ObjectiveResult:
    """W-MPO (paper Eq. 7, 8; signed: Eq. 15, 16): alpha times the score's deviation is added to each logit."""
    rewards = beta * (batch.policy_logps - batch.reference_logps)
    deviation = score_deviation(batch.scores, batch.group_index, batch.num_groups, weighting)
    losses = set_contrast(rewards + alpha * deviation, batch.preferred, batch.group_index, batch.num_groups)
    return ObjectiveResult(losses, rewards.detach())


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
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r} is not one of {', '.join(WEIGHTINGS)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is not one of mean, sum, none")
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive")

    num_groups = scores.size(0)
    present = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    group_index = torch.arange(num_groups, device=scores.device)[:, None].expand_as(scores)[present]
    dtype = torch.promote_types(policy_logps.dtype, torch.float32)
    flat_scores = scores[present].to(dtype)
    preferred = _above_mean(flat_scores, group_index, num_groups)
    batch = GroupBatch(
        policy_logps=policy_logps[present].to(dtype),
        reference_logps=reference_logps[present].to(dtype).detach(),
        lengths=torch.ones_like(flat_scores),
        scores=flat_scores,
        preferred=preferred,
        group_index=group_index,
        num_groups=num_groups,
    )
    losses = wmpo(batch, beta=beta, alpha=alpha, weighting=weighting).losses
    counts = torch.zeros(num_groups, dtype=torch.bool, device=scores.device).index_fill(
        0, group_index[preferred], True
    )
    losses = torch.where(counts, losses, torch.zeros_like(losses))
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum().clamp(min=1) if reduction == "mean" else losses.sum()


def _above_mean(scores: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    """[R] bool: score above its group's mean by more than the mean's rounding can explain.

    The rule of `mpo_megatron.data.partition_by_mean`: 2n units in the last place of the group's largest magnitude, so
    that equal scores such as 0.1, 0.1, 0.1 have no preferred one, however their mean is rounded.
    """
    largest = scores.new_zeros(num_groups).scatter_reduce(0, group_index, scores.abs(), "amax")
    size = scores.new_zeros(num_groups).index_add(0, group_index, torch.ones_like(scores))
    slack = 2 * size * torch.finfo(scores.dtype).eps * largest
    return scores - segment_mean(scores, group_index, num_groups)[group_index] > slack[group_index]
