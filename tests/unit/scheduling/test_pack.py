"""A row's tensors, worked out by hand and by invariants over random groups."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_megatron.data import TokenizedGroup
from mpo_megatron.scheduling.layout import GroupLengths, Span, lay_out
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
    assert row.predict_from.tolist() == [2, 3, 2]
    assert row.targets.tolist() == [20, 21, 30]
    assert row.target_response.tolist() == [0, 0, 1]
    assert row.response_ids.tolist() == [7, 8]
    assert row.lengths.tolist() == [2, 1]
    assert row.preferred.tolist() == [True, False]
    assert (row.num_groups, row.num_responses, row.used_tokens) == (1, 2, 6)


def test_repeated_row_by_hand() -> None:
    row = pack_row([group()], [[7, 8]], row_tokens=9, shared_prompt=False)
    assert row.tokens.tolist() == [10, 11, 12, 20, 21, 10, 11, 12, 30]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert row.predict_from.tolist() == [2, 3, 7]
    assert row.group_index.tolist() == [0, 0]


def test_row_of_padding() -> None:
    row = pack_row([], [], row_tokens=4, shared_prompt=True)
    assert row.tokens.tolist() == [0] * 4
    assert (row.num_groups, row.num_responses, row.used_tokens, row.targets.numel()) == (0, 0, 0, 0)


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
        mine = row.target_response == number
        assert torch.equal(row.targets[mine], torch.as_tensor(response))
        first, *rest = row.predict_from[mine].tolist()
        prompt = slice(first - len(one.prompt_ids) + 1, first + 1)
        assert row.tokens[prompt].tolist() == one.prompt_ids.tolist()
        assert row.position_ids[prompt].tolist() == list(range(len(one.prompt_ids)))
        assert row.tokens[rest].tolist() == response[:-1].tolist()
        assert row.position_ids[rest].tolist() == list(
            range(len(one.prompt_ids), len(one.prompt_ids) + len(rest))
        )
    assert row.group_index.tolist() == np.repeat(np.arange(len(sizes)), sizes).tolist()
