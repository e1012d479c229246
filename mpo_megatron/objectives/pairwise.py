r"""Objectives of pairs (w, l) of a group's responses, w scored above l: the mean over the pairs that are taken.

Which pairs, is one setting of the whole family (`PAIRS`). The loss is computed of all ordered pairs of a group, and a
mask says which of them are taken, so that their number is known without a look at the scores:

    best_worst    the best against the worst response
    best_random   the best against one of those scored below it, drawn by a hash of the responses' numbers: the same
                  one at every layout and in every epoch
    all           every two responses of different scores
    cross         every preferred against every dispreferred response

Best is the first of the highest scores, worst the first of the lowest.

r_i = log pi(y_i | x) - log pi_ref(y_i | x), |y_i| a response's tokens. Label smoothing epsilon takes that part of the
pairs to be in the wrong order: -(1 - epsilon) log sigma(m) - epsilon log sigma(-m) for a margin m (Mitchell 2023, A
note on DPO with noisy preferences).

Shapes: R responses, G groups, P all ordered pairs of responses of one group (`GroupBatch.index`).
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_megatron.objectives.hyper import LabelSmoothing, NotNegative, Positive
from mpo_megatron.objectives.registry import GroupBatch, ObjectiveResult, register
from mpo_megatron.objectives.splitmix import shift_right, splitmix64
from mpo_megatron.ragged.segments import first_highest, segment_max, segment_mean, spread

Pairs = Literal["best_worst", "best_random", "all", "cross"]
DPO = "Rafailov et al. 2023, arXiv 2305.18290"


def best_worst(batch: GroupBatch) -> Tensor:
    best, _ = batch.index.both(first_highest(batch.scores, batch.groups))
    _, worst = batch.index.both(first_highest(-batch.scores, batch.groups))
    return best & worst & all_pairs(batch)


def best_random(batch: GroupBatch) -> Tensor:
    best, _ = batch.index.both(first_highest(batch.scores, batch.groups))
    below = batch.scores < spread(segment_max(batch.scores, batch.groups), batch.groups)
    _, drawn = batch.index.both(
        first_highest(hashed(batch.response_ids).masked_fill(~below, -1), batch.groups)
    )
    return best & drawn & all_pairs(batch)


def all_pairs(batch: GroupBatch) -> Tensor:
    first, second = batch.index.both(batch.scores)
    return first > second


def cross_pairs(batch: GroupBatch) -> Tensor:
    first, second = batch.index.both(batch.preferred)
    return first & ~second


# From a batch, [P] bool: which pairs are taken, the first response as the better one.
PAIRS: dict[Pairs, Callable[[GroupBatch], Tensor]] = {
    "best_worst": best_worst,
    "best_random": best_random,
    "all": all_pairs,
    "cross": cross_pairs,
}


def hashed(numbers: Tensor) -> Tensor:
    """Whole float64 numbers in [0, 2^53) that look random, of int64 `numbers`."""
    return shift_right(splitmix64(numbers + 1), 11).double()


def mean_over_pairs(batch: GroupBatch, pairs: Pairs, losses: Tensor, rewards: Tensor) -> ObjectiveResult:
    """The mean in each group of the `losses` [P] of the pairs that are taken, 0 in a group without any."""
    return ObjectiveResult(segment_mean(losses, batch.index.pairs, PAIRS[pairs](batch)), rewards.detach())


def logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """-log sigma(margin), and label_smoothing of it the other way round."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


@register(
    "dpo",
    contrasts="the best against the worst response",
    source=DPO,
    settings="beta 0.1",
    fixed={"pairs": "best_worst"},
)
@register(
    "dpo_best_random",
    contrasts="the best against a random worse response",
    source=f"Tunstall et al. 2023 (Zephyr), arXiv 2310.16944; {DPO}",
    settings="beta 0.1",
    fixed={"pairs": "best_random"},
)
@register(
    "dpo_all_pairs",
    contrasts="every two responses of different scores (NC2)",
    source=f"MPO paper, Appendix I; {DPO}",
    settings="beta 0.01",
    fixed={"pairs": "all"},
)
@register(
    "dpo_cross_pairs",
    contrasts="every preferred against every dispreferred response",
    source=f"MPO paper; {DPO}",
    settings="beta 0.01",
    fixed={"pairs": "cross"},
)
def dpo(
    batch: GroupBatch, *, beta: Positive, pairs: Pairs, label_smoothing: LabelSmoothing = 0.0
) -> ObjectiveResult:
    """DPO: -log sigma(beta (r_w - r_l)), with label smoothing.

    Source: Rafailov et al. 2023, Direct Preference Optimization, Eq. 7, with beta 0.1 (0.5 for summaries); Zephyr's
    pairing, the best against a random one, with beta 0.1.
    """
    rewards = beta * batch.log_ratios
    better, worse = batch.index.both(rewards)
    return mean_over_pairs(batch, pairs, logistic(better - worse, label_smoothing), rewards)


