"""Plans keep their invariants over random lengths, and the same input makes the same plan."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_megatron.errors import ConfigError
from mpo_megatron.scheduling.layout import GroupLengths
from mpo_megatron.scheduling.plan import (
    CostModel,
    StepPlan,
    check_plan,
    in_order,
    plan_step,
    step_groups,
    steps_per_epoch,
)

COST = CostModel(per_token=2e3, per_attention_pair=10.0, per_response_token=5e3)
lengths = st.builds(
    GroupLengths,
    prompt=st.integers(1, 60),
    responses=st.lists(st.integers(1, 30), min_size=2, max_size=9).map(tuple),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(lengths, max_size=40), st.integers(1, 8), st.sampled_from([1, 2, 8]), st.booleans())
def test_invariants(
    groups: list[GroupLengths], data_parallel: int, alignment: int, shared_prompt: bool
) -> None:
    largest = max((g.row_tokens(shared_prompt) for g in groups), default=1)
    limits: dict[str, Any] = {
        "max_tokens": -(-largest // alignment) * alignment + alignment * 5,
        "data_parallel": data_parallel,
        "alignment": alignment,
        "shared_prompt": shared_prompt,
    }
    plan = plan_step(groups, cost=COST, **limits)
    check_plan(plan, groups, **limits)
    assert plan == plan_step(list(groups), cost=COST, **limits)


def test_check_plan_finds_each_broken_rule() -> None:
    groups = [GroupLengths(4, (2, 2)), GroupLengths(4, (2, 2)), GroupLengths(2, (1, 1))]
    limits: dict[str, Any] = {"max_tokens": 16, "data_parallel": 2, "alignment": 4}
    check_plan(StepPlan((((0,),), ((1, 2),)), 12), groups, **limits)
    for rows, row_tokens, message in (
        ((((0,),), ((1,),)), 8, "missing"),
        ((((0, 2),), ((1, 2),)), 12, "missing or in two"),
        ((((0, 1, 2),), ((),)), 20, "above the budget"),
        ((((0,), (2,)), ((1,),)), 8, "different numbers"),
        ((((0,),), ((1, 2),)), 13, "multiple of the alignment"),
        ((((0,),), ((1, 2),)), 16, "least that fits"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_plan(StepPlan(rows, row_tokens), groups, **limits)


def test_a_group_above_the_budget_is_named() -> None:
    with pytest.raises(
        ConfigError,
        match=r"max_tokens_per_micro_batch=8 is less than the 9 tokens .*prompt 4 \+ responses \(2, 3\)",
    ):
        plan_step([GroupLengths(4, (2, 3))], max_tokens=8, data_parallel=1, cost=COST)


def test_rows_are_balanced_by_cost_not_by_tokens() -> None:
    # One long prompt costs little head and much attention; the planner must look at cost to pair groups evenly.
    cost = CostModel(per_token=0.0, per_attention_pair=0.0, per_response_token=1.0)
    groups = [
        GroupLengths(90, (5, 5)),
        GroupLengths(2, (5, 5)),
        GroupLengths(2, (5, 5)),
        GroupLengths(90, (5, 5)),
    ]
    plan = plan_step(groups, max_tokens=200, data_parallel=2, cost=cost)
    assert [sum(sum(groups[i].responses) for row in rows for i in row) for rows in plan.rows] == [20, 20]


def test_fewer_groups_than_ranks_leaves_empty_rows() -> None:
    plan = plan_step([GroupLengths(3, (2, 2))], max_tokens=64, data_parallel=4, cost=COST)
    assert sorted(len(row) for rows in plan.rows for row in rows) == [0, 0, 0, 1]
    assert plan.row_tokens == 7


def test_an_epoch_visits_every_group_once_in_an_order_of_its_own() -> None:
    per_epoch = steps_per_epoch(21, 8)
    assert per_epoch == 3
    epochs = [np.concatenate([step_groups(e * 3 + s, 21, 8, seed=5) for s in range(3)]) for e in range(2)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert list(epochs[0]) != list(epochs[1])
    assert [len(step_groups(s, 21, 8, seed=5)) for s in range(3)] == [8, 8, 5]
    assert list(step_groups(4, 21, 8, seed=5)) == list(step_groups(4, 21, 8, seed=5))
    assert list(step_groups(0, 21, 8, seed=5)) != list(step_groups(0, 21, 8, seed=6))


def test_validation_goes_front_to_back() -> None:
    assert [list(part) for part in in_order(5, 2)] == [[0, 1], [2, 3], [4]]
