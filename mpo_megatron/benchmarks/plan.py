"""How well and how fast steps are planned, against the same responses trained as fixed pairs.

The lengths are drawn, not read: like UltraFeedback's, with its four responses per prompt, and independent of each
other. Nothing here needs a GPU or a model.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpo_megatron.benchmarks.models import LLAMA3_8B
from mpo_megatron.benchmarks.report import Report
from mpo_megatron.scheduling.layout import GroupLengths
from mpo_megatron.scheduling.order import in_order
from mpo_megatron.scheduling.plan import CostModel, Pipeline, StepPlan, plan_step

RESPONSES = 4
LONGEST = 2048
PAIRS_PER_MICRO_BATCH = 4
QUICK_GROUPS = 8192
SETTINGS = ("global_batch_size", "data_parallel", "max_tokens", "alignment", "pipeline", "chunks", "seed")


@dataclass(frozen=True)
class Planned:
    """How well and how fast all steps were planned; `worst` is that of the worst step."""

    fill: float
    fill_worst: float
    imbalance: float
    imbalance_worst: float
    computed_tokens: int
    rows_per_rank: float
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every benchmark."""
    parser.add_argument("--groups", type=int, default=65536, help="groups planned (with --quick: 8192)")
    parser.add_argument("--global-batch-size", type=int, default=128, help="groups per step")
    parser.add_argument("--data-parallel", type=int, default=8, help="data-parallel ranks")
    parser.add_argument("--max-tokens", type=int, default=8192, help="token budget of a row")
    parser.add_argument("--alignment", type=int, default=64, help="rows are padded to a multiple of it")
    parser.add_argument("--pipeline", type=int, default=4, help="stages of the pipeline that is planned for")
    parser.add_argument("--chunks", type=int, default=1, help="model chunks on each of its stages")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn lengths")


def run(arguments: argparse.Namespace) -> Report:
    """Plan all groups in steps, without and with a pipeline, and pad the same groups' responses as fixed pairs."""
    num_groups = QUICK_GROUPS if arguments.quick else arguments.groups
    groups = ultrafeedback_like(num_groups, arguments.seed)
    steps = [
        [groups[i] for i in positions] for positions in in_order(num_groups, arguments.global_batch_size)
    ]
    without = _plan_all(steps, arguments, Pipeline())
    within = _plan_all(steps, arguments, Pipeline(arguments.pipeline, arguments.chunks))
    pairs_used, pairs_computed = fixed_pairs(groups, arguments.seed)
    padding_pairs = 1 - pairs_used / pairs_computed

    def cells(name: str, found: Planned) -> list[str]:
        return [
            f"groups, prompt shared, planned rows, {name}",
            f"{found.computed_tokens / num_groups:,.0f}",
            f"{1 - found.fill:.1%}",
            f"{1 - found.fill_worst:.1%}",
            f"{found.imbalance:.4f}",
            f"{found.rows_per_rank:.1f}",
            f"{found.seconds:.1f}",
        ]

    return Report(
        benchmark="plan",
        columns=[
            "trained as",
            "tokens computed per group",
            "padding",
            "worst step",
            "imbalance",
            "rows per rank",
            "CPU s",
        ],
        rows=[
            cells("PP 1", without),
            cells(f"PP {arguments.pipeline}", within),
            [
                f"fixed pairs, {PAIRS_PER_MICRO_BATCH} a micro-batch",
                f"{pairs_computed / num_groups:,.0f}",
                f"{padding_pairs:.1%}",
                *[""] * 4,
            ],
        ],
        figures={
            "fill": without.fill,
            "fill_worst": without.fill_worst,
            "imbalance": without.imbalance,
            "imbalance_worst": without.imbalance_worst,
            "padding": 1 - without.fill,
            "padding_pairs": padding_pairs,
            "seconds": without.seconds,
            "fill_pipeline": within.fill,
            "imbalance_pipeline": within.imbalance,
            "seconds_pipeline": within.seconds,
            "groups": float(num_groups),
        },
        settings={
            **{name: getattr(arguments, name) for name in SETTINGS},
            "lengths": "like UltraFeedback's",
            "cost": "Llama-3-8B",
        },
        notes=[
            f"{num_groups} groups in {len(steps)} steps; CPU time is that of planning all of them",
            "imbalance: FLOPs of the costliest data-parallel rank over the mean, padding left out",
        ],
    )


def _plan_all(
    steps: Sequence[Sequence[GroupLengths]], arguments: argparse.Namespace, pipeline: Pipeline
) -> Planned:
    cost = LLAMA3_8B.cost_model
    start = time.process_time()
    plans = [
        plan_step(
            step,
            max_tokens=arguments.max_tokens,
            data_parallel=arguments.data_parallel,
            cost=cost,
            alignment=arguments.alignment,
            pipeline=pipeline,
        )
        for step in steps
    ]
    seconds = time.process_time() - start
    fills = [fill(plan, step) for plan, step in zip(plans, steps, strict=True)]
    imbalances = [imbalance(plan, step, cost) for plan, step in zip(plans, steps, strict=True)]
    return Planned(
        fill=float(np.mean(fills)),
        fill_worst=min(fills),
        imbalance=float(np.mean(imbalances)),
        imbalance_worst=max(imbalances),
        computed_tokens=sum(plan.padded_tokens for plan in plans),
        rows_per_rank=float(np.mean([plan.rows_per_rank for plan in plans])),
        seconds=seconds,
    )


def ultrafeedback_like(num_groups: int, seed: int) -> list[GroupLengths]:
    """Groups of four responses with lengths like UltraFeedback's in tokens of a Llama-3 tokenizer.

    Prompts are lognormal(mu=4.64, sigma=1.1): median 104, mean 190 and a long tail. Responses are
    lognormal(mu=5.44, sigma=0.674): mean 290, standard deviation 220. All are independent and clipped to [8, 2048].
    """
    generator = np.random.default_rng(seed)
    prompts = generator.lognormal(4.64, 1.1, num_groups).clip(8, LONGEST).astype(int)
    responses = generator.lognormal(5.44, 0.674, (num_groups, RESPONSES)).clip(8, LONGEST).astype(int)
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


def fixed_pairs(groups: Sequence[GroupLengths], seed: int) -> tuple[int, int]:
    """Tokens (used, computed) when neighbouring responses of each group are trained as pairs, as DPO trainers do.

    A pair is two sequences, each with the prompt. Micro-batches of four pairs are drawn at random and padded to their
    longest sequence. An odd response out is left out.
    """
    pairs = np.array(
        [
            (group.prompt + first, group.prompt + second)
            for group in groups
            for first, second in zip(group.responses[::2], group.responses[1::2], strict=False)
        ]
    )
    pairs = pairs[np.random.default_rng(seed).permutation(len(pairs))]
    batches = [pairs[i : i + PAIRS_PER_MICRO_BATCH] for i in range(0, len(pairs), PAIRS_PER_MICRO_BATCH)]
    return int(pairs.sum()), sum(int(batch.max()) * batch.size for batch in batches)
