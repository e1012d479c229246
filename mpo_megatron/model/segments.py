"""A row's attention as a list of variable-length problems, computed once per row and used by every layer.

One primitive serves all backends: the queries of a segment look at the keys of [its prompt | itself], causally, aligned
bottom-right. A prompt is a segment without a prompt before it. Segments follow each other in the row without
gaps, so the queries need no gathering; the keys do, since each response reads its prompt's keys again.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mpo_megatron.scheduling.layout import Span
from mpo_megatron.scheduling.pack import PackedRow


@dataclass(frozen=True)
class Segment:
    """Queries `own` with keys [`prompt` | `own`]; `prompt` is None where `own` is a prompt itself."""

    own: Span
    prompt: Span | None

    @property
    def num_keys(self) -> int:
        return self.own.length + (self.prompt.length if self.prompt else 0)


class RowParams(PackedSeqParams):
    """What Megatron hands from the model's entry to every attention layer, recomputation included.

    `qkv_format` is not "thd", so Megatron leaves queries, keys and values as [T, 1, heads, head_dim].
    """

    def __init__(self, row: PackedRow) -> None:
        super().__init__(qkv_format="sbhd")
        self.row = row

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The row's prompts and responses in the order of the row."""
        found = []
        for block in self.row.blocks:
            found.append(Segment(block.prompt, None))
            found.extend(Segment(response, block.prompt) for response in block.responses)
        return tuple(found)

    @cached_property
    def masks(self) -> dict[tuple[int, int], Tensor]:
        """[own, prompt + own] bool bottom-right causal masks, one for each pair of lengths in the row."""
        pairs = {(s.own.length, s.num_keys) for s in self.segments if s.prompt}
        ones = {pair: torch.ones(pair, dtype=torch.bool, device=self.row.tokens.device) for pair in pairs}
        return {(q, k): mask.tril(k - q) for (q, k), mask in ones.items()}

    @cached_property
    def key_index(self) -> Tensor:
        """[sum of keys] where in the row the keys of all segments lie, segment after segment."""
        spans = [span for s in self.segments for span in (s.prompt, s.own) if span]
        device = self.row.tokens.device
        parts = [torch.arange(span.start, span.stop, device=device) for span in spans]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)

    @cached_property
    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        """([S + 1], [S + 1]) int32 cumulative lengths of the segments' queries and keys."""
        device = self.row.tokens.device

        def cumulative(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

        return cumulative([s.own.length for s in self.segments]), cumulative(
            [s.num_keys for s in self.segments]
        )

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of any segment."""
        return max(s.own.length for s in self.segments), max(s.num_keys for s in self.segments)
