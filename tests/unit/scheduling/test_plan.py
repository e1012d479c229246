"""Plans keep their invariants over random lengths, are the same for the same input, and are near the best there is."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpo_megatron.benchmarks.models import LLAMA3_8B
from mpo_megatron.benchmarks.plan import fill, imbalance, ultrafeedback_like
from mpo_megatron.errors import ConfigError
from mpo_megatron.scheduling.layout import GroupLengths
from mpo_megatron.scheduling.plan import (
    ROW_OVERHEAD_TOKENS,
    CostModel,
    Part,
    Pipeline,
    Row,
    StepPlan,
    check_plan,
    plan_step,
)

COST = CostModel(per_token=2e3, per_attention_pair=10.0, per_response_token=5e3)
PIPELINES = [Pipeline(), Pipeline(2), Pipeline(4), Pipeline(2, chunks=2), Pipeline(4, chunks=3)]


def group_lengths(longest_prompt: int, longest_response: int, most_responses: int = 12) -> st.SearchStrategy:
    return st.builds(
        GroupLengths,
        prompt=st.integers(1, longest_prompt),
        responses=st.lists(st.integers(1, longest_response), min_size=1, max_size=most_responses).map(tuple),
    )


@st.composite
def one_huge(draw: st.DrawFn) -> list[GroupLengths]:
    groups = draw(st.lists(group_lengths(5, 5), max_size=30))
    groups.insert(draw(st.integers(0, len(groups))), draw(group_lengths(50, 200)))
    return groups


steps = st.one_of(
    st.lists(group_lengths(60, 30), max_size=40),
    st.lists(group_lengths(60, 30), max_size=4),  # often fewer than ranks
    one_huge(),
    st.builds(lambda n, size: [GroupLengths(1, (1,) * n)] * size, st.integers(1, 12), st.integers(1, 40)),
    st.builds(lambda group, size: [group] * size, group_lengths(60, 30), st.integers(1, 40)),
)


@st.composite
def limits_of(draw: st.DrawFn, groups: Sequence[GroupLengths]) -> dict[str, Any]:
    """Settings under which `groups` can be planned: often a budget that splits some of them."""
    least = max((group.prompt + max(group.responses) for group in groups), default=1)
    return {
        "max_tokens": least + draw(st.sampled_from([0, 1, 10, 50, 300])),
        "data_parallel": draw(st.integers(1, 8)),
        "alignment": draw(st.sampled_from([1, 2, 8, 64])),
        "shared_prompt": draw(st.booleans()),
        "pipeline": draw(st.sampled_from(PIPELINES)),
    }


def first_fit_decreasing_rows(tokens: Sequence[int], max_tokens: int) -> int:
    room: list[int] = []
    for needed in sorted(tokens, reverse=True):
        for row, left in enumerate(room):
            if needed <= left:
                room[row] -= needed
                break
        else:
            room.append(max_tokens - needed)
    return len(room)


def parts_of(plan: StepPlan, group: int) -> list[tuple[int, ...]]:
    return sorted(
        part.responses for rank_rows in plan.rows for row in rank_rows for part in row if part.group == group
    )


def whole(*groups: int) -> Row:
    """A row of whole groups of two responses."""
    return tuple(Part(group, (0, 1)) for group in groups)


@settings(max_examples=300, deadline=None)
@given(steps, st.data())
def test_invariants(groups: list[GroupLengths], data: st.DataObject) -> None:
    limits = data.draw(limits_of(groups))
    plan = plan_step(groups, cost=COST, **limits)
    check_plan(plan, groups, **limits)
    assert plan == plan_step(list(groups), cost=COST, **limits)
    assert plan.longest_row < limits["max_tokens"] + limits["alignment"]
    if not plan.split:
        assert plan.first_pass == 0
    if not plan.split and limits["pipeline"].stages == 1:
        unit = limits["data_parallel"]
        tokens = [group.row_tokens(limits["shared_prompt"]) for group in groups]
        enough = first_fit_decreasing_rows(tokens, limits["max_tokens"])
        assert plan.rows_per_rank * limits["data_parallel"] <= max(unit, math.ceil(enough / unit) * unit)


@settings(max_examples=100, deadline=None)
@given(steps, st.data())
def test_rows_do_not_depend_on_the_alignment(groups: list[GroupLengths], data: st.DataObject) -> None:
    limits = data.draw(limits_of(groups))
    limits.pop("alignment")
    base = plan_step(groups, cost=COST, alignment=1, **limits)
    for alignment in (64, 128):
        plan = plan_step(groups, cost=COST, alignment=alignment, **limits)
        assert (plan.rows, plan.first_pass, plan.split) == (base.rows, base.first_pass, base.split)
        assert plan.row_lengths == tuple(
            tuple(max(alignment, math.ceil(length / alignment) * alignment) for length in of_rank)
            for of_rank in base.row_lengths
        )


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(1, 60), min_size=2, max_size=40), st.integers(0, 60))
@example(prompt=5, responses=[30] * 12, spare=25)
def test_a_split_group_has_few_parts_of_like_size(prompt: int, responses: list[int], spare: int) -> None:
    group = GroupLengths(prompt, tuple(responses))
    max_tokens = prompt + max(responses) + spare
    parts = parts_of(plan_step([group], max_tokens=max_tokens, data_parallel=2, cost=COST), 0)
    assert len(parts) <= first_fit_decreasing_rows(responses, max_tokens - prompt)
    loads = [sum(responses[k] for k in part) for part in parts]
    # Of two parts that differ by more than a response, the larger would have given it to the smaller.
    assert max(loads) - min(loads) <= max(responses)


# For `check_plan`: groups of 8, 8 and 4 tokens, and one of 20 before them, which has parts of 10 and 12 tokens.
GROUPS = [GroupLengths(4, (2, 2)), GroupLengths(4, (2, 2)), GroupLengths(2, (1, 1))]
SPLIT_GROUPS = [GroupLengths(2, (8, 5, 5)), *GROUPS]
LIMITS: dict[str, Any] = {"max_tokens": 16, "data_parallel": 2, "alignment": 4}
FIRST, REST = (Part(0, (0,)),), (Part(0, (1, 2)),)
WITH_SPLIT = StepPlan(((FIRST, whole(1)), (REST, whole(2, 3))), ((12, 8), (12, 12)), 1, (0,))


def test_check_plan_passes_what_is_right() -> None:
    rows = ((whole(0),), (whole(1, 2),))
    check_plan(StepPlan(rows, ((8,), (12,)), 0, ()), GROUPS, **LIMITS)
    check_plan(StepPlan(rows, ((12,), (12,)), 0, ()), GROUPS, pipeline=Pipeline(2), **LIMITS)
    check_plan(StepPlan((((),), ((),)), ((4,), (4,)), 0, ()), [], **LIMITS)
    check_plan(WITH_SPLIT, SPLIT_GROUPS, **LIMITS)


@pytest.mark.parametrize(
    ("rows", "row_lengths", "message"),
    [
        (((whole(0),), (whole(1),)), ((8,), (8,)), "missing or in two"),
        (((whole(0, 2),), (whole(1, 2),)), ((12,), (12,)), "missing or in two"),
        (((whole(0),), ((*whole(1, 2), Part(0, ())),)), ((8,), (12,)), "no response"),
        ((((Part(0, (1, 0)),),), (whole(1, 2),)), ((8,), (12,)), "not in ascending order"),
        (((whole(0, 1, 2),), ((),)), ((20,), (4,)), "20 tokens is above the budget of 16"),
        (((whole(0, 1, 2),),), ((20,),), "one list of rows per data-parallel rank"),
        (((whole(0), whole(2)), (whole(1),)), ((8, 4), (8,)), "different numbers of rows"),
        (((), ()), ((), ()), "ranks have no row"),
        (((whole(0),), (whole(1, 2),)), ((8,), (13,)), "the least that fit"),
        (((whole(0),), (whole(1, 2),)), ((8,), (16,)), "the least that fit"),
        (((whole(0),), (whole(1, 2),)), ((4,), (12,)), "the least that fit"),
        (((whole(0),), (whole(1, 2),)), ((12,), (12,)), "the least that fit"),
    ],
)
def test_check_plan_finds_each_broken_rule(
    rows: tuple[tuple[Row, ...], ...], row_lengths: tuple[tuple[int, ...], ...], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        check_plan(StepPlan(rows, row_lengths, 0, ()), GROUPS, **LIMITS)


def test_check_plan_finds_a_row_of_another_length_in_a_pipeline() -> None:
    plan = StepPlan(((whole(0),), (whole(1, 2),)), ((8,), (12,)), 0, ())
    with pytest.raises(AssertionError, match="the least that fit"):
        check_plan(plan, GROUPS, pipeline=Pipeline(2), **LIMITS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (((FIRST + whole(3), whole(1)), (REST, whole(2))), "beside a part"),
        (((FIRST, whole(1)), (whole(2, 3), REST)), "do not come first"),
        ((((), FIRST), (REST, whole(1, 2, 3))), "do not come first"),
        (((FIRST, REST), (whole(1), whole(2, 3))), "not spread evenly"),
    ],
)
def test_check_plan_finds_each_broken_rule_of_rows_with_parts(
    rows: tuple[tuple[Row, ...], ...], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        check_plan(dataclasses.replace(WITH_SPLIT, rows=rows), SPLIT_GROUPS, **LIMITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": ()}, "lie in more than one part"),
        ({"split": (0, 1)}, "lie in more than one part"),
        ({"first_pass": 0}, "first_pass is 0"),
        ({"first_pass": 2}, "first_pass is 2"),
    ],
)
def test_check_plan_finds_each_wrong_summary(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_plan(dataclasses.replace(WITH_SPLIT, **change), SPLIT_GROUPS, **LIMITS)


def test_check_plan_finds_a_split_group_that_fits_a_row() -> None:
    rows = (((Part(0, (0,)),), whole(1)), ((Part(0, (1,)),), whole(2)))
    with pytest.raises(AssertionError, match="fits a row is split"):
        check_plan(StepPlan(rows, ((8, 8), (8, 4)), 1, (0,)), GROUPS, **LIMITS)


def test_check_plan_finds_rows_that_are_no_multiple() -> None:
    interleaved = Pipeline(2, chunks=2)
    plan = StepPlan(((whole(0),), (whole(1, 2),)), ((12,), (12,)), 0, ())
    with pytest.raises(AssertionError, match="1 rows per rank are not a multiple of 2"):
        check_plan(plan, GROUPS, pipeline=interleaved, **LIMITS)
    with pytest.raises(AssertionError, match="first_pass is 1"):
        check_plan(WITH_SPLIT, SPLIT_GROUPS, pipeline=interleaved, **LIMITS)


@pytest.mark.parametrize("shared_prompt", [True, False])
def test_a_prompt_with_one_response_above_the_budget_is_named(shared_prompt: bool) -> None:
    groups = [GroupLengths(4, (1, 1)), GroupLengths(4, (2, 5, 3))]
    with pytest.raises(
        ConfigError,
        match=r"max_tokens_per_micro_batch=8 is less than the 9 tokens .*\(prompt 4 \+ response 5\).*at least 9",
    ):
        plan_step(groups, max_tokens=8, data_parallel=1, cost=COST, shared_prompt=shared_prompt)
    plan = plan_step(groups, max_tokens=9, data_parallel=1, cost=COST, shared_prompt=shared_prompt)
    assert plan.longest_row == 9


def test_a_group_above_the_budget_is_cut_into_as_few_even_parts_as_do() -> None:
    # Two parts hold 28 response tokens at most, three 42: they take 10 each, and not 14, 14 and 2.
    group = GroupLengths(6, (6, 6, 4, 4, 4, 4, 2))
    plan = plan_step([group], max_tokens=20, data_parallel=1, cost=COST)
    parts = parts_of(plan, 0)
    assert [sum(group.responses[k] for k in part) for part in parts] == [10, 10, 10]
    assert (plan.split, plan.first_pass, plan.row_lengths) == ((0,), 3, ((16, 16, 16),))
    # A repeated prompt leaves less room: each response takes 6 more.
    parts = parts_of(plan_step([group], max_tokens=24, data_parallel=1, cost=COST, shared_prompt=False), 0)
    assert sorted(len(part) for part in parts) == [1, 2, 2, 2]


def test_parts_are_spread_evenly_over_ranks() -> None:
    groups = [GroupLengths(2, (6,) * 10), *[GroupLengths(2, (2, 2))] * 6]
    plan = plan_step(groups, max_tokens=8, data_parallel=4, cost=COST)
    assert plan.split == (0,)
    in_split = [sum(any(part.group == 0 for part in row) for row in rank_rows) for rank_rows in plan.rows]
    assert in_split == [3, 3, 2, 2]
    assert plan.first_pass == 3
    plan = plan_step(groups, max_tokens=8, data_parallel=4, cost=COST, pipeline=Pipeline(2, chunks=2))
    assert (plan.first_pass, plan.rows_per_rank) == (4, 4)


def test_rows_are_balanced_by_cost_not_by_tokens() -> None:
    # All groups have 30 tokens, but two cost ten times what the others do: every rank gets one of either.
    cost = CostModel(per_token=0.0, per_attention_pair=0.0, per_response_token=1.0)
    dear, cheap = GroupLengths(1, (29,)), GroupLengths(27, (3,))
    for groups in ([dear, dear, cheap, cheap], [dear, cheap, dear, cheap], [cheap, cheap, dear, dear]):
        for max_tokens in (30, 60):  # one group a row, or two
            plan = plan_step(groups, max_tokens=max_tokens, data_parallel=2, cost=cost)
            assert imbalance(plan, groups, cost) == 1


def test_whole_rows_change_ranks_where_their_groups_cannot() -> None:
    # Rows of one long group beside rows of several short ones: no long group fits in the place of a short one.
    generator = np.random.default_rng(0)
    cost = CostModel(per_token=1.0, per_attention_pair=0.01, per_response_token=1.0)
    imbalances = []
    for _ in range(20):
        long = zip(generator.integers(2000, 6000, 15), generator.integers(500, 1000, (15, 2)), strict=True)
        short = zip(generator.integers(20, 600, 20), generator.integers(100, 800, (20, 2)), strict=True)
        groups = [GroupLengths(int(p), tuple(r.tolist())) for p, r in [*long, *short]]
        plan = plan_step(groups, max_tokens=8192, data_parallel=4, cost=cost)
        imbalances.append(imbalance(plan, groups, cost))
    assert np.mean(imbalances) <= 1.002


def test_rows_may_be_fewer_than_first_fit_decreasing_needs() -> None:
    groups = [GroupLengths(1, (tokens - 1,)) for tokens in (4, 4, 3, 3, 3, 3)]
    assert first_fit_decreasing_rows([4, 4, 3, 3, 3, 3], 10) == 3
    assert plan_step(groups, max_tokens=10, data_parallel=1, cost=COST).rows_per_rank == 2


def test_fewer_groups_than_ranks_leaves_empty_rows() -> None:
    plan = plan_step([GroupLengths(3, (2, 2))], max_tokens=64, data_parallel=4, cost=COST)
    assert sorted(len(row) for rows in plan.rows for row in rows) == [0, 0, 0, 1]
    assert sorted(length for lengths in plan.row_lengths for length in lengths) == [1, 1, 1, 7]


EIGHT = [
    GroupLengths(prompt, responses)
    for prompt, responses in (
        (104, (110, 98, 121, 104)), (98, (112, 117, 95, 103)), (111, (108, 90, 127, 114)), (103, (99, 115, 109, 118)),
        (107, (120, 101, 113, 97)), (99, (106, 124, 93, 111)), (109, (94, 119, 105, 122)), (101, (116, 107, 112, 96)),
    )
]  # fmt: skip


def filled(groups: Sequence[GroupLengths], **limits: Any) -> tuple[int, float]:
    """(rows per rank, fill) of a step's plan."""
    plan = plan_step(groups, cost=LLAMA3_8B.cost_model, **limits)
    return plan.rows_per_rank, fill(plan, groups)


