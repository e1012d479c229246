"""From groups to a rank's rows: parts, what the objective needs of split groups, and counts over all ranks."""

from typing import Any

import pytest

from mpo_megatron.data import GroupList
from mpo_megatron.errors import ConfigError
from mpo_megatron.scheduling.plan import CostModel, Pipeline
from mpo_megatron.scheduling.rows import RowSource, StepRows
from tests.helpers.models import make_groups

SIZES = [3, 9, 2, 6, 4]
COST = CostModel(1e3, 1.0, 1e2)


def steps(max_tokens: int, data_parallel: int, context: int = 1, **more: Any) -> list[list[StepRows]]:
    """The step of all groups, backwards, by data-parallel and context-parallel rank."""
    groups = GroupList(make_groups(SIZES, 50))
    return [
        [
            RowSource(
                groups, max_tokens=max_tokens, alignment=8 * context, cost=COST,
                data_parallel=(data_parallel, d), context=(context, c), **more,
            ).step(range(len(SIZES))[::-1])
            for c in range(context)
        ]
        for d in range(data_parallel)
    ]  # fmt: skip


@pytest.mark.parametrize("max_tokens", [64, 100, 1000])
@pytest.mark.parametrize(("data_parallel", "context"), [(1, 1), (3, 1), (2, 2)])
def test_every_response_and_count_is_there_once(max_tokens: int, data_parallel: int, context: int) -> None:
    of_ranks = steps(max_tokens, data_parallel, context)
    for c in range(context):
        found = [i for ranks in of_ranks for row in ranks[c].rows for i in row.response_ids.tolist()]
        assert sorted(found) == list(range(sum(SIZES)))
    counted = sum(row.counted_groups for ranks in of_ranks for step in ranks for row in step.rows)
    assert counted == len(SIZES)
    predicted = sum(row.targets.numel() for ranks in of_ranks for step in ranks for row in step.rows)
    assert predicted == sum(len(r) for g in make_groups(SIZES, 50) for r in g.response_ids)
    assert len({(len(s.rows), s.longest_row, s.first_pass) for ranks in of_ranks for s in ranks}) == 1
    (fill,) = {step.fill for ranks in of_ranks for step in ranks}
    padded = sum(row.row_tokens for ranks in of_ranks for row in ranks[0].rows)
    used = sum(row.used_tokens for ranks in of_ranks for step in ranks for row in step.rows)
    assert fill == used / padded
    assert (of_ranks[0][0].first_pass > 0) == (of_ranks[0][0].split is not None) == (max_tokens < 1000)


def test_slots_lead_from_parts_to_the_split_groups() -> None:
    groups = make_groups(SIZES, 50)
    numbers = [(g, k) for g, size in enumerate(SIZES) for k in range(size)]  # by the responses' numbers
    of_ranks = [step for (step,) in steps(48, 2)]
    split = of_ranks[0].split
    assert split is not None
    assert split.num_groups >= 1
    group = split.index.groups.segment.tolist()
    assert group == sorted(group)
    seen = []
    for step in of_ranks:
        assert step.split is not None
        assert step.split.response_ids.tolist() == split.response_ids.tolist()
        for row in step.rows:
            if row.split_slots is not None:
                seen += row.split_slots.tolist()
                assert split.response_ids[row.split_slots].tolist() == row.response_ids.tolist()
                assert split.lengths[row.split_slots].tolist() == row.lengths.tolist()
    assert sorted(seen) == list(range(split.response_ids.numel()))
    for number, score, preferred in zip(
        split.response_ids.tolist(), split.scores.tolist(), split.preferred.tolist(), strict=True
    ):
        group, k = numbers[number]
        assert score == pytest.approx(groups[group].scores[k])
        assert preferred == groups[group].preferred[k]


@pytest.mark.parametrize("max_tokens", [64, 1000])
def test_for_the_global_batch_all_rows_run_twice(max_tokens: int) -> None:
    of_ranks = [step for (step,) in steps(max_tokens, 2, global_batch=True)]
    seen = []
    for step, plain in zip(of_ranks, [step for (step,) in steps(max_tokens, 2)], strict=True):
        assert step.first_pass == len(step.rows) == len(plain.rows)
        assert step.split_groups == plain.split_groups
        assert step.split is not None
        assert step.split.num_groups == len(SIZES)
        for row in step.rows:
            assert (row.split_slots is None) == (row.num_responses == 0)
            if row.split_slots is not None:
                seen += row.split_slots.tolist()
                assert step.split.response_ids[row.split_slots].tolist() == row.response_ids.tolist()
    assert sorted(seen) == list(range(sum(SIZES)))
    tokens = [len(g.prompt_ids) + sum(map(len, g.response_ids)) for g in make_groups(SIZES, 50)]
    assert of_ranks[0].split_groups == sum(count > max_tokens for count in tokens)


def test_the_groups_that_are_split_are_counted() -> None:
    groups = GroupList(make_groups(SIZES, 50))
    for shared_prompt in (True, False):
        for max_tokens in (48, 64, 100, 150, 1000):
            source = RowSource(
                groups, max_tokens=max_tokens, alignment=8, cost=COST, shared_prompt=shared_prompt
            )
            assert source.count_split() == len(source.plan(range(len(SIZES))).split)


def test_iterators_are_independent() -> None:
    ((step,),) = steps(1000, 1, pipeline=Pipeline(stages=4, chunks=2))
    first, second = step.iterators(2)
    assert list(first) == step.rows == list(second)
    assert len(step.rows) == 4
    assert list(step.iterators(1, 2)[0]) == step.rows[:2]


def test_a_response_that_fits_no_row_is_an_error() -> None:
    with pytest.raises(ConfigError, match="max_tokens_per_micro_batch=16 is less than"):
        steps(16, 1)
