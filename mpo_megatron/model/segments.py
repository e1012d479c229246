"""A row's attention as a list of variable-length problems, made with the row and used by every layer.

One primitive serves all backends: the queries of a segment look at the segment's keys, causally, aligned bottom-right
(see `scheduling.layout`). The segments of the tokens that a rank holds follow each other without gaps, so the
queries need no gathering; the keys do, since each response reads its prompt's keys again.
"""

from functools import cached_property

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mpo_megatron.scheduling.layout import Segment, Span
from mpo_megatron.scheduling.pack import PackedRow


class RowParams(PackedSeqParams):
    """What Megatron hands from the model's entry to every attention layer, recomputation included.

    `qkv_format` is not "thd", so Megatron leaves queries, keys and values as [T, 1, heads, head_dim].
    """

    def __init__(self, row: PackedRow) -> None:
        super().__init__(qkv_format="sbhd")
        self.row = row

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments of the tokens that this rank holds."""
        return self.row.segments

    @cached_property
    def pieces(self) -> tuple[Span, ...]:
        """The row's prompts and responses in its order, without gaps from 0 to the padding."""
        return tuple(span for block in self.row.blocks for span in (block.prompt, *block.responses))

    @cached_property
    def masks(self) -> dict[tuple[int, int], Tensor]:
        """[queries, keys] bool bottom-right causal masks, one for each pair of different lengths among the segments."""
        pairs = {(s.queries.length, s.num_keys) for s in self.segments}
        ones = {
            (q, k): torch.ones(q, k, dtype=torch.bool, device=self.row.tokens.device)
            for q, k in pairs
            if q < k
        }
        return {(q, k): mask.tril(k - q) for (q, k), mask in ones.items()}

    @cached_property
    def key_index(self) -> Tensor:
        """[sum of keys] where in the row the keys of all segments lie, segment after segment."""
        # An index of keys and values has to be int64; in the row it would take more room than the tokens.
        return self.row.attention.keys.long()

    @property
    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        """([A + 1], [A + 1]) int32 cumulative lengths of the segments' queries and keys."""
        return self.row.attention.cu_queries, self.row.attention.cu_keys

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of any segment."""
        return max(s.queries.length for s in self.segments), max(s.num_keys for s in self.segments)
