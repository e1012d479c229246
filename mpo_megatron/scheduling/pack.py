"""The tensors of a row.

Shapes: T packed tokens, N response tokens, R responses, G groups, all of this row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpo_megatron.data.dataset import TokenizedGroup
from mpo_megatron.scheduling.layout import Block, GroupLengths, lay_out


@dataclass(frozen=True)
class PackedRow:
    """One micro-batch: whole groups in one sequence.

    Attributes:
        tokens: [T] int64; padding is token 0.
        position_ids: [T] int64, position of each token in its own prompt + response; padding has 0.
        blocks: where prompts and responses lie.
        predict_from: [N] int64, the place in the row whose hidden state predicts each response token. The
        last token of a
            shared prompt predicts the first token of all of the group's responses, so it appears once for each.
        targets: [N] int64, the response tokens.
        target_response: [N] int64 in [0, R), the response that each target belongs to.
        response_ids: [R] int64, the responses' numbers in the data set.
        lengths: [R] int64 response tokens.
        scores: [R] float32.
        preferred: [R] bool.
        group_index: [R] int64 in [0, G).
        num_groups: G.
    """

    tokens: Tensor
    position_ids: Tensor
    blocks: tuple[Block, ...]
    predict_from: Tensor
    targets: Tensor
    target_response: Tensor
    response_ids: Tensor
    lengths: Tensor
    scores: Tensor
    preferred: Tensor
    group_index: Tensor
    num_groups: int

    @property
    def num_responses(self) -> int:
        return self.response_ids.numel()

    @property
    def used_tokens(self) -> int:
        """Tokens that are not padding."""
        last = self.blocks[-1] if self.blocks else None
        return last.responses[-1].stop if last else 0


def pack_row(
    groups: Sequence[TokenizedGroup],
    response_ids: Sequence[Sequence[int]],
    *,
    row_tokens: int,
    shared_prompt: bool,
    device: torch.device | str = "cpu",
) -> PackedRow:
    """Pack whole groups into one row of `row_tokens` tokens.

    Args:
        groups: the row's groups; none makes a row of padding.
        response_ids: for each group, its responses' numbers in the data set.
        row_tokens: T; at least what the groups take.
        shared_prompt: store each prompt once, or once for each response.
        device: where the tensors go.
    """
    lengths = [GroupLengths(len(g.prompt_ids), tuple(len(r) for r in g.response_ids)) for g in groups]
    blocks = lay_out(lengths, shared_prompt)
    tokens = np.zeros(row_tokens, dtype=np.int64)
    positions = np.zeros(row_tokens, dtype=np.int64)
    predict_from: list[np.ndarray] = []
    targets: list[np.ndarray] = []

    prompts_and_responses = _unpack(groups, shared_prompt)
    for block, (prompt, responses) in zip(blocks, prompts_and_responses, strict=True):
        start, prompt_length = block.prompt.start, block.prompt.length
        tokens[start : block.prompt.stop] = prompt
        positions[start : block.prompt.stop] = np.arange(prompt_length)
        for span, response in zip(block.responses, responses, strict=True):
            tokens[span.start : span.stop] = response
            positions[span.start : span.stop] = np.arange(prompt_length, prompt_length + span.length)
            predict_from.append(
                np.concatenate([[block.prompt.stop - 1], np.arange(span.start, span.stop - 1)])
            )
            targets.append(response)

    def whole(parts: Sequence[np.ndarray | Sequence], dtype: torch.dtype) -> Tensor:
        array = np.concatenate(parts) if parts else np.zeros(0)
        return torch.as_tensor(array, device=device).to(dtype)

    counts = [len(part) for part in targets]
    sizes = [len(g.response_ids) for g in groups]
    return PackedRow(
        tokens=torch.as_tensor(tokens, device=device),
        position_ids=torch.as_tensor(positions, device=device),
        blocks=blocks,
        predict_from=whole(predict_from, torch.int64),
        targets=whole(targets, torch.int64),
        target_response=torch.as_tensor(np.repeat(np.arange(len(counts)), counts), device=device),
        response_ids=whole(response_ids, torch.int64),
        lengths=torch.tensor(counts, dtype=torch.int64, device=device),
        scores=whole([g.scores for g in groups], torch.float32),
        preferred=whole([g.preferred for g in groups], torch.bool),
        group_index=torch.as_tensor(np.repeat(np.arange(len(sizes)), sizes), device=device),
        num_groups=len(groups),
    )


def _unpack(
    groups: Sequence[TokenizedGroup], shared_prompt: bool
) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """(prompt, responses) of each block, in `lay_out`'s order."""
    if shared_prompt:
        return [(g.prompt_ids, list(g.response_ids)) for g in groups]
    return [(g.prompt_ids, [response]) for g in groups for response in g.response_ids]
