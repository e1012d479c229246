"""One pass over a step's rows through Megatron's pipeline schedules: to train, to evaluate, or for log-probs alone.

The loss of a row is the sum of its groups' losses, and its count is its number of groups; with
`calculate_per_token_loss` Megatron sums both over rows and data-parallel ranks and divides the gradient once. So the
gradient is that of the mean over the groups of the global step, however they are laid out.

A group larger than a row has its responses in several rows, and its loss needs all of them. Such a step runs in two
passes (`first_pass`): forward only over the rows with parts, to get the log-probs of all responses of the split
groups and w_i = d loss / d logp_i; then the ordinary pass, in which the loss of a row of parts is sum_i w_i logp_i: by
the chain rule its gradient is the loss's own. Exact, since both passes compute the same log-probs (no dropout).

An objective that needs statistics of the global batch needs all of its groups: then all rows run twice in this way
(`RowSource(global_batch=True)`), and the objective sees one batch of all groups, the same at every layout.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mpo_megatron.objectives.metrics import METRICS, group_metrics
from mpo_megatron.objectives.registry import GroupBatch, Objective
from mpo_megatron.runtime.parallel import ParallelLayout
from mpo_megatron.scheduling.pack import PackedRow
from mpo_megatron.scheduling.rows import SplitGroups, StepRows
from mpo_megatron.training.guard import check_step, squared_norm
from mpo_megatron.training.rank_times import RankTimes
from mpo_megatron.training.stop import Stop

# What a row gives: from the last stage's output [1, R, 1], (loss to differentiate, count, values to keep).
RowLoss = Callable[[PackedRow, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class SplitLoss:
    """What the first pass finds: of the groups that need it, with S responses.

    Attributes:
        weights: [S] d (sum of their losses) / d (log-prob).
        sums: [metrics] sums of METRICS over the groups.
        responses: [2, S] log-probs and rewards.
    """

    weights: Tensor
    sums: Tensor
    responses: Tensor


def forward_step(row_loss: RowLoss) -> Callable[[Iterator[PackedRow], Any], tuple[Tensor, Callable]]:
    """The `forward_step_func` of Megatron's schedules: the next row through a model chunk, and the loss to put on
    it.
    """

    def forward(rows: Iterator[PackedRow], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        row = next(rows)
        return model(row), partial(row_loss, row)

    return forward


def run_schedule(
    chunks: list[Any],
    step: StepRows,
    row_loss: RowLoss,
    *,
    forward_only: bool,
    stop: int | None = None,
) -> list[dict[str, Tensor]]:
    """Run a step's rows (the first `stop` of them) through Megatron's schedule.

    Returns what `row_loss` keeps of each row, on the last stage; elsewhere nothing.
    """
    iterators = step.iterators(len(chunks), stop)
    # Megatron's schedules leave the graph on in a forward-only pass.
    with torch.no_grad() if forward_only else contextlib.nullcontext():
        return get_forward_backward_func()(
            forward_step_func=forward_step(row_loss),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(step.rows[:stop]),
            seq_length=step.longest_row,
            micro_batch_size=1,
            forward_only=forward_only,
        )


def first_pass(
    chunks: list[Any],
    step: StepRows,
    objective: Objective,
    reference_logps: Tensor,
    layout: ParallelLayout,
) -> SplitLoss | None:
    """The loss of the step's groups that need a first pass and its derivatives; None where there are none.

    Every rank calls it. The parts of a group may lie on different data-parallel ranks; their log-probs are put
    together.

    Returns:
        The same on every rank of the last pipeline stage; None on the other stages, which compute no loss.
    """
    if step.split is None:
        return None
    kept = run_schedule(chunks, step, logprob_only, forward_only=True, stop=step.first_pass)
    return _split_loss(step, kept, objective, reference_logps, layout)


def _split_loss(
    step: StepRows,
    kept: list[dict[str, Tensor]],
    objective: Objective,
    reference_logps: Tensor,
    layout: ParallelLayout,
) -> SplitLoss | None:
    """Put the log-probs that forward-only passes have kept of rows with parts together, over the replicas."""
    if step.split is None or not layout.is_last_stage:
        return None
    found = [
        (row.split_slots, values["logps"])
        for row, values in zip(step.rows, kept, strict=False)
        if row.split_slots is not None
    ]
    # Each response is on one data-parallel rank and 0 on the others, so the sum is exact.
    logps = torch.zeros(step.split.lengths.numel(), dtype=reference_logps.dtype, device=layout.device)
    for slots, values in found:
        logps[slots] = values
    dist.all_reduce(logps, group=parallel_state.get_data_parallel_group())
    return split_loss(logps, step.split, objective, reference_logps)


def _group_batch(groups: PackedRow | SplitGroups, logps: Tensor, reference_logps: Tensor) -> GroupBatch:
    """What an objective is given of whole groups, with the log-probs of their responses."""
    return GroupBatch(
        policy_logps=logps,
        reference_logps=reference_logps[groups.response_ids],
        lengths=groups.lengths,
        scores=groups.scores.to(logps.dtype),
        preferred=groups.preferred,
        response_ids=groups.response_ids,
        index=groups.index,
    )


def split_loss(logps: Tensor, split: SplitGroups, objective: Objective, reference_logps: Tensor) -> SplitLoss:
    """Loss weights and metrics of whole groups from the log-probs [S] of their responses, by autograd."""
    with torch.enable_grad():
        batch = _group_batch(split, logps.detach().requires_grad_(), reference_logps)
        result = objective(batch)
        (weights,) = torch.autograd.grad(result.losses.sum(), batch.policy_logps)
    responses = torch.stack((logps, result.rewards.detach()))
    return SplitLoss(weights, group_metrics(batch, result).sum(1), responses)


def objective_loss(objective: Objective, reference_logps: Tensor, split: SplitLoss | None = None) -> RowLoss:
    """The row loss of an objective.

    Args:
        objective: with its hyper-parameters bound.
        reference_logps: [responses of the data set] float32, by the responses' numbers.
        split: what `first_pass` gave for this step; without it, rows of parts give their log-probs and no gradient.
    """

    def loss(row: PackedRow, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        # Filled in on the device; `torch.tensor` would copy it there, and wait.
        count = torch.full((), row.counted_groups, dtype=torch.int, device=output.device)
        logps = output.reshape(-1)
        if row.split_slots is not None:
            if split is None:
                assert not torch.is_grad_enabled(), "training on a row of parts needs what first_pass gives"
                return logps.sum() * 0, count, {"logps": logps}
            return (split.weights[row.split_slots] * logps).sum(), count, {}
        batch = _group_batch(row, logps, reference_logps)
        result = objective(batch)
        kept = {"sums": group_metrics(batch, result).sum(1)}
        if not torch.is_grad_enabled():
            kept["responses"] = torch.stack((logps, result.rewards))
        return result.losses.sum(), count, kept

    return loss


def logprob_only(row: PackedRow, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The row loss of a pass that only wants the responses' log-probs (forward only)."""
    logps = output.detach().reshape(-1)
    count = torch.zeros((), dtype=torch.int, device=output.device)
    return output.sum() * 0, count, {"response_ids": row.response_ids, "logps": logps}


