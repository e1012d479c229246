"""Rotary embedding by position, not by place in the row.

Megatron-core's RotaryEmbedding rotates token t of a sequence by angle t and ignores `position_ids`. In a
packed row each response goes on from its prompt's last position, so the angles come from the row's
`position_ids` [T]. Megatron asks `get_rotary_seq_len(..., packed_seq_params)` first and passes the answer to
`forward`: that is where positions go through.

On a CPU attention itself rotates, in fewer passes over memory, by cosines and sines that all layers of a row have in
common; Megatron is given no angles then.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor


class PositionRotaryEmbedding(RotaryEmbedding):
    """RoPE of given inverse frequencies [head_dim / 2] at given positions.

    The frequencies come from the Hugging Face config (rope scaling included), so both sides rotate alike.
    """

    def __init__(
        self, inverse_frequencies: Sequence[float], device: torch.device, in_attention: bool = False
    ) -> None:
        """Args:
        in_attention: whether `SharedPromptAttention` rotates, and not Megatron.
        """
        torch.nn.Module.__init__(self)  # the parent's constructor only computes what is given here
        # A plain attribute, not a buffer: casting the model to bfloat16 must not round the angles.
        self.inv_freq = torch.tensor(inverse_frequencies, dtype=torch.float32, device=device)
        self.in_attention = in_attention
        self.rotary_interleaved = False
        self.seq_len_interpolation_factor = None

    def get_rotary_seq_len(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Tensor:
        """[T] the row's position ids, in the place of the length that Megatron expects."""
        params = packed_seq_params if packed_seq_params is not None else args[4]
        if self.in_attention:
            params.angles = self._angles(params.row.position_ids)
        return params.row.position_ids

    def _angles(self, position_ids: Tensor) -> Tensor:
        return torch.outer(position_ids.to(torch.float32), self.inv_freq)

    def forward(self, position_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """[T, 1, 1, head_dim] angles for the positions [T]; None where attention has its own."""
        if self.in_attention:
            return None
        angles = self._angles(position_ids)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
