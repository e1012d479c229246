"""One pass over a step's rows through Megatron's pipeline schedules: to train, to evaluate, or for log-probs alone.

The loss of a row is the sum of its groups' losses, and its count is its number of groups; with
`calculate_per_token_loss` Megatron sums both over rows and data-parallel ranks and divides the gradient once. So the
gradient is that of the mean over the groups of the global step, however they are laid out.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mpo_megatron.objectives.metrics import METRICS, group_metrics
from mpo_megatron.objectives.registry import GroupBatch, Objective
from mpo_megatron.runtime.parallel import ParallelLayout
from mpo_megatron.scheduling.pack import PackedRow
from mpo_megatron.training.rows import StepRows

# What a row gives: from the last stage's output [1, R, 1], (loss to differentiate, count, values to keep).
RowLoss = Callable[[PackedRow, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def run_schedule(
    chunks: list[Any], step: StepRows, row_loss: RowLoss, *, forward_only: bool
) -> list[dict[str, Tensor]]:
    """Run a step's rows through Megatron's schedule. Returns what `row_loss` keeps, on the last stage; else nothing."""

    def forward_step(rows: Iterator[PackedRow], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        row = next(rows)
        return model(row), partial(row_loss, row)

    # Megatron's schedules leave the graph on in a forward-only pass.
    with torch.no_grad() if forward_only else contextlib.nullcontext():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(step.rows),
            model=chunks,
            num_microbatches=len(step.rows),
            seq_length=step.row_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )


def objective_loss(objective: Objective, reference_logps: Tensor) -> RowLoss:
    """The row loss of an objective.

    Args:
        objective: with its hyper-parameters bound.
        reference_logps: [responses of the data set] float32, by the responses' numbers.
    """

    def loss(row: PackedRow, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        batch = GroupBatch(
            policy_logps=output.reshape(-1),
            reference_logps=reference_logps[row.response_ids],
            lengths=row.lengths,
            scores=row.scores,
            preferred=row.preferred,
            group_index=row.group_index,
            num_groups=row.num_groups,
        )
        result = objective(batch)
        count = torch.tensor(row.num_groups, dtype=torch.int, device=output.device)
        return result.losses.sum(), count, {"sums": group_metrics(batch, result).sum(1)}

    return loss


def logprob_only(row: PackedRow, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The row loss of a pass that only wants the responses' log-probs (forward only)."""
    logps = output.detach().reshape(-1)
    count = torch.zeros((), dtype=torch.int, device=output.device)
    return output.sum() * 0, count, {"response_ids": row.response_ids, "logps": logps}


def mean_metrics(kept: list[dict[str, Tensor]], groups: int, layout: ParallelLayout) -> dict[str, float]:
    """Mean of each of METRICS over the global step's groups, the same on all ranks: one reduction, one transfer."""
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=layout.device)
    if layout.speaks_for_replica:
        for values in kept:
            sums += values["sums"]
    dist.all_reduce(sums)
    return dict(zip(METRICS, (sums / max(groups, 1)).tolist(), strict=True))
