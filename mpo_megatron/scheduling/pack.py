"""The tensors of a row.

Shapes: T packed tokens, N predicted tokens, R responses, G groups, all of this row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpo_megatron.data import TokenizedGroup
from mpo_megatron.scheduling.layout import Block, GroupLengths, Span, context_spans, lay_out


@dataclass(frozen=True)
class PackedRow:
    """One micro-batch: whole groups, or parts of split groups, in one sequence.

    Under context parallelism a rank holds the tokens in `held`, and t = T / CP of them; without, t = T. The index
    tensors are int32: they live until the backward pass.

    Attributes:
        row_tokens: T.
        held: the spans of the row that this rank holds, ascending.
        blocks: where prompts and responses lie in the row.
        tokens: [t] int64, of the held spans one after the other; padding is token 0.
        position_ids: [t] int64, position of each token in its own prompt + response; padding has 0.
        predict_from: [N] int32, the place among the held tokens whose hidden state predicts each target. The last token
            of a shared prompt predicts the first token of every response, so it appears once for each.
        targets: [N] int32, the response tokens that this rank predicts.
        target_response: [N] int32 in [0, R), the response that each target belongs to.
        response_ids: [R] int64, the responses' numbers in the data set.
        lengths: [R] int64 response tokens.
        scores: [R] float32.
        preferred: [R] bool.
        group_index: [R] int64 in [0, G).
        num_groups: G, groups or parts in the row.
        counted_groups: what the row adds to the number of groups of the global batch, by which the gradient is divided:
            its whole groups, and the split groups whose first response it holds; 0 on all but the first
            context-parallel rank, whose ranks hold the same row.
        split_slots: [R] int64, for a row that runs twice: the responses' places among those that the first pass is for
            (`SplitGroups`). None for a row whose groups' losses are its own.
    """

    row_tokens: int
    held: tuple[Span, ...]
    blocks: tuple[Block, ...]
    tokens: Tensor
    position_ids: Tensor
    predict_from: Tensor
    targets: Tensor
    target_response: Tensor
    response_ids: Tensor
    lengths: Tensor
    scores: Tensor
    preferred: Tensor
    group_index: Tensor
    num_groups: int
    counted_groups: int
    split_slots: Tensor | None

    @property
    def num_responses(self) -> int:
        return self.response_ids.numel()

    @property
    def used_tokens(self) -> int:
        """Held tokens that are not padding; they come first."""
        end = self.blocks[-1].responses[-1].stop if self.blocks else 0
        return sum(max(0, min(span.stop, end) - span.start) for span in self.held)


def pack_row(
    groups: Sequence[TokenizedGroup],
    response_ids: Sequence[Sequence[int]],
    *,
    row_tokens: int,
    shared_prompt: bool,
    split_slots: Sequence[int] | None = None,
    counted_groups: int | None = None,
    context: tuple[int, int] = (1, 0),
    device: torch.device | str = "cpu",
) -> PackedRow:
    """Pack groups, or parts of groups, into one row of `row_tokens` tokens.

    Args:
        groups: the row's groups (of a part: the group with that part's responses); none makes a row of padding.
        response_ids: for each group, its responses' numbers in the data set.
        row_tokens: T; at least what the groups take, and a multiple of twice the context-parallel size.
        shared_prompt: store each prompt once, or once for each response.
        split_slots: for a row that runs twice, the place of each response among those that the first pass is for.
        counted_groups: groups that the row counts; None: all.
        context: (context-parallel size, this rank's place in it).
        device: where the tensors go.
    """
    size, rank = context
    lengths = [GroupLengths(len(g.prompt_ids), tuple(len(r) for r in g.response_ids)) for g in groups]
    blocks = lay_out(lengths, shared_prompt)
    tokens, positions, predict_from, targets = _write_tokens(groups, blocks, row_tokens, shared_prompt)
    counts = [len(part) for part in targets]

    held = context_spans(row_tokens, size, rank)
    mine = np.concatenate([np.arange(span.start, span.stop) for span in held])
    place = np.full(row_tokens, -1)  # of each token of the row among the held ones
    place[mine] = np.arange(len(mine))
    places = place[np.concatenate(predict_from)] if predict_from else np.zeros(0, dtype=np.int64)
    here = places >= 0

    def whole(parts: Sequence[np.ndarray | Sequence], dtype: torch.dtype) -> Tensor:
        array = np.concatenate(parts) if parts else np.zeros(0)
        return torch.as_tensor(array, device=device).to(dtype)

    def index(array: np.ndarray) -> Tensor:
        return torch.as_tensor(array[here].astype(np.int32), device=device)

    sizes = [len(g.response_ids) for g in groups]
    count = len(groups) if counted_groups is None else counted_groups
    return PackedRow(
        row_tokens=row_tokens,
        held=held,
        blocks=blocks,
        tokens=torch.as_tensor(tokens[mine], device=device),
        position_ids=torch.as_tensor(positions[mine], device=device),
        predict_from=index(places),
        targets=index(np.concatenate(targets) if targets else np.zeros(0)),
        target_response=index(np.repeat(np.arange(len(counts)), counts)),
        response_ids=whole(response_ids, torch.int64),
        lengths=torch.tensor(counts, dtype=torch.int64, device=device),
        scores=whole([g.scores for g in groups], torch.float32),
        preferred=whole([g.preferred for g in groups], torch.bool),
        group_index=torch.as_tensor(np.repeat(np.arange(len(sizes)), sizes), device=device),
        num_groups=len(groups),
        counted_groups=count if rank == 0 else 0,
        split_slots=None if split_slots is None else torch.tensor(split_slots, device=device),
    )


def _write_tokens(
    groups: Sequence[TokenizedGroup], blocks: Sequence[Block], row_tokens: int, shared_prompt: bool
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """(tokens [T], positions [T], and for each response: the places that predict its tokens, its tokens)."""
    tokens = np.zeros(row_tokens, dtype=np.int64)
    positions = np.zeros(row_tokens, dtype=np.int64)
    predict_from: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for block, (prompt, responses) in zip(blocks, _unpack(groups, shared_prompt), strict=True):
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
    return tokens, positions, predict_from, targets


def _unpack(
    groups: Sequence[TokenizedGroup], shared_prompt: bool
) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """(prompt, responses) of each block, in `lay_out`'s order."""
    if shared_prompt:
        return [(g.prompt_ids, list(g.response_ids)) for g in groups]
    return [(g.prompt_ids, [response]) for g in groups for response in g.response_ids]
