"""Arithmetic by segment against plain Python: segments with and without members, in order and not, to the last bit."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mpo_megatron.ragged.segments import (
    Segments,
    above_mean,
    first_highest,
    segment_any,
    segment_log_softmax,
    segment_logsumexp,
    segment_max,
    segment_mean,
    segment_sum,
    spread,
)

F64 = torch.float64
VALUES = torch.tensor([1.0, 3.0, -2.0, 3.0, 5.0], dtype=F64)
SORTED = Segments.of([0, 0, 2, 2, 2], 3)  # segment 1 is empty
MIXED = Segments.of([2, 0, 2, 0, 2], 3)


def test_segments_by_hand() -> None:
    assert SORTED.order is None
    assert SORTED.offsets.tolist() == [0, 2, 2, 5]
    assert SORTED.sizes.tolist() == [2, 0, 3]
    assert MIXED.order is not None
    assert MIXED.order.tolist() == [1, 3, 0, 2, 4]
    assert (MIXED.count, Segments.of([], 0).count, Segments.of([], 2).count) == (3, 0, 2)


def test_sums_by_hand() -> None:
    assert segment_mean(VALUES, SORTED).tolist() == [2.0, 0.0, 2.0]
    assert segment_sum(VALUES, MIXED).tolist() == [6.0, 0.0, 4.0]
    assert segment_max(VALUES, SORTED).tolist() == [3.0, -math.inf, 5.0]
    assert segment_any(VALUES == 3.0, Segments.of([0, 0, 2, 2, 2], 4)).tolist() == [True, False, True, False]
    assert spread(torch.tensor([7, 8, 9]), MIXED).tolist() == [9, 7, 9, 7, 9]
    found = segment_logsumexp(VALUES, SORTED).tolist()
    assert found[0] == pytest.approx(math.log(math.e + math.e**3))
    assert found[1] == -math.inf
    assert segment_log_softmax(VALUES, SORTED).exp()[:2].tolist() == pytest.approx(
        [1 / (1 + math.e**2), 1 / (1 + math.e**-2)]
    )


def test_members_that_are_left_out_may_be_anything() -> None:
    values = torch.tensor([1.0, math.nan, -2.0, 3.0, math.inf], dtype=F64, requires_grad=True)
    where = torch.tensor([True, False, True, True, False])
    for reduce, wanted in (
        (segment_sum, [1.0, 0.0, 1.0]),
        (segment_mean, [1.0, 0.0, 0.5]),
        (segment_max, [1.0, -math.inf, 3.0]),
        (segment_logsumexp, [1.0, -math.inf, math.log(math.exp(-2) + math.exp(3))]),
    ):
        assert reduce(values, SORTED, where).tolist() == pytest.approx(wanted)
    segment_logsumexp(values, SORTED, where).sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert values.grad[~where].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("segments", [SORTED, MIXED])
@pytest.mark.parametrize("function", [segment_sum, segment_mean, spread])
def test_gradients_and_those_of_gradients(function: Callable, segments: Segments) -> None:
    torch.manual_seed(0)
    values = torch.randn(3 if function is spread else 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: function(v, segments), (values,))
    assert torch.autograd.gradgradcheck(lambda v: function(v.sin(), segments).square(), (values,))
    if function is not spread:
        assert torch.autograd.gradcheck(lambda v: segment_log_softmax(v, segments), (values,))


def test_sums_are_in_the_order_of_the_members() -> None:
    """So they do not depend on what else there is, nor on the place where a segment begins: to the last bit."""
    random = np.random.default_rng(0)
    sizes = random.integers(0, 40, 200)
    values = torch.tensor(random.normal(size=sizes.sum()) * 10.0 ** random.integers(-6, 6, sizes.sum()))
    for dtype in (torch.float32, F64):
        typed = values.to(dtype)
        sums = segment_sum(typed, Segments.of(np.repeat(np.arange(200), sizes), 200))
        for part, found in zip(typed.split(sizes.tolist()), sums, strict=True):
            total = torch.zeros((), dtype=dtype)
            for value in part:
                total = total + value
            assert torch.equal(found, total)


@pytest.mark.parametrize("value", [-math.inf, 0.0])
def test_a_segment_without_anything_passes_no_gradient_on(value: float) -> None:
    """Empty, or of -inf alone."""
    values = torch.cat((VALUES, VALUES.new_tensor([value]))).requires_grad_()
    found = segment_logsumexp(values, Segments.of([0, 0, 2, 2, 2, 3], 4))
    found[[0, 2]].sum().backward()
    assert values.grad is not None
    assert values.grad[:2].sum() == pytest.approx(1.0)
    assert values.grad[2:5].sum() == pytest.approx(1.0)
    assert values.grad[5] == 0.0


def test_the_first_of_the_highest() -> None:
    values = torch.tensor([2.0, 7.0, 7.0, -1.0, -1.0])
    found = first_highest(values, Segments.of([0, 0, 0, 2, 2], 3))
    assert found.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_above_the_mean_allows_for_rounding(dtype: torch.dtype) -> None:
    equal = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.2, 0.1], dtype=dtype)
    groups = Segments.of([0, 0, 0, 1, 1, 1], 2)
    assert above_mean(equal, groups).tolist() == [False] * 3 + [True, False, False]
    # Without the highest, the mean of the second is 0.15.
    assert above_mean(equal, groups, equal < 0.25)[3:].tolist() == [True, True, False]
