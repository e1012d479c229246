"""From groups of a data set to this rank's rows of a step.

Shapes: S responses of the step's groups that need a first pass, in the order of the step, then of the group.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_megatron.data import Groups
from mpo_megatron.ragged.groups import GroupIndex
from mpo_megatron.ragged.transfer import Staged
from mpo_megatron.scheduling.ahead import made_ahead
from mpo_megatron.scheduling.layout import GroupLengths
from mpo_megatron.scheduling.pack import PackedRow, concatenated, pack_row
from mpo_megatron.scheduling.plan import (
    NO_PIPELINE,
    CostModel,
    Part,
    Pipeline,
    StepPlan,
    check_budget,
    check_plan,
    plan_step,
)

# Groups as positions in the data set.
Positions = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class SplitGroups:
    """The groups of a step whose loss needs a first pass, whole: the same on every data-parallel rank.

    They are those that lie in more than one row; for an objective of the global batch, all.

    Attributes:
        response_ids: [S] int64, the responses' numbers in the data set.
        lengths: [S] int64 response tokens.
        scores: [S] float32.
        preferred: [S] bool.
        index: the responses by the groups.
    """

    response_ids: Tensor
    lengths: Tensor
    scores: Tensor
    preferred: Tensor
    index: GroupIndex

    @property
    def num_groups(self) -> int:
        return self.index.groups.count


@dataclass(frozen=True)
class StepRows:
    """One data-parallel rank's rows of a step, and the size of the global step.

    Attributes:
        rows: the rank's micro-batches; the first `first_pass` of them hold responses of `split` (on some rank).
        longest_row: the largest T of the step's rows; in a pipeline all have it.
        first_pass: rows that run twice; 0 where no group needs it.
        split: the groups that need a first pass; None where there are none.
        split_groups: groups in more than one row.
        groups: groups of the global step.
        tokens: tokens of the global step, padding left out.
        padded_tokens: the same with padding.
    """

    rows: list[PackedRow]
    longest_row: int
    first_pass: int
    split: SplitGroups | None
    split_groups: int
    groups: int
    tokens: int
    padded_tokens: int

    @property
    def fill(self) -> float:
        """The part of the global step's row tokens that is not padding."""
        return self.tokens / self.padded_tokens

    def iterators(self, num_chunks: int, stop: int | None = None) -> list[Iterator[PackedRow]]:
        """What Megatron's schedules call `data_iterator`: one iterator over the rows for each of a rank's model
        chunks.
        """
        return [iter(self.rows[:stop]) for _ in range(num_chunks)]


@dataclass(frozen=True)
class StagedStep:
    """A step's rows on the host, ready to go to the device: each row in one copy, and the split groups in one.

    Attributes:
        counts: the step, without what the two others bring to it.
    """

    counts: StepRows
    rows: list[Staged[PackedRow]]
    split: Staged[SplitGroups] | None

    def arrive(self) -> StepRows:
        """The step with its tensors on the device, whose copies the host does not wait for."""
        rows = [row.arrive() for row in self.rows]
        return replace(self.counts, rows=rows, split=None if self.split is None else self.split.arrive())


def group_lengths(dataset: Groups, position: int) -> GroupLengths:
    """Token counts of the group at `position` of a data set."""
    first, stop = dataset.response_offsets[position : position + 2]
    return GroupLengths(
        int(dataset.prompt_lengths[position]), tuple(dataset.response_lengths[first:stop].tolist())
    )


