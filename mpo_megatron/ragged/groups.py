"""The responses of a batch by their groups, and all pairs of responses of one group.

Shapes: R responses, G groups, P ordered pairs of responses of one group, each with itself included: P = sum of n^2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpo_megatron.ragged.segments import Segments, spread
from mpo_megatron.ragged.transfer import to_device


@dataclass(frozen=True)
class GroupIndex:
    """Who is where in a batch of groups, known from their sizes alone. Pairs are ordered by their first response.

    Attributes:
        groups: the R responses in G groups.
        first: the P pairs by their first responses, of R.
        second: the P pairs by their second responses, of R.
        pairs: the P pairs in G groups.
    """

    groups: Segments
    first: Segments
    second: Segments
    pairs: Segments

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device | str = "cpu") -> "GroupIndex":
        """Of groups with these numbers of responses.

        Example:
            >>> index = GroupIndex.of([1, 2])
            >>> index.groups.segment.tolist()
            [0, 1, 1]
            >>> list(zip(index.first.segment.tolist(), index.second.segment.tolist()))
            [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
        """
        counts = np.asarray(sizes, dtype=np.int64)
        total, num_groups = int(counts.sum()), len(counts)
        group = np.repeat(np.arange(num_groups), counts)
        own = counts[group]
        first = np.repeat(np.arange(total), own)
        start = (counts.cumsum() - counts)[group]
        second = np.arange(len(first)) - (own.cumsum() - own)[first] + start[first]
        index = cls(
            Segments.of(group, num_groups),
            Segments.of(first, total),
            Segments.of(second, total),
            Segments.of(group[first], num_groups),
        )
        return index if torch.device(device).type == "cpu" else to_device(index, device)

    def both(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """([P], [P]) of each pair its first response's value and its second's, from `values` [R]."""
        return spread(values, self.first), spread(values, self.second)
