"""Tokenised groups: one of them, what a collection of them offers, and one in memory.

G groups, R responses of all groups; response k of group i has the number response_offsets[i] + k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TokenizedGroup:
    """One group: prompt_ids int64 [P], n response_ids int64 [L_k], scores float64 [n], preferred bool [n]."""

    id: str
    prompt_ids: NDArray[np.int64]
    response_ids: list[NDArray[np.int64]]
    scores: NDArray[np.float64]
    preferred: NDArray[np.bool_]

    def select(self, responses: Sequence[int]) -> "TokenizedGroup":
        """The group with these of its responses alone."""
        chosen = list(responses)
        return TokenizedGroup(
            self.id,
            self.prompt_ids,
            [self.response_ids[k] for k in chosen],
            self.scores[chosen],
            self.preferred[chosen],
        )


class Groups(Protocol):
    """A collection of tokenised groups: lengths for planning, tokens on demand.

    Attributes:
        prompt_lengths: int64 [G] tokens of each prompt.
        response_offsets: int64 [G + 1]; group i has the responses numbered from [i] up to [i + 1].
        response_lengths: int64 [R] tokens of each response, by its number.
    """

    prompt_lengths: NDArray[np.int64]
    response_offsets: NDArray[np.int64]
    response_lengths: NDArray[np.int64]

    def __len__(self) -> int: ...

    def group(self, index: int) -> TokenizedGroup:
        """Group `index` of 0 .. G - 1."""
        ...


class GroupList:
    """Groups in memory, for data that is made on the spot."""

    def __init__(self, groups: Sequence[TokenizedGroup]) -> None:
        self._groups = list(groups)
        self.prompt_lengths = np.array([len(g.prompt_ids) for g in groups], dtype=np.int64)
        self.response_offsets = np.cumsum([0, *(len(g.response_ids) for g in groups)], dtype=np.int64)
        self.response_lengths = np.array([len(r) for g in groups for r in g.response_ids], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._groups)

    def group(self, index: int) -> TokenizedGroup:
        """Group `index` of 0 .. G - 1."""
        return self._groups[index]