def test_rows_are_as_long_as_what_they_hold_without_a_pipeline() -> None:
    for data_parallel in (1, 2, 4):
        _, share = filled(EIGHT, max_tokens=1024, data_parallel=data_parallel, alignment=8)
        assert share >= 0.97


def test_a_pipeline_gets_the_number_of_rows_that_takes_least_time() -> None:
    # One row a group leaves little padding; as few rows as can be would be twice as long, and the pipeline would wait.
    assert filled(EIGHT, max_tokens=1024, data_parallel=1, alignment=8, pipeline=Pipeline(2))[0] == 8
    assert filled(EIGHT, max_tokens=1024, data_parallel=1, alignment=8, pipeline=Pipeline(2))[1] >= 0.92
    # Up to four groups fit a row. None is padding, so it is the wait that asks for more rows, up to a point.
    like = [GroupLengths(50, (50, 50, 50, 50))] * 16
    for pipeline, rows in (
        (Pipeline(), 4),
        (Pipeline(2), 8),
        (Pipeline(4), 16),
        (Pipeline(4, chunks=4), 8),
    ):
        assert filled(like, max_tokens=1000, data_parallel=1, pipeline=pipeline) == (rows, 1.0)


@pytest.mark.parametrize("pipeline", [Pipeline(2), Pipeline(4), Pipeline(4, chunks=2)])
def test_no_other_number_of_rows_takes_less_time(pipeline: Pipeline) -> None:
    # But for how evenly the same number of rows happens to be filled.
    groups = ultrafeedback_like(64, seed=3)
    used = sum(group.row_tokens(True) for group in groups)

    def time(plan: StepPlan) -> float:
        beside = (
            sum(LLAMA3_8B.cost_model.of(group, True) for group in groups)
            - LLAMA3_8B.cost_model.per_token * used
        )
        row = LLAMA3_8B.cost_model.per_token * (plan.longest_row + ROW_OVERHEAD_TOKENS) + beside / (
            2 * plan.rows_per_rank
        )
        return (plan.rows_per_rank + pipeline.idle_rows) * row

    limits: dict[str, Any] = {"data_parallel": 2, "cost": LLAMA3_8B.cost_model, "pipeline": pipeline}
    least = max(group.row_tokens(True) for group in groups)
    chosen = plan_step(groups, max_tokens=8192, **limits)
    others = [plan_step(groups, max_tokens=budget, **limits) for budget in range(least, 8192, 64)]
    assert time(chosen) <= 1.03 * min(time(plan) for plan in others)


def test_rows_are_full_and_ranks_balanced_on_lengths_like_those_of_a_real_data_set() -> None:
    groups = ultrafeedback_like(4 * 128, seed=1)
    cost = LLAMA3_8B.cost_model
    fills, imbalances = [], []
    for start in range(0, len(groups), 128):
        step = groups[start : start + 128]
        plan = plan_step(step, max_tokens=8192, data_parallel=8, cost=cost, alignment=64)
        fills.append(fill(plan, step))
        imbalances.append(imbalance(plan, step, cost))
    assert np.mean(fills) >= 0.95
    assert np.mean(imbalances) <= 1.03