def response_logps(chunks: list[Any], steps: Iterable[StepRows], size: int, layout: ParallelLayout) -> Tensor:
    """Log-probs of the steps' responses under the chunks' present weights, the same on all ranks. Every rank calls it.

    Returns:
        [size] by the responses' numbers in the data set of `size` responses, 0 for those that are in no step;
        float32, or float64 for a float64 model.
    """
    dtype = torch.promote_types(next(chunks[0].parameters()).dtype, torch.float32)
    values = torch.zeros(size, dtype=dtype, device=layout.device)
    for step in steps:
        for kept in run_schedule(chunks, step, logprob_only, forward_only=True):
            if layout.speaks_for_replica:
                values[kept["response_ids"]] = kept["logps"]
    dist.all_reduce(values)  # every response is on one replica and 0 elsewhere: the sum is exact
    return values


def objective_pass(
    chunks: list[Any],
    step: StepRows,
    objective: Objective,
    reference_logps: Tensor,
    layout: ParallelLayout,
    *,
    forward_only: bool,
    times: RankTimes | None = None,
    stop: Stop | None = None,
    responses: Tensor | None = None,
) -> dict[str, float]:
    """Forward (and backward) of a whole step; gradients stay in the parameters' main_grad. Every rank calls it.

    Args:
        times: of training steps, what measures the ranks.
        stop: of training steps, this rank's request to end the run, which becomes that of all.
        responses: [2, responses of the data set], of forward passes: filled with the log-probs and the rewards of those
            of this step, each on one rank. Its sum over all ranks has them all.

    Returns:
        Mean of each of METRICS over the global step's groups, the same on all ranks; from the second step on with what
        `times` says of the step before.

    Raises:
        NotFinite: in training, if the loss or the gradient is not; on all ranks.
    """
    seconds, squares = None, None
    if forward_only:
        row_loss = objective_loss(objective, reference_logps)
        kept = run_schedule(chunks, step, row_loss, forward_only=True)
        split = _split_loss(step, kept, objective, reference_logps, layout)
        if responses is not None and layout.speaks_for_replica:
            _fill(responses, step, kept, split if layout.dp_rank == 0 else None)
    else:
        split = first_pass(chunks, step, objective, reference_logps, layout)
        row_loss = objective_loss(objective, reference_logps, split)
        seconds = None if times is None else times.begin()
        kept = run_schedule(chunks, step, row_loss, forward_only=False)
        squares = squared_norm(chunks)
    wanted = stop is not None and stop.requested
    means, of_ranks, total, stops = _means_and_seconds(
        kept, split, step, layout, seconds or 0.0, squares, wanted
    )
    if stop is not None:
        stop.agreed = stops > 0
    if squares is not None:
        rows = zip(kept, step.rows, strict=False) if layout.speaks_for_replica else ()
        losses = [(values["sums"], row.response_ids) for values, row in rows if "sums" in values]
        check_step(means["loss"], total, losses, chunks, layout)
    return means if times is None or seconds is None else means | times.add(of_ranks)


