"""What a thread makes ahead of its use: in order, within bounds, beside the caller's work, and gone at the end."""

import threading
from contextlib import closing
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from mpo_megatron.data import GroupList, TokenizedGroup
from mpo_megatron.scheduling.ahead import THREAD, made_ahead
from mpo_megatron.scheduling.plan import CostModel
from mpo_megatron.scheduling.rows import RowSource
from tests.helpers.models import make_groups

# Long enough to be sure that it does not come, where a test waits for what must come.
LIMIT = 30.0
STEPS = [[0, 1], [2], [3, 4], [1, 3]]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD)]


def source(groups: GroupList, prefetch: int, replicas: tuple[int, int] = (1, 0)) -> RowSource:
    cost = CostModel(1e3, 1.0, 1e2)
    return RowSource(groups, max_tokens=64, alignment=8, cost=cost, data_parallel=replicas, prefetch=prefetch)


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
def test_results_come_in_order_and_the_thread_ends(ahead: int) -> None:
    assert list(made_ahead(str, range(5), ahead)) == ["0", "1", "2", "3", "4"]
    assert list(made_ahead(str, [], ahead)) == []
    assert threads() == []


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_is_made_than_asked_for(ahead: int) -> None:
    made: list[int] = []
    reached = threading.Condition()

    def make(item: int) -> int:
        with reached:
            made.append(item)
            reached.notify_all()
        return item

    with closing(made_ahead(make, range(10), ahead)) as results:
        for item in results:
            wanted = min(10, item + 1 + ahead)
            with reached:
                assert reached.wait_for(lambda n=wanted: len(made) >= n, LIMIT)  # type: ignore[misc]
            assert len(made) == wanted


def test_nothing_runs_in_a_thread_where_it_is_off() -> None:
    assert set(made_ahead(lambda item: threading.current_thread(), range(3), 0)) == {threading.main_thread()}


def test_an_error_is_raised_in_the_step_that_it_belongs_to() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise OSError("the disk is gone")
        return item

    results = made_ahead(make, range(5), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)
    assert threads() == []


def test_an_error_of_the_caller_ends_the_thread_and_what_is_not_begun() -> None:
    made: list[int] = []
    begun, may_end = threading.Event(), threading.Event()

    def make(item: int) -> int:
        made.append(item)
        if item == 1:
            begun.set()
            assert may_end.wait(LIMIT)
        return item

    def use() -> None:
        with closing(made_ahead(make, range(9), 3)) as results:
            next(results)
            assert begun.wait(LIMIT)
            may_end.set()
            raise RuntimeError("the step failed")

    with pytest.raises(RuntimeError, match="the step failed"):
        use()
    assert threads() == []
    assert len(made) < 9


class SlowGroups(GroupList):
    """Reading the groups of step N + 1 begins only while step N is in progress, which the test says."""

    def __init__(self, groups: list[TokenizedGroup], steps: list[list[int]]) -> None:
        super().__init__(groups)
        self._step_of = {group: number for number, step in enumerate(steps) for group in step}
        self._left = [len(step) for step in steps]
        self.may_read = [threading.Event() for _ in steps]
        self.was_read = [threading.Event() for _ in steps]

    def group(self, index: int) -> TokenizedGroup:
        number = self._step_of[index]
        assert self.may_read[number].wait(LIMIT)
        self._left[number] -= 1
        if not self._left[number]:
            self.was_read[number].set()
        return super().group(index)


def test_a_slow_reader_is_hidden_behind_the_step_before() -> None:
    """Were a step's groups read in the step itself, step N would wait here in vain for those of step N + 1."""
    steps = [[0, 1], [2], [3, 4], [5]]
    groups = SlowGroups(make_groups([3, 2, 4, 2, 3, 2], 50), steps)
    groups.may_read[0].set()
    seen = []
    with source(groups, prefetch=1).steps(steps) as made:
        for number, rows in enumerate(made):  # the body is the step
            seen.append(rows.groups)
            if number + 1 < len(steps):
                assert not groups.was_read[number + 1].is_set()
                groups.may_read[number + 1].set()
                assert groups.was_read[number + 1].wait(LIMIT)
    assert seen == [2, 1, 2, 1]


def test_rows_made_ahead_are_those_made_in_the_step() -> None:
    groups = GroupList(make_groups([3, 9, 2, 6, 4], 50))

    def bits(prefetch: int) -> list[Any]:
        found = []
        with source(groups, prefetch, (2, 1)).steps(STEPS) as steps:
            for step in steps:
                found.append(tree_map_only(torch.Tensor, torch.Tensor.tolist, asdict(step)))
        return found

    expected = bits(0)
    assert any(step["split"] for step in expected)
    assert bits(2) == expected
