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
        # [t, D / 2] of the row's positions, where attention rotates queries and keys.
        self.angles: Tensor | None = None
        self._turns: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def turn(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """([t, 1, D / 2] cosines, sines) of the angles; None where Megatron rotates."""
        if self.angles is not None and dtype not in self._turns:
            self._turns[dtype] = (
                self.angles.cos().to(dtype)[:, None],
                self.angles.sin().to(dtype)[:, None],
            )
        return self._turns.get(dtype)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments of the tokens that this rank holds."""
        return self.row.segments

    @cached_property
    def pieces(self) -> tuple[Span, ...]:
        """The row's prompts and responses in its order, without gaps from 0 to the padding."""
        return tuple(span for block in self.row.blocks for span in (block.prompt, *block.responses))

    def mask(self, segment: Segment, dtype: torch.dtype) -> Tensor | None:
        """[queries, keys] what the segment's bottom-right causal mask adds to scores, 0 or -inf; None: it is square.

        One for all segments of these lengths in all layers, in the type of the scores: torch would otherwise make it
        of a bool mask at each call, and keep it.
        """
        queries, keys = segment.queries.length, segment.num_keys
        if queries == keys:
            return None
        key = (queries, keys, dtype)
        if key not in self._masks:
            hidden = torch.full((queries, keys), -torch.inf, dtype=dtype, device=self.row.tokens.device)
            self._masks[key] = hidden.triu(keys - queries + 1)
        return self._masks[key]
