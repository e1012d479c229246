"""Which groups share a row, and which data-parallel rank runs it. Pure: plain Python in, plain Python out.

The plan of a step depends on the groups' lengths, the token budget and the number of data-parallel ranks, so the same
groups make the same step at every tensor and pipeline layout. Invariants, which `check_plan` states as code:

1. every group is in exactly one row;
2. no row holds more tokens than the budget;
3. every data-parallel rank has the same number of rows (a row may be empty: it is padding, and counts no group);
4. all rows of a step are padded to one length T, a multiple of the alignment and the least that fits.

Rows are balanced by cost (FLOPs), not by tokens.
"""

import functools
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpo_megatron.errors import ConfigError
from mpo_megatron.scheduling.layout import GroupLengths

Row = tuple[int, ...]  # positions of the row's groups in the list that was planned


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a forward pass by what a row holds (a matrix product counts 2 per multiply-add)."""

    per_token: float
    per_attention_pair: float
    per_response_token: float

    def of(self, group: GroupLengths, shared_prompt: bool) -> float:
        return (
            self.per_token * group.row_tokens(shared_prompt)
            + self.per_attention_pair * group.attention_pairs(shared_prompt)
            + self.per_response_token * sum(group.responses)
        )


@dataclass(frozen=True)
class StepPlan:
    """The rows of one step: `rows[d]` are those of data-parallel rank d, `row_tokens` is T, their padded length."""

    rows: tuple[tuple[Row, ...], ...]
    row_tokens: int

    @property
    def rows_per_rank(self) -> int:
        return len(self.rows[0])


def plan_step(
    groups: Sequence[GroupLengths],
    *,
    max_tokens: int,
    data_parallel: int,
    cost: CostModel,
    alignment: int = 1,
    shared_prompt: bool = True,
) -> StepPlan:
    """Put the groups of a global step into rows.

    Args:
        groups: lengths of the step's groups.
        max_tokens: token budget of a row; a multiple of `alignment`.
        data_parallel: ranks among which the rows are shared out.
        cost: what a group costs, for the balance.
        alignment: T is a multiple of it.
        shared_prompt: whether a row stores a group's prompt once.

    Raises:
        ConfigError: a group alone is above the budget.
    """
    tokens = [group.row_tokens(shared_prompt) for group in groups]
    costs = [cost.of(group, shared_prompt) for group in groups]
    largest = max(tokens, default=0)
    if largest > max_tokens:
        raise ConfigError(
            f"model.max_tokens_per_micro_batch={max_tokens} is less than the {largest} tokens of the largest group "
            f"(prompt {groups[tokens.index(largest)].prompt} + responses {groups[tokens.index(largest)].responses}); "
            f"raise it to at least {largest}, or lower model.data.max_length"
        )
    # Costly groups first; the position breaks ties, so that the plan is a function of its arguments.
    order = sorted(range(len(groups)), key=lambda i: (-costs[i], i))
    rows_per_rank = max(1, math.ceil(sum(tokens) / max_tokens / data_parallel))
    while (bins := _fill(order, tokens, costs, max_tokens, rows_per_rank * data_parallel)) is None:
        rows_per_rank += 1
    ranked = sorted(bins, key=lambda row: (-sum(costs[i] for i in row), row))
    rows = _deal(ranked, costs, data_parallel, rows_per_rank)
    longest = max(sum(tokens[i] for i in row) for row in bins)
    row_tokens = max(alignment, math.ceil(longest / alignment) * alignment)
    return StepPlan(rows, row_tokens)


def _fill(
    order: Sequence[int], tokens: Sequence[int], costs: Sequence[float], max_tokens: int, num_rows: int
) -> list[Row] | None:
    """Give each group in turn to the cheapest row that has room; None when one finds no room."""
    heap: list[tuple[float, int]] = [(0.0, row) for row in range(num_rows)]
    members: list[list[int]] = [[] for _ in range(num_rows)]
    used = [0] * num_rows
    for group in order:
        passed_over = []
        while heap and used[heap[0][1]] + tokens[group] > max_tokens:
            passed_over.append(heapq.heappop(heap))
        if not heap:
            return None
        load, row = heapq.heappop(heap)
        members[row].append(group)
        used[row] += tokens[group]
        heapq.heappush(heap, (load + costs[group], row))
        for entry in passed_over:
            heapq.heappush(heap, entry)
    return [tuple(sorted(row)) for row in members]


def _deal(
    rows: Sequence[Row], costs: Sequence[float], data_parallel: int, rows_per_rank: int
) -> tuple[tuple[Row, ...], ...]:
    """Give the rows, costly first, each to the least loaded rank that still lacks one."""
    hands: list[list[Row]] = [[] for _ in range(data_parallel)]
    loads = [0.0] * data_parallel
    for row in rows:
        rank = min(
            (d for d in range(data_parallel) if len(hands[d]) < rows_per_rank), key=lambda d: (loads[d], d)
        )
        hands[rank].append(row)
        loads[rank] += sum(costs[i] for i in row)
    return tuple(tuple(hand) for hand in hands)


def check_plan(
    plan: StepPlan,
    groups: Sequence[GroupLengths],
    *,
    max_tokens: int,
    data_parallel: int,
    alignment: int = 1,
    shared_prompt: bool = True,
) -> None:
    """Assert every invariant of the module's docstring."""
    rows = [row for rank_rows in plan.rows for row in rank_rows]
    assert sorted(i for row in rows for i in row) == list(range(len(groups))), (
        "a group is missing or in two rows"
    )
    filled = [sum(groups[i].row_tokens(shared_prompt) for i in row) for row in rows]
    assert max(filled) <= max_tokens, f"a row of {max(filled)} tokens is above the budget of {max_tokens}"
    assert len(plan.rows) == data_parallel, "not one list of rows per data-parallel rank"
    assert len({len(rank_rows) for rank_rows in plan.rows}) == 1, "ranks have different numbers of rows"
    assert plan.row_tokens % alignment == 0, "T is not a multiple of the alignment"
    assert max(filled) <= plan.row_tokens < max(filled) + alignment or max(filled) == 0, (
        "T is not the least that fits"
    )


@functools.lru_cache(maxsize=2)
def epoch_order(num_groups: int, seed: int, epoch: int) -> np.ndarray:
    """[num_groups] the order in which an epoch visits the groups: a permutation drawn from (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(num_groups)


def steps_per_epoch(num_groups: int, global_batch_size: int) -> int:
    """Steps that visit every group once; the last may have fewer groups than the others."""
    return math.ceil(num_groups / global_batch_size)


def step_groups(step: int, num_groups: int, global_batch_size: int, seed: int) -> np.ndarray:
    """The groups of global step `step` (from 0, over all epochs), as positions in the data set."""
    epoch, within = divmod(step, steps_per_epoch(num_groups, global_batch_size))
    order = epoch_order(num_groups, seed, epoch)
    # A copy: a view would keep the whole epoch's order alive for every step that is held.
    return order[within * global_batch_size : (within + 1) * global_batch_size].copy()


def in_order(num_groups: int, global_batch_size: int) -> Iterator[np.ndarray]:
    """The data set front to back in steps of `global_batch_size` groups, for validation."""
    for start in range(0, num_groups, global_batch_size):
        yield np.arange(start, min(start + global_batch_size, num_groups))
