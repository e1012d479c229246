"""A row's tensors, worked out by hand and by invariants over random groups."""

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_megatron.data import TokenizedGroup
from mpo_megatron.ragged.transfer import gathered, scattered
from mpo_megatron.scheduling.layout import (
    GroupLengths,
    Segment,
    Span,
    context_spans,
    cut_segments,
    lay_out,
)
from mpo_megatron.scheduling.pack import pack_row
from tests.helpers.models import make_groups


def group() -> TokenizedGroup:
    return TokenizedGroup(
        "a",
        np.array([10, 11, 12]),
        [np.array([20, 21]), np.array([30])],
        np.array([1.0, 0.0]),
        np.array([True, False]),
    )


def test_shared_row_by_hand() -> None:
    row = pack_row([group()], [[7, 8]], row_tokens=8, shared_prompt=True)
    assert row.tokens.tolist() == [10, 11, 12, 20, 21, 30, 0, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 0]
    # The prompt's last token (place 2) predicts the first token of both responses.
    assert row.reads.places.tolist() == [2, 3, 2]
    assert row.targets.tolist() == [20, 21, 30]
    assert row.by_response.segment.tolist() == [0, 0, 1]
    assert row.response_ids.tolist() == [7, 8]
    assert row.lengths.tolist() == [2, 1]
    assert row.preferred.tolist() == [True, False]
    assert (row.num_groups, row.num_responses, row.used_tokens) == (1, 2, 6)


def test_what_reads_what_by_hand() -> None:
    """Places 2, 3, 2 predict the targets: place 2 two of them."""
    reads = pack_row([group()], [[7, 8]], row_tokens=8, shared_prompt=True).reads
    assert reads.unread.tolist() == [True, True, False, False, True, True, True, True]
    assert (reads.reading[2].item() in (0, 2), reads.reading[3].item()) == (True, 1)
    assert (reads.several.tolist(), reads.shared_places.tolist()) == ([0, 2], [2])
    assert reads.by_place.segment.tolist() == [0, 0]
    # Without sharing each place predicts at most one.
    reads = pack_row([group()], [[7, 8]], row_tokens=9, shared_prompt=False).reads
    assert (reads.several.numel(), reads.by_place.count, reads.shared_places.numel()) == (0, 0, 0)
    assert reads.reading[reads.places].tolist() == [0, 1, 2]


def test_attention_index_by_hand() -> None:
    attention = pack_row([group()], [[7, 8]], row_tokens=8, shared_prompt=True).attention
    assert attention.keys.places.tolist() == [0, 1, 2, *(0, 1, 2, 3, 4), *(0, 1, 2, 5), 6, 7]
    assert attention.cu_queries.tolist() == [0, 3, 5, 6, 8]
    assert attention.cu_keys.tolist() == [0, 3, 8, 12, 14]
    assert attention.longest == (3, 5)


def test_a_row_goes_to_a_device_as_one_buffer() -> None:
    """Whatever the kind of row."""
    rows = [
        pack_row([group()], [[7, 8]], row_tokens=8, shared_prompt=True, split_slots=[0, 1]),
        pack_row([group()], [[7, 8]], row_tokens=8, shared_prompt=True, context=(2, 1)),
        pack_row([], [], row_tokens=4, shared_prompt=True),
    ]
    for row in rows:
        arrived = scattered(gathered(row, pin_memory=False), row)
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors_of(arrived)}) == 1
        for ours, theirs in zip(tensors_of(arrived), tensors_of(row), strict=True):
            assert torch.equal(ours, theirs)
    assert len(tensors_of(rows[0])) > 20


def tensors_of(record: Any) -> list[torch.Tensor]:
    found = []
    for field in fields(record):
        value = getattr(record, field.name)
        found += (
            [value] if isinstance(value, torch.Tensor) else tensors_of(value) if is_dataclass(value) else []
        )
    return found


def test_repeated_row_by_hand() -> None:
    row = pack_row([group()], [[7, 8]], row_tokens=9, shared_prompt=False)
    assert row.tokens.tolist() == [10, 11, 12, 20, 21, 10, 11, 12, 30]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert row.reads.places.tolist() == [2, 3, 7]
    assert row.index.groups.segment.tolist() == [0, 0]


def test_row_of_padding() -> None:
    row = pack_row([], [], row_tokens=4, shared_prompt=True)
    assert row.tokens.tolist() == [0] * 4
    assert (row.num_groups, row.num_responses, row.used_tokens, row.targets.numel()) == (0, 0, 0, 0)