@register(
    "simpo",
    contrasts="the best against the worst response, by log-prob per token",
    source="Meng et al. 2024, arXiv 2405.14734, Eq. 6",
    settings="beta 2 to 10, gamma 0.3 to 3",
    needs_reference=False,
)
def simpo(
    batch: GroupBatch,
    *,
    beta: Positive,
    gamma: NotNegative,
    pairs: Pairs = "best_worst",
    label_smoothing: LabelSmoothing = 0.0,
) -> ObjectiveResult:
    """SimPO: -log sigma(beta log pi(y_w | x) / |y_w| - beta log pi(y_l | x) / |y_l| - gamma).

    Source: Meng et al. 2024, SimPO: Simple Preference Optimization with a Reference-Free Reward. Its authors used
    (beta, gamma) of (2, 1.6) and (2, 1) for the base models of Mistral and Llama 3, (2.5, 0.3) and (2.5, 1.4) for the
    instruct models, (10, 3) for Llama 3 Instruct on newer data.
    """
    rewards = beta * batch.mean_logps
    better, worse = batch.index.both(rewards)
    return mean_over_pairs(batch, pairs, logistic(better - worse - gamma, label_smoothing), rewards)


@register(
    "ipo",
    contrasts="the best against the worst response, to a margin of 1 / (2 beta)",
    source="Azar et al. 2023, arXiv 2310.12036, Eq. 17",
    settings="beta (their tau) 0.01 to 1",
)
def ipo(
    batch: GroupBatch, *, beta: Positive, pairs: Pairs = "best_worst", length_normalised: bool = True
) -> ObjectiveResult:
    """IPO: (h_w - h_l - 1 / (2 beta))^2 with h = r / |y|, or r where not `length_normalised`.

    Source: Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences; beta is
    their tau. The paper writes r; its authors have confirmed r / |y| to TRL. SimPO's authors searched tau from 0.01
    to 1.
    """
    rewards = batch.log_ratios / batch.lengths if length_normalised else batch.log_ratios
    better, worse = batch.index.both(rewards)
    return mean_over_pairs(batch, pairs, (better - worse - 1 / (2 * beta)).square(), rewards)


@register(
    "r_dpo",
    contrasts="the best against the worst response, their lengths held against them",
    source="Park et al. 2024, arXiv 2403.19159, Eq. 9",
    settings="beta 0.01 to 0.1, alpha 0.05 to 1 (SimPO's search)",
)
def r_dpo(
    batch: GroupBatch,
    *,
    beta: Positive,
    alpha: NotNegative,
    pairs: Pairs = "best_worst",
    label_smoothing: LabelSmoothing = 0.0,
) -> ObjectiveResult:
    """R-DPO: -log sigma(beta (r_w - r_l) + alpha (|y_w| - |y_l|)), DPO for the reward less alpha |y|.

    alpha is in 1 / tokens. A longer better response has to be raised less, a shorter one more. Source: Park et al.
    2024, Disentangling Length from Quality in Direct Preference Optimization.
    """
    rewards = beta * batch.log_ratios
    better, worse = batch.index.both(rewards + alpha * batch.lengths.to(rewards.dtype))
    return mean_over_pairs(batch, pairs, logistic(better - worse, label_smoothing), rewards)


@register(
    "orpo",
    contrasts="the odds of the best against those of the worst response, and SFT on the best",
    source="Hong et al. 2024, arXiv 2403.07691, Eq. 6 and 7",
    settings="beta (their lambda) 0.1 to 0.25",
    needs_reference=False,
)
def orpo(batch: GroupBatch, *, beta: Positive, pairs: Pairs = "best_worst") -> ObjectiveResult:
    """ORPO: -a_w - beta log sigma(logit_w - logit_l), a = log pi(y | x) / |y| and logit = a - log(1 - exp(a)).

    The first term is SFT on the better response, the second the log odds ratio. Source: Hong et al. 2024, ORPO:
    Monolithic Preference Optimization without Reference Model; beta is their lambda: 0.1 for Mistral, 0.2 for Llama 2,
    0.25 for Phi-2.
    """
    average = batch.mean_logps
    # log(1 - exp(a)); a response of probability 1 would have infinite odds.
    log_of_rest = torch.log(-torch.expm1(average.clamp(max=-torch.finfo(average.dtype).eps)))
    log_odds = average - log_of_rest
    better, worse = batch.index.both(log_odds)
    losses = -spread(average, batch.index.first) - beta * F.logsigmoid(better - worse)
    return mean_over_pairs(batch, pairs, losses, log_odds)
