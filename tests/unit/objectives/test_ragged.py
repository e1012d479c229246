"""Segments with and without members, against plain Python."""

import math

import pytest
import torch

from mpo_megatron.objectives.ragged import (
    above_mean,
    first_highest,
    group_pairs,
    segment_any,
    segment_log_softmax,
    segment_logsumexp,
    segment_max,
    segment_mean,
)

VALUES = torch.tensor([1.0, 3.0, -2.0, 3.0, 5.0], dtype=torch.float64)
INDEX = torch.tensor([0, 0, 2, 2, 2])  # segment 1 is empty


def test_sums_by_hand() -> None:
    assert segment_mean(VALUES, INDEX, 3).tolist() == [2.0, 0.0, 2.0]
    assert segment_max(VALUES, INDEX, 3, -9.0).tolist() == [3.0, -9.0, 5.0]
    assert segment_any(VALUES == 3.0, INDEX, 4).tolist() == [True, False, True, False]
    found = segment_logsumexp(VALUES, INDEX, 3).tolist()
    assert found[0] == pytest.approx(math.log(math.e + math.e**3))
    assert found[1] == -math.inf
    assert segment_log_softmax(VALUES, INDEX, 3).exp()[:2].tolist() == pytest.approx(
        [1 / (1 + math.e**2), 1 / (1 + math.e**-2)]
    )


def test_an_empty_segment_passes_no_gradient_on() -> None:
    values = VALUES.clone().requires_grad_()
    segment_logsumexp(values, INDEX, 3)[[0, 2]].sum().backward()
    assert values.grad is not None
    assert values.grad[:2].sum() == pytest.approx(1.0)
    assert values.grad[2:].sum() == pytest.approx(1.0)


def test_the_first_of_the_highest() -> None:
    values = torch.tensor([2.0, 7.0, 7.0, -1.0, -1.0])
    assert first_highest(values, torch.tensor([0, 0, 0, 1, 1]), 2).tolist() == [1, 3]


def test_pairs_are_those_of_each_group() -> None:
    index = torch.tensor([0, 1, 1, 1, 2, 2])
    first, second = group_pairs(index, 3)
    wanted = (
        {(0, 0)} | {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)} | {(i, j) for i in (4, 5) for j in (4, 5)}
    )
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == wanted
    assert len(first) == len(wanted)
    assert all(len(part) == 0 for part in group_pairs(index[:0], 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_above_the_mean_allows_for_rounding(dtype: torch.dtype) -> None:
    equal = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.2, 0.1], dtype=dtype)
    assert above_mean(equal, torch.tensor([0, 0, 0, 1, 1, 1]), 2).tolist() == [False] * 3 + [
        True,
        False,
        False,
    ]