def test_context_parallel_row_by_hand() -> None:
    """Rank 0 of 2 holds the first and last quarter of the row, rank 1 the middle; each predicts from what it holds."""
    rows = [
        pack_row([group()], [[7, 8]], row_tokens=8, shared_prompt=True, context=(2, rank)) for rank in (0, 1)
    ]
    assert [row.tokens.tolist() for row in rows] == [[10, 11, 0, 0], [12, 20, 21, 30]]
    assert [row.position_ids.tolist() for row in rows] == [[0, 1, 0, 0], [2, 3, 4, 3]]
    assert [row.used_tokens for row in rows] == [2, 4]
    assert [row.reads.places.tolist() for row in rows] == [[], [0, 1, 0]]
    assert [row.targets.tolist() for row in rows] == [[], [20, 21, 30]]
    assert [row.by_response.segment.tolist() for row in rows] == [[], [0, 0, 1]]
    for row in rows:  # what the loss needs is on both
        assert (row.num_responses, row.lengths.tolist(), row.response_ids.tolist()) == (2, [2, 1], [7, 8])
    assert [row.counted_groups for row in rows] == [1, 0]


def test_part_of_a_split_group_by_hand() -> None:
    part = group().select([1])
    row = pack_row([part], [[8]], row_tokens=8, shared_prompt=True, split_slots=[5], counted_groups=0)
    assert row.tokens.tolist() == [10, 11, 12, 30, 0, 0, 0, 0]
    assert row.scores.tolist() == [0.0]
    assert row.split_slots is not None
    assert (row.split_slots.tolist(), row.counted_groups) == ([5], 0)


def test_segments_by_hand() -> None:
    """A row of prompt 0-2, responses 3-4 and 5-8, cut after tokens 3 and 7 between two ranks' spans."""
    blocks = lay_out([GroupLengths(3, (2, 4))], shared_prompt=True)
    prompt = Span(0, 3)
    assert cut_segments(blocks, [Span(0, 12)]) == (
        Segment(Span(0, 3), (prompt,)),
        Segment(Span(3, 2), (prompt, Span(3, 2))),
        Segment(Span(5, 4), (prompt, Span(5, 4))),
    )
    assert cut_segments(blocks, [Span(4, 4)]) == (
        Segment(Span(0, 1), (prompt, Span(3, 2))),
        Segment(Span(1, 3), (prompt, Span(5, 3))),
    )
    assert cut_segments(blocks, [Span(2, 2), Span(8, 4)]) == (
        Segment(Span(0, 1), (prompt,)),
        Segment(Span(1, 1), (prompt, Span(3, 1))),
        Segment(Span(2, 1), (prompt, Span(5, 4))),
    )


@given(st.integers(1, 8), st.integers(1, 20))
def test_context_spans_share_a_row_out(size: int, chunk: int) -> None:
    row_tokens = 2 * size * chunk
    spans = [context_spans(row_tokens, size, rank) for rank in range(size)]
    held = [t for of_rank in spans for span in of_rank for t in range(span.start, span.stop)]
    assert sorted(held) == list(range(row_tokens))
    # Causal attention over the whole row as one sequence costs every rank the same.
    costs = {sum(t for span in of_rank for t in range(span.start, span.stop)) for of_rank in spans}
    assert len(costs) == 1


def test_layout_by_hand() -> None:
    blocks = lay_out([GroupLengths(3, (2, 1)), GroupLengths(1, (4,))], shared_prompt=True)
    assert [(b.prompt, b.responses) for b in blocks] == [
        (Span(0, 3), (Span(3, 2), Span(5, 1))),
        (Span(6, 1), (Span(7, 4),)),
    ]
    lengths = GroupLengths(3, (2, 1))
    assert (lengths.row_tokens(True), lengths.row_tokens(False)) == (6, 9)
    assert lengths.attention_pairs(True) == 6 + (6 + 3) + (3 + 1)
    assert lengths.attention_pairs(False) == 2 * 6 + (6 + 3) + (3 + 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 6), min_size=1, max_size=5), st.booleans(), st.integers(0, 2**16))
def test_every_target_follows_its_own_prefix(sizes: list[int], shared_prompt: bool, seed: int) -> None:
    """Walking back from a target through its response and prompt gives the group's own tokens, at its own positions."""
    groups = make_groups(sizes, 50, seed=seed)
    ids = [part.tolist() for part in np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])]
    row = pack_row(groups, ids, row_tokens=1000, shared_prompt=shared_prompt)
    responses = [(g, r) for g in groups for r in g.response_ids]
    for number, (one, response) in enumerate(responses):
        mine = row.by_response.segment == number
        assert torch.equal(row.targets[mine], torch.as_tensor(response))
        assert row.by_response.offsets.diff()[number] == len(response)
        first, *rest = row.reads.places[mine].tolist()
        prompt = slice(first - len(one.prompt_ids) + 1, first + 1)
        assert row.tokens[prompt].tolist() == one.prompt_ids.tolist()
        assert row.position_ids[prompt].tolist() == list(range(len(one.prompt_ids)))
        assert row.tokens[rest].tolist() == response[:-1].tolist()
        assert row.position_ids[rest].tolist() == list(
            range(len(one.prompt_ids), len(one.prompt_ids) + len(rest))
        )
    assert row.index.groups.segment.tolist() == np.repeat(np.arange(len(sizes)), sizes).tolist()
