"""Rows as numbers, against the rows that are packed."""

import pytest

from mpo_megatron.errors import ConfigError
from mpo_megatron.planning.profile import RowShape, even_groups, plan_rows
from mpo_megatron.planning.run import Recompute, Run
from mpo_megatron.scheduling.layout import GroupLengths
from mpo_megatron.scheduling.pack import pack_row
from mpo_megatron.scheduling.plan import CostModel
from tests.helpers.models import make_groups

COST = CostModel(1e3, 1.0, 1e2)


@pytest.mark.parametrize("shared_prompt", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_shape_is_that_of_the_packed_row(size: int, shared_prompt: bool) -> None:
    groups = make_groups([3, 1, 5], 97)
    lengths = [GroupLengths(len(g.prompt_ids), tuple(map(len, g.response_ids))) for g in groups]
    tokens = sum(group.row_tokens(shared_prompt) for group in lengths)
    tokens = -(-tokens // (2 * size)) * 2 * size
    pairs = 0
    for rank in range(size):
        row = pack_row(
            groups, [range(3), range(1), range(5)], row_tokens=tokens, shared_prompt=shared_prompt,
            context=(size, rank),
        )  # fmt: skip
        shape = RowShape.of(lengths, tokens, shared_prompt, (size, rank))
        assert shape.tokens == row.tokens.numel() == tokens // size
        assert shape.used == row.used_tokens
        assert shape.predicted == row.targets.numel()
        assert shape.responses == row.num_responses
        # The kernels' index has those of the padding, too.
        assert shape.keys + shape.tokens - shape.used == row.attention.keys.places.numel()
        pairs += shape.pairs
    assert pairs == sum(group.attention_pairs(shared_prompt) for group in lengths)


def test_a_step_has_the_rows_of_its_plan() -> None:
    groups = even_groups(prompt=100, responses=[50, 70], n=4, batch=6)
    run = Run(dp=2, token_multiple=8, max_tokens=700)
    shape = plan_rows(groups, run, COST)
    assert len(shape.rows) == 2
    assert sum(row.responses for rank in shape.rows for context in rank for row in context) == 24
    assert shape.largest.row_tokens == max(row.row_tokens for rank in shape.rows for (row,) in rank)
    assert shape.first_pass == 0
    assert plan_rows(groups, Run(max_tokens=200), COST).first_pass > 0


def test_lengths_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="n=0 must be 1 or more"):
        even_groups(10, [5], 0, 1)


@pytest.mark.parametrize(
    ("recompute", "layers", "expected"),
    [
        (Recompute(), 8, (0, 0)),
        (Recompute("selective"), 8, (0, 0)),
        (Recompute("full", "uniform", 1), 8, (8, 8)),
        (Recompute("full", "uniform", 3), 8, (8, 3)),
        (Recompute("full", "block", 3), 8, (3, 3)),
        (Recompute("full", "block", 30), 8, (8, 8)),
    ],
)
def test_recomputed_layers(recompute: Recompute, layers: int, expected: tuple[int, int]) -> None:
    assert (recompute.layers(layers), recompute.checkpoints(layers)) == expected
