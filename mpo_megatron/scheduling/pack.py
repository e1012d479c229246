"""The tensors of a row.

Whatever the device needs to know of a row is made here, on the host, and goes there in one copy (`Staged`): tokens, and
every index, count and cumulative length. After it the step asks the device for nothing until it has its metrics.

Shapes: T packed tokens, N predicted tokens, R responses, G groups, A attention segments, all of this row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpo_megatron.data import TokenizedGroup
from mpo_megatron.ragged.groups import GroupIndex
from mpo_megatron.ragged.reads import Reads
from mpo_megatron.ragged.segments import Segments
from mpo_megatron.ragged.transfer import to_device
from mpo_megatron.scheduling.layout import (
    Block,
    GroupLengths,
    Segment,
    Span,
    context_spans,
    cut_segments,
    lay_out,
    padding_segments,
)


@dataclass(frozen=True)
class AttentionIndex:
    """What kernels for variable lengths ask about the row's attention segments, those of its padding among them.

    Attributes:
        keys: which of the T tokens each of all segments' keys is, segment after segment.
        cu_queries: [A + 1] int32 cumulative lengths of the segments' queries; the last is t.
        cu_keys: [A + 1] int32 cumulative lengths of their keys.
        longest: most queries and most keys of any segment.
    """

    keys: Reads
    cu_queries: Tensor
    cu_keys: Tensor
    longest: tuple[int, int]

    @classmethod
    def of(cls, segments: Sequence[Segment], row_tokens: int) -> "AttentionIndex":
        """From the segments of all held tokens, on the CPU."""
        keys = [np.arange(span.start, span.stop, dtype=np.int32) for s in segments for span in s.keys]
        queries, lengths = [s.queries.length for s in segments], [s.num_keys for s in segments]
        return cls(
            Reads.of(np.concatenate(keys), row_tokens),
            _cumulative(queries),
            _cumulative(lengths),
            (max(queries), max(lengths)),
        )


def _cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))


@dataclass(frozen=True)
class PackedRow:
    """One micro-batch: whole groups, or parts of split groups, in one sequence.

    Under context parallelism a rank holds the tokens in `held`, and t = T / CP of them; without, t = T. Most index
    tensors are int32: they live until the backward pass.

    Attributes:
        row_tokens: T.
        held: the spans of the row that this rank holds, ascending.
        blocks: where prompts and responses lie in the row.
        segments: the attention segments of the held tokens.
        tokens: [t] int64, of the held spans one after the other; padding is token 0.
        position_ids: [t] int64, position of each token in its own prompt + response; padding has 0.
        attention: of the attention segments and of segments of padding.
        reads: which held token's hidden state predicts which target. A token predicts the one after it, if that is a
            response's; the last token of a shared prompt predicts the first token of every response.
        targets: [N] int32, the response tokens that this rank predicts.
        by_response: the N targets by the R responses.
        response_ids: [R] int64, the responses' numbers in the data set.
        lengths: [R] int64 response tokens.
        scores: [R] float32.
        preferred: [R] bool.
        index: the R responses by the G groups, or parts of groups.
        counted_groups: what the row adds to the number of groups of the global batch, by which the gradient is divided:
            its whole groups, and the split groups whose first response it holds; 0 on all but the first
            context-parallel rank, whose ranks hold the same row.
        split_slots: [R] int64, for a row that runs twice: the responses' places among those that the first pass is for
            (`SplitGroups`). None for a row whose groups' losses are its own.
    """

    row_tokens: int
    held: tuple[Span, ...]
    blocks: tuple[Block, ...]
    segments: tuple[Segment, ...]
    tokens: Tensor
    position_ids: Tensor
    attention: AttentionIndex
    reads: Reads
    targets: Tensor
    by_response: Segments
    response_ids: Tensor
    lengths: Tensor
    scores: Tensor
    preferred: Tensor
    index: GroupIndex
    counted_groups: int
    split_slots: Tensor | None

    @property
    def num_responses(self) -> int:
        return self.response_ids.numel()

    @property
    def num_groups(self) -> int:
        return self.index.groups.count

    @property
    def used_tokens(self) -> int:
        """Held tokens that are not padding; they come first."""
        return sum(segment.queries.length for segment in self.segments)


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

    segments = cut_segments(blocks, held)
    count = len(groups) if counted_groups is None else counted_groups
    row = PackedRow(
        row_tokens=row_tokens,
        held=held,
        blocks=blocks,
        segments=segments,
        tokens=torch.from_numpy(tokens[mine]),
        position_ids=torch.from_numpy(positions[mine]),
        attention=AttentionIndex.of([*segments, *padding_segments(blocks, held)], row_tokens),
        reads=Reads.of(places[here], len(mine)),
        targets=concatenated(targets, torch.int32)[torch.from_numpy(here)],
        by_response=Segments.of(np.repeat(np.arange(len(counts)), counts)[here], len(counts)),
        response_ids=concatenated(response_ids, torch.int64),
        lengths=torch.tensor(counts, dtype=torch.int64),
        scores=concatenated([g.scores for g in groups], torch.float32),
        preferred=concatenated([g.preferred for g in groups], torch.bool),
        index=GroupIndex.of([len(g.response_ids) for g in groups]),
        counted_groups=count if rank == 0 else 0,
        split_slots=None if split_slots is None else torch.tensor(split_slots),
    )
    return to_device(row, device)


def concatenated(parts: Sequence[np.ndarray | Sequence], dtype: torch.dtype) -> Tensor:
    """The parts one after the other, on the CPU."""
    return torch.as_tensor(np.concatenate(parts) if parts else np.zeros(0)).to(dtype)


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
