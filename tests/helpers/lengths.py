"""Lengths of groups like those of a real data set, and how well a plan of them fills and balances."""

from collections.abc import Sequence

import numpy as np

from mpo_megatron.scheduling.layout import GroupLengths
from mpo_megatron.scheduling.plan import CostModel, StepPlan

# Llama-3-8B: 2 per matmul parameter and token, 4 * layers * hidden per attention pair, 2 * hidden * vocabulary.
LLAMA3_8B_COST = CostModel(
    per_token=2 * 6.98e9, per_attention_pair=4 * 32 * 4096, per_response_token=2 * 4096 * 128256
)
LONGEST = 2048


def ultrafeedback_like(num_groups: int, seed: int) -> list[GroupLengths]:
    """Groups of four responses with lengths like UltraFeedback's in tokens of a Llama-3 tokenizer.

    Prompts are lognormal(mu=4.64, sigma=1.1): median 104, mean 190 and a long tail. Responses are
    lognormal(mu=5.44, sigma=0.674): mean 290, standard deviation 220. All are independent and clipped to [8, 2048].
    """
    generator = np.random.default_rng(seed)
    prompts = generator.lognormal(4.64, 1.1, num_groups).clip(8, LONGEST).astype(int)
    responses = generator.lognormal(5.44, 0.674, (num_groups, 4)).clip(8, LONGEST).astype(int)
    return [
        GroupLengths(prompt, tuple(lengths))
        for prompt, lengths in zip(prompts.tolist(), responses.tolist(), strict=True)
    ]


def fill(plan: StepPlan, groups: Sequence[GroupLengths]) -> float:
    """The share of computed tokens that is not padding; of the main pass, not of the one for split groups."""
    used = sum(
        groups[part.group].part(part.responses).row_tokens(shared_prompt=True)
        for rank_rows in plan.rows
        for row in rank_rows
        for part in row
    )
    return used / plan.padded_tokens


def imbalance(plan: StepPlan, groups: Sequence[GroupLengths], cost: CostModel) -> float:
    """FLOPs of the costliest data-parallel rank over the mean of the ranks, padding left out."""
    loads = [
        sum(
            cost.of(groups[part.group].part(part.responses), shared_prompt=True)
            for row in rank_rows
            for part in row
        )
        for rank_rows in plan.rows
    ]
    return max(loads) * len(loads) / sum(loads)
