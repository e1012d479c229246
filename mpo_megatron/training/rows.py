"""From groups of a data set to this rank's rows of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mpo_megatron.data.dataset import GroupDataset
from mpo_megatron.scheduling.layout import GroupLengths
from mpo_megatron.scheduling.pack import PackedRow, pack_row
from mpo_megatron.scheduling.plan import CostModel, plan_step

# Groups as positions in the data set.
Positions = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class StepRows:
    """This data-parallel rank's rows of a step, each of `row_tokens` tokens, and the global step's size."""

    rows: list[PackedRow]
    row_tokens: int
    groups: int
    tokens: int  # of the global step, padding left out


class RowSource:
    """Plans and packs steps of one data set. Every rank makes the whole plan and packs its own part."""

    def __init__(
        self,
        dataset: GroupDataset,
        *,
        max_tokens: int,
        alignment: int,
        shared_prompt: bool,
        cost: CostModel,
        data_parallel: int,
        data_parallel_rank: int,
        device: torch.device,
    ) -> None:
        self.dataset = dataset
        self.max_tokens = max_tokens // alignment * alignment
        self.alignment = alignment
        self.shared_prompt = shared_prompt
        self.cost = cost
        self.data_parallel = data_parallel
        self.data_parallel_rank = data_parallel_rank
        self.device = device

    def step(self, positions: Positions) -> StepRows:
        """This rank's rows of the step that trains on the groups at `positions` of the data set."""
        dataset = self.dataset
        offsets = dataset.response_offsets
        lengths = [
            GroupLengths(
                int(dataset.prompt_lengths[i]),
                tuple(dataset.response_lengths[offsets[i] : offsets[i + 1]].tolist()),
            )
            for i in positions
        ]
        plan = plan_step(
            lengths,
            max_tokens=self.max_tokens,
            data_parallel=self.data_parallel,
            cost=self.cost,
            alignment=self.alignment,
            shared_prompt=self.shared_prompt,
        )
        rows = []
        for members in plan.rows[self.data_parallel_rank]:
            indices = [int(positions[m]) for m in members]
            rows.append(
                pack_row(
                    [dataset.group(i) for i in indices],
                    [range(offsets[i], offsets[i + 1]) for i in indices],
                    row_tokens=plan.row_tokens,
                    shared_prompt=self.shared_prompt,
                    device=self.device,
                )
            )
        tokens = sum(group.row_tokens(self.shared_prompt) for group in lengths)
        return StepRows(rows, plan.row_tokens, len(lengths), tokens)