class RowSource:
    """Plans and packs steps of one data set. Every rank makes the whole plan and packs its own part.

    Args:
        dataset: the groups.
        max_tokens: token budget of a row. A group above it is cut into parts, which costs it one more forward pass.
        alignment: rows are padded to a multiple of it: of the tensor-parallel size under sequence parallelism, and of
            twice the context-parallel size.
        shared_prompt: store each prompt once, or once for each response.
        global_batch: run all rows twice, so that an objective sees all groups of a step at once.
        cost: what tokens cost, for the balance between ranks.
        data_parallel: (number of data-parallel ranks, this rank's place).
        context: (number of context-parallel ranks, this rank's place).
        pipeline: stages and model chunks on each, which set the number and lengths of rows.
        device: where the rows' tensors go.
        prefetch: steps that `steps` makes ahead in a thread.

    Raises:
        ConfigError: a prompt with one of its responses is above the token budget.
    """

    def __init__(
        self,
        dataset: Groups,
        *,
        max_tokens: int,
        alignment: int,
        cost: CostModel,
        shared_prompt: bool = True,
        global_batch: bool = False,
        data_parallel: tuple[int, int] = (1, 0),
        context: tuple[int, int] = (1, 0),
        pipeline: Pipeline = NO_PIPELINE,
        device: torch.device | str = "cpu",
        prefetch: int = 0,
    ) -> None:
        self.dataset = dataset
        self.max_tokens = max_tokens
        self.alignment = alignment
        self.shared_prompt = shared_prompt
        self.global_batch = global_batch
        self.cost = cost
        self.data_parallel = data_parallel
        self.context = context
        self.pipeline = pipeline
        self.device = torch.device(device)
        self.prefetch = prefetch
        # Names a part of the work for a profiler.
        self.mark: Callable[[str], AbstractContextManager[Any]] = nullcontext
        # Now, rather than at the step that a group too long comes in.
        if len(dataset):
            prompts = np.repeat(dataset.prompt_lengths, np.diff(dataset.response_offsets))
            longest = int(np.argmax(prompts + dataset.response_lengths))
            alone = GroupLengths(int(prompts[longest]), (int(dataset.response_lengths[longest]),))
            check_budget([alone], max_tokens)

    def _size(self, position: int) -> int:
        first, stop = self.dataset.response_offsets[position : position + 2]
        return int(stop - first)

    def lengths(self, position: int) -> GroupLengths:
        """Token counts of the group at `position` of the data set."""
        return group_lengths(self.dataset, position)

    def count_split(self) -> int:
        """Groups of the data set that are larger than a row, and so run in two passes."""
        offsets, prompts = self.dataset.response_offsets, self.dataset.prompt_lengths
        copies = 1 if self.shared_prompt else np.diff(offsets)
        # No group is without responses.
        responses = np.add.reduceat(self.dataset.response_lengths, offsets[:-1])
        return int((prompts * copies + responses > self.max_tokens).sum())

    def plan(self, positions: Positions) -> StepPlan:
        """The plan of the step of the groups at `positions`, the same on all ranks.

        Raises:
            ConfigError: a prompt with one of its responses is above the token budget.
        """
        lengths = [self.lengths(int(i)) for i in positions]
        limits: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "data_parallel": self.data_parallel[0],
            "alignment": self.alignment,
            "shared_prompt": self.shared_prompt,
            "pipeline": self.pipeline,
        }
        plan = plan_step(lengths, cost=self.cost, **limits)
        if __debug__:  # a millisecond a step; `python -O` goes without
            check_plan(plan, lengths, **limits)
        return plan

    def step(self, positions: Positions) -> StepRows:
        """This rank's rows of the step of the groups at `positions` of the data set."""
        return self.stage(positions).arrive()

    @contextmanager
    def steps(self, steps: Iterable[Positions]) -> Iterator[Iterator[StepRows]]:
        """`step` of each, in order; with `prefetch`, `stage` runs in a thread ahead of the steps that use the rows.

        An error of `stage` is raised at its own step. No thread is left after the block.
        """
        with closing(made_ahead(self.stage, steps, self.prefetch, self._start_thread)) as staged:
            yield (one.arrive() for one in staged)

    def _start_thread(self) -> None:
        """A thread begins on the first GPU, and would make a CUDA context there."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def stage(self, positions: Positions) -> StagedStep:
        """What of `step` is the host's work: plan, read and pack. A thread may do it beside a step.

        It draws no random numbers, calls no other rank, and asks nothing of the device.
        """
        with self.mark("plan"):
            plan = self.plan(positions)
        with self.mark("read and pack"):
            return self._filled(positions, plan)

    def _filled(self, positions: Positions, plan: StepPlan) -> StagedStep:
        """This rank's rows of a plan."""
        twice = range(len(positions)) if self.global_batch else plan.split
        responses = [(group, k) for group in twice for k in range(self._size(int(positions[group])))]
        slots = {response: slot for slot, response in enumerate(responses)}
        mine = self.data_parallel[1]
        rows = [
            self._pack(row, length, positions, plan, slots)
            for row, length in zip(plan.rows[mine], plan.row_lengths[mine], strict=True)
        ]
        tokens = sum(
            self.lengths(int(positions[part.group])).part(part.responses).row_tokens(self.shared_prompt)
            for rank_rows in plan.rows
            for row in rank_rows
            for part in row
        )
        counts = StepRows(
            [],
            plan.longest_row,
            len(rows) if self.global_batch else plan.first_pass,
            None,
            len(plan.split),
            len(positions),
            tokens,
            plan.padded_tokens,
        )
        split = self._split_groups(twice, positions) if twice else None
        return StagedStep(
            counts,
            [Staged(row, self.device) for row in rows],
            None if split is None else Staged(split, self.device),
        )

    def _pack(
        self,
        row: Sequence[Part],
        row_tokens: int,
        positions: Positions,
        plan: StepPlan,
        slots: dict[tuple[int, int], int],
    ) -> PackedRow:
        groups, response_ids = [], []
        for part in row:
            position = int(positions[part.group])
            first = int(self.dataset.response_offsets[position])
            groups.append(self.dataset.group(position).select(part.responses))
            response_ids.append([first + k for k in part.responses])
        runs_twice = bool(row) and (row[0].group, 0) in slots
        return pack_row(
            groups,
            response_ids,
            row_tokens=row_tokens,
            shared_prompt=self.shared_prompt,
            split_slots=[slots[part.group, k] for part in row for k in part.responses]
            if runs_twice
            else None,
            # A split group counts where its first response lies, so that it counts once.
            counted_groups=sum(0 in part.responses for part in row),
            context=self.context,
        )

    def _split_groups(self, twice: Sequence[int], positions: Positions) -> SplitGroups:
        groups = [self.dataset.group(int(positions[i])) for i in twice]
        offsets = [int(self.dataset.response_offsets[int(positions[i])]) for i in twice]
        sizes = [len(group.response_ids) for group in groups]
        return SplitGroups(
            response_ids=concatenated(
                [np.arange(o, o + n) for o, n in zip(offsets, sizes, strict=True)], torch.int64
            ),
            lengths=concatenated([[len(r) for r in g.response_ids] for g in groups], torch.int64),
            scores=concatenated([g.scores for g in groups], torch.float32),
            preferred=concatenated([g.preferred for g in groups], torch.bool),
            index=GroupIndex.of(sizes),
        )