def _fill(responses: Tensor, step: StepRows, kept: list[dict[str, Tensor]], split: SplitLoss | None) -> None:
    """Put what a forward pass has kept of each response where its number says."""
    for row, values in zip(step.rows, kept, strict=True):
        if "responses" in values:
            responses[:, row.response_ids] = values["responses"].to(responses.dtype)
    if step.split is not None and split is not None:
        responses[:, step.split.response_ids] = split.responses.to(responses.dtype)


def mean_metrics(
    kept: list[dict[str, Tensor]], split: SplitLoss | None, step: StepRows, layout: ParallelLayout
) -> dict[str, float]:
    """Mean of each of METRICS over the global step's groups, the same on all ranks: one reduction, one transfer.

    Args:
        kept: what the schedule returned with `objective_loss`.
        split: what `first_pass` returned.
    """
    return _means_and_seconds(kept, split, step, layout, 0.0, None, False)[0]


def _means_and_seconds(
    kept: list[dict[str, Tensor]],
    split: SplitLoss | None,
    step: StepRows,
    layout: ParallelLayout,
    seconds: float,
    squares: Tensor | None,
    stop: bool,
) -> tuple[dict[str, float], list[float], float, float]:
    """(`mean_metrics`, `seconds` of every rank, the sum of all ranks' `squares`, how many of them want to `stop`)."""
    count = len(METRICS)
    sums = torch.zeros(count + 2 + layout.world_size, dtype=torch.float64, device=layout.device)
    metrics, squared, of_ranks = sums[:count], sums[count], sums[count + 2 :]
    sums[count + 1].fill_(float(stop))
    of_ranks[layout.rank].fill_(seconds)
    if squares is not None:
        squared += squares
    if layout.speaks_for_replica:
        for values in kept:
            if "sums" in values:
                metrics += values["sums"]
        if split is not None and layout.dp_rank == 0:  # every replica has the same
            metrics += split.sums
    dist.all_reduce(sums)
    found = sums.tolist()
    means = {name: total / max(step.groups, 1) for name, total in zip(METRICS, found, strict=False)}
    return means, found[count + 2 :], found[count], found[count + 1]
